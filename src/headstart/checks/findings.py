"""The result of a check, and all results of a preflight with their exit code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from headstart.errors import HeadstartError

Severity = Literal["ok", "note", "warning", "blocking"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "blocking")
"""From harmless to severe. A note is worth knowing and needs no action."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's result. `figures` holds what was measured, ready for JSON; `remedy` is None where none is needed.

    Example: `Finding("prompts", "note", "3 of 64 prompts are duplicates", None, {"duplicates": 3})`.
    """

    check: str
    severity: Severity
    message: str
    remedy: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


Check = tuple[str, Callable[[], Finding | list[Finding] | None]]
"""A check and what it is called."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """All findings of a pair, in the order they were made, and the checks that were left out or not reached."""

    findings: tuple[Finding, ...]
    not_made: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 clean (notes included), 1 with warnings, 2 with anything blocking."""
        return max((SEVERITIES.index(f.severity) - 1 for f in self.findings if f.severity != "ok"), default=0)

    def __str__(self) -> str:
        return "\n".join(
            f"{f.severity}: {f.check}: {f.message}" + (f" -> {f.remedy}" if f.remedy else "") for f in self.findings
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `diagnose/preflight.json`."""
        findings = [asdict(finding) for finding in self.findings]
        return {"format": 1, "findings": findings, "not_made": list(self.not_made), "exit_code": self.exit_code}


@contextmanager
def caught(check: str, findings: list[Finding], work: str | None = None) -> Iterator[None]:
    """While entered, warnings become findings, and an error ends the block with a blocking one.

    Only errors that Headstart raises on purpose are caught, and a device that runs out of memory during `work` (the
    check itself by default).
    """
    error: Finding | None = None
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        try:
            yield
        except HeadstartError as raised:
            message, remedy = (raised.problem, raised.remedy) if raised.remedy else _split(str(raised))
            error = Finding(check, "blocking", message, remedy, {"error": type(raised).__name__})
        except torch.OutOfMemoryError as raised:
            message = f"{work or f'the check of {check}'} runs out of memory: {str(raised).splitlines()[0]}"
            error = Finding("memory", "blocking", message, "free the device, use a smaller dtype, or lower the horizon")
    texts = dict.fromkeys(str(w.message) for w in caught_warnings if issubclass(w.category, UserWarning))
    findings += [Finding(check, "warning", *_split(text)) for text in texts]
    if error is not None and error.message not in [f.message for f in findings]:  # two checks may fail over one thing
        findings.append(error)


def _split(text: str) -> tuple[str, str | None]:
    """Message and remedy of a warning, or of an error without the field: its last sentence or else clause."""
    for mark in (". ", "; "):
        message, separator, remedy = text.rpartition(mark)
        if separator:
            return message, remedy
    return text, None
