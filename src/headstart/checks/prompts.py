"""Are the prompts what they should be: each once, none lost, none of the test?"""

from __future__ import annotations

from collections.abc import Sequence

from headstart.checks.findings import Finding, Severity
from headstart.records import Prompt
from headstart.tasks.overlap import Overlap

MANY = 0.05
"""A share from which duplicates or dropped prompts are no accident of a source but change what is trained."""


def duplicates(prompts: Sequence[Prompt]) -> Finding:
    """Prompts that the student reads as the same ids as an earlier one."""
    extra = len(prompts) - len({p.token_ids for p in prompts})
    figures = {"prompts": len(prompts), "duplicates": extra}
    if not extra:
        return Finding("duplicate prompts", "ok", f"{len(prompts):,} prompts, each once", None, figures)
    return Finding(
        "duplicate prompts",
        _severity(extra / len(prompts)),
        f"{extra:,} of {len(prompts):,} prompts repeat another one: they weigh more in training",
        "remove the repeated rows from prompts.source",
        figures,
    )


def overlong(prompts: Sequence[Prompt], dropped: int, max_tokens: int) -> Finding:
    """Prompts left out because they are longer than `prompts.max_tokens`."""
    longest, total = max(len(p.token_ids) for p in prompts), len(prompts) + dropped
    figures = {"dropped": dropped, "longest": longest, "max_tokens": max_tokens}
    if not dropped:
        text = f"no prompt is longer than prompts.max_tokens = {max_tokens:,} (the longest has {longest:,} tokens)"
        return Finding("prompt length", "ok", text, None, figures)
    return Finding(
        "prompt length",
        _severity(dropped / total),
        f"{dropped:,} of {total:,} prompts are longer than prompts.max_tokens = {max_tokens:,} and are dropped",
        "raise prompts.max_tokens, unless long questions shall not be trained",
        figures,
    )


def evaluation_overlap(found: Overlap, task: str) -> Finding:
    """Test problems among the training prompts."""
    figures = {"exact": len(found.exact), "near": len(found.near), "test": found.test, "train": found.train}
    text = found.warning(task)
    if text is None:
        return Finding("test overlap", "ok", f"no problem of {task} is among the training prompts", None, figures)
    remedy = "remove these prompts, or choose another test" if found.exact else None
    return Finding("test overlap", "warning" if found.exact else "note", text, remedy, figures)


def _severity(share: float) -> Severity:
    return "warning" if share >= MANY else "note"
