"""What of the student's responses a teacher with another tokenizer can score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.losses.chunked import compared, default_chunk
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
    head, sums, count = pair.student.trained_head(), torch.zeros(2), 0
    if head.events is None or head.events.rest is None:
        return 0.0, 0.0
    chunk = default_chunk(pair.vocabulary.largest)
    for rollout in rollouts:
        with pair.student.sampling_mode():
            hidden_MD = pair.student.completion_hidden(pair.student.batch([rollout], "student"))
        scores = pair.scorer().score([rollout])
        for start in range(0, len(hidden_MD), chunk):
            rows = slice(start, start + chunk)
            _, _, rest = compared(head, hidden_MD[rows], scores, rows)
            assert rest is not None
            sums += torch.stack([x.sum() for x in rest]).cpu()
        count += len(hidden_MD)
    student, teacher = (sums / max(1, count)).tolist()
    return student, teacher
