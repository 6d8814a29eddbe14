"""What of the student's responses a teacher with another tokenizer can score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.losses.chunked import compared, default_chunk, slices
from headstart.records import Rollout

LITTLE = 0.5
"""Share of tokens scored below which most of a window teaches nothing."""
MUCH = 0.1
"""Probability of what the other model cannot express above which the two are hardly compared."""


def alignment(pair: Pair, rollouts: Sequence[Rollout]) -> Finding | None:
    """Share of the responses' tokens that are scored, that are the same tokens, and the probability on either side of
    what the other cannot express. None with one tokenizer."""
    aligner = pair.vocabulary.aligner
    if aligner is None:
        return None
    aligned = pair.scorer().align(rollouts)
    tokens = sum(len(r.completion_ids) for r in rollouts)
    strict = replace(aligner, kind="strict")
    one = sum(len(strict.align(r).rows) for r in rollouts) / tokens
    scored = sum(len(r.rows) for r in aligned) / tokens
    dropped = sum(r.aligned is not None and r.aligned.dropped for r in aligned)
    rest = _rest(pair, [r for r in aligned if r.rows])
    figures = {"tokens": tokens, "scored": scored, "one_to_one": one, "dropped": dropped}
    figures |= {"student_rest": rest[0], "teacher_rest": rest[1]}
    text = (
        f"of {tokens:,} tokens of {len(rollouts)} responses {scored:.0%} start where a token of the teacher starts and "
        f"{one:.0%} are the same token; {rest[0]:.2%} of the student's probability and {rest[1]:.2%} of the teacher's "
        "is on what the other cannot express"
    )
    if dropped:
        text += f"; {dropped} of {len(rollouts)} responses cannot be written by the teacher's tokenizer and are dropped"
    if scored < LITTLE or max(rest) > MUCH or 2 * dropped > len(rollouts):
        remedy = "choose a teacher whose tokenizer is nearer to the student's, or a longer horizon"
        return Finding("alignment", "warning", text, remedy, figures)
    return Finding("alignment", "note", text, None, figures)


def _rest(pair: Pair, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Mean probability of REST on both sides."""
    head = pair.student.trained_head()
    if head.events is None or head.events.rest is None or not rollouts:
        return 0.0, 0.0
    scores = pair.scorer().score(rollouts)
    with pair.student.sampling_mode():
        hidden_MD = pair.student.completion_hidden(pair.student.batch(rollouts, "student"))
    chunks = slices(len(hidden_MD), default_chunk(pair.vocabulary.largest))
    parts = [rest for rows in chunks if (rest := compared(head, hidden_MD[rows], scores, rows)[2]) is not None]
    student, teacher = (float(torch.cat(side).mean()) for side in zip(*parts, strict=True))
    return student, teacher
