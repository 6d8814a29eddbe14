"""What a check found, and all of them together with the exit code they ask for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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


@dataclass(frozen=True, slots=True)
class Preflight:
    """All findings of a pair, in the order they were made."""

    findings: tuple[Finding, ...]

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
        return {"format": 1, "findings": [asdict(f) for f in self.findings], "exit_code": self.exit_code}


def worst(*severities: Severity) -> Severity:
    """The most severe of several."""
    return max(severities, key=SEVERITIES.index)


@contextmanager
def caught(check: str, found: list[Finding]) -> Iterator[None]:
    """While entered, warnings become findings and an error ends the block with a blocking one.

    Only errors that Headstart raises on purpose are caught; their message names the remedy.
    """
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        error: HeadstartError | None = None
        try:
            yield
        except HeadstartError as raised:
            error = raised
    said = dict.fromkeys(str(w.message) for w in heard if issubclass(w.category, UserWarning))
    found += [Finding(check, "warning", *_split(text)) for text in said]
    if error is not None:
        message, remedy = _split(str(error))
        if message not in [f.message for f in found]:  # two checks may fail over one thing, such as a missing folder
            found.append(Finding(check, "blocking", message, remedy, {"error": type(error).__name__}))


def _split(text: str) -> tuple[str, str | None]:
    """Message and remedy of an error or a warning, whose last sentence (or else clause) says what to do."""
    for mark in (". ", "; "):
        message, found, remedy = text.rpartition(mark)
        if found:
            return message, remedy
    return text, None
