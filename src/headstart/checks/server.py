"""What a teacher at a URL gives: its capabilities, scores of a few openings, and how near they are to a local copy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.errors import HeadstartError
from headstart.records import Prompt, Rollout
from headstart.teacher.scorers import Array, CandidateScorer, Capabilities, LocalScorer, actual

CLOSE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest gap (nats) between two scorings of one candidate that rounding alone can make, by the local copy's type."""
TOKENS = 32
"""Tokens of each opening that are scored."""


def endpoint_finding(found: Capabilities) -> Finding:
    """What the endpoint gives; a warning where it might give more."""
    facts = {
        "level": found.level,
        "model": found.model,
        "width": found.width,
        "max_positions": found.max_positions,
        "tokenizer": found.tokenizer,
        "version": found.version,
        "notes": list(found.notes),
    }
    context = "context not known" if found.max_positions is None else f"context {found.max_positions:,} tokens"
    tokenizer = "tokenizer not checked" if found.tokenizer is None else f"tokenizer {found.tokenizer} as here"
    text = f"{found}; {context}, {tokenizer}, server version {found.version or 'not known'}"
    if found.level in ("per_row", "full") and found.tokenizer is not None:
        return Finding("teacher server", "ok", text, None, facts)
    reasons = "; ".join(found.notes) or "it does not say how it splits text"
    return Finding("teacher server", "warning", f"{text} ({reasons})", "serve the teacher with vLLM on a GPU", facts)


def live_finding(pair: Pair, prompts: Sequence[Prompt]) -> Finding:
    """A few openings of the student, scored as in a step: what the tail holds, and how long the server takes."""
    teacher = pair.scorer()
    rollouts = pair.engine("student").generate(
        prompts,
        samples=1,
        max_tokens=TOKENS,
        sampling=pair.config.rollout.sampling,
        key=(pair.config.training.seed, "preflight-server", 0),
        candidates=teacher.candidates,
    )
    start = time.perf_counter()
    teacher.ready(teacher.align(rollouts))
    seconds, counts = time.perf_counter() - start, teacher.metrics()
    tokens = sum(len(r.completion_ids) for r in rollouts)
    asked, known = counts["candidates_asked"], counts["candidates_known"]
    figures: dict[str, Any] = {"rollouts": len(rollouts), "tokens": tokens, "seconds": seconds, **counts}
    text = (
        f"{len(rollouts)} openings of {tokens} tokens scored in {seconds:.2g} s, "
        f"{counts['teacher_bytes'] / tokens:,.0f} bytes per token received"
    )
    if not asked or known == asked:
        return Finding("teacher scores", "ok", text, None, figures)
    share = known / asked
    text += f"; {share:.0%} of the student's candidates are among the ids that the server sends, the rest is tail"
    return Finding("teacher scores", "note" if share > 0.9 else "warning", text, "raise --max-logprobs", figures)


def comparison(scorer: CandidateScorer, local: LocalScorer, rollouts: Sequence[Rollout], dtype: str) -> Finding:
    """The same candidates scored at the URL and by a local copy of the teacher; rollouts carry candidates."""
    gaps = []
    for rollout in rollouts:
        prompt, ids = rollout.prompt.teacher_token_ids, rollout.completion_ids
        both = [s.score(prompt, ids, rollout.candidate_ids) for s in (scorer, local)]
        gaps.append(_gaps(both[0], both[1], rollout.candidate_ids))
    gap = np.concatenate(gaps)
    largest, mean, allowed = float(gap.max(initial=0.0)), float(gap.mean()) if len(gap) else 0.0, CLOSE.get(dtype, 1e-3)
    figures = {"largest": largest, "mean": mean, "scores": len(gap), "largest_allowed": allowed, "dtype": dtype}
    text = f"{len(gap):,} scores differ from the local copy's by {mean:.2g} nats in the mean and {largest:.2g} at most"
    if largest <= allowed:
        return Finding("teacher against a local copy", "ok", text, None, figures)
    remedy = "check that the server has this checkpoint (revision, adapter) and which --dtype; quantisation shows, too"
    return Finding("teacher against a local copy", "blocking", f"{text} (rounding makes {allowed:g})", remedy, figures)


def _gaps(served: Array, here: Array, asked: Array) -> Array:
    """Absolute gaps, weighted by nothing, of all scores that both have."""
    told = (asked >= 0) & ~np.isnan(served) & np.isfinite(here)
    if not told[actual(asked)].all():
        raise HeadstartError("a sampled token was not scored", "check the endpoint")
    found: Array = np.abs(np.clip(served[told], -1e4, None) - here[told])
    return found
