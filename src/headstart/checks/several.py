"""The checks of a run with several teachers: of the student and the prompts once, of each teacher on what it scores."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from headstart.assemble.several import Panel, seen_by
from headstart.checks.findings import Check, Finding
from headstart.checks.subject import Subject
from headstart.teacher.several import Visitor

ONCE = (
    *("duplicate prompts", "special tokens", "prompt length", "prompt form", "test overlap"),
    "given text",
    *("engine log-probs", "gradients", "trainable weights"),
)
"""Checks in which no teacher takes part."""
READING = ("alignment", "stop tokens", "chat template", "self-test", "teacher determinism")
"""Checks that read the teacher's distribution, for which one that visits is loaded."""
ALONE = ("memory", "time")
"""Checks of what a pair takes by itself, which says nothing of several."""


def checks_of_several(
    s: Subject, panel: Panel, checks: Callable[[Subject], list[Check]], memory: Callable[[], Finding | None]
) -> list[Check]:
    """`checks` of the pairs; `memory` is that of the whole."""
    found = [(name, check) for name, check in checks(replace(s, pair=next(iter(panel.pairs.values())))) if name in ONCE]
    for teacher, pair in panel.pairs.items():
        own = replace(s, pair=pair, prompts=replace(s.prompts, prompts=seen_by(s.prompts.prompts, teacher)))
        for name, check in checks(own):
            if name not in (*ONCE, *ALONE):
                visitor = panel.visitor(teacher) if name in READING else None
                found.append((f"{teacher}: {name}", partial(_named, teacher, check, visitor)))
    if panel.visiting is not None:
        found.append(("teachers", lambda: Finding("teachers", "note", panel.visiting or "")))
    return [*found, ("memory", memory)]


def _named(teacher: str, check: Callable[[], Finding | list[Finding] | None], visitor: Visitor | None) -> list[Finding]:
    """The findings of a check, with the teacher that they are about."""
    with visitor.present() if visitor is not None else nullcontext():
        found = check()
    findings = [found] if isinstance(found, Finding) else found or []
    return [replace(finding, check=f"{teacher}: {finding.check}") for finding in findings]
