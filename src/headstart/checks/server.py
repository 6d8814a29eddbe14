"""What a teacher at a URL gives: its capabilities, scores of a few openings, and how near they are to a local copy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from headstart.assemble.pair import Pair, pad_id
from headstart.assemble.served import candidates_of
from headstart.checks.findings import Finding, Preflight, caught
from headstart.config.models import ModelConfig
from headstart.config.schema import Config
from headstart.errors import HeadstartError
from headstart.models.causal import CausalModel
from headstart.models.load import load_model, load_tokenizer
from headstart.models.templates import build_prompts
from headstart.models.vocabulary import stop_ids
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt, Rollout
from headstart.rollout.engine import InProcessEngine
from headstart.serving.client import Client
from headstart.tasks.prompts import load_problems
from headstart.teacher.connect import connect
from headstart.teacher.scorers import Array, CandidateScorer, Capabilities, LocalScorer, actual

CLOSE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest gap (nats) between two scorings of one candidate that rounding alone can make, by the local copy's type."""
RESPONSES, TIMEOUT, DEADLINE = 4, 120.0, 5.0
"""Openings that are compared; seconds for one request, and for tries of one that fails at once."""
TOKENS = 32
"""Tokens of each opening that are scored."""


def run_server_preflight(config: Config, url: str, model: str | None = None, copy: str | None = None) -> Preflight:
    """What the endpoint at `url` can give for `config`; with `copy` (folder or hub name of the same teacher), whether
    its scores are that model's, too. The tokenizer is the copy's, else that of the run's teacher."""
    findings: list[Finding] = []
    scorer: CandidateScorer | None = None
    with caught("teacher server", findings):
        tokenizer = load_tokenizer(ModelConfig(path=copy) if copy else config.teacher_tokenizer)
        wanted = candidates_of(config.divergence, len(tokenizer))
        scorer = connect(Client([url], timeout=TIMEOUT, deadline=DEADLINE), model, tokenizer, wanted)
        findings.append(endpoint_finding(scorer.capabilities()))
    if scorer is not None and copy is not None:
        with caught("teacher against a local copy", findings):
            findings.append(against_copy(config, scorer, ModelConfig(path=copy), tokenizer, wanted))
    if scorer is not None:
        scorer.close()
    return Preflight(tuple(findings))


def against_copy(config: Config, scorer: CandidateScorer, copy: ModelConfig, tokenizer: Any, wanted: int) -> Finding:
    """The endpoint beside a local copy of its model, on openings that the copy samples after the run's prompts."""
    runtime = Runtime.start(config.training.device)
    loaded = load_model(copy, runtime.device)
    here = CausalModel(loaded, min(len(tokenizer), len(loaded.get_output_embeddings().weight)), pad_id(tokenizer))
    prompts = build_prompts(load_problems(config.prompts), tokenizer, tokenizer, config.prompts).prompts[:RESPONSES]
    rollouts = InProcessEngine(here, sorted(stop_ids(tokenizer, loaded.generation_config, here.vocabulary))).generate(
        prompts,
        samples=1,
        max_tokens=TOKENS,
        sampling=config.rollout.sampling,
        key=(config.training.seed, "preflight-server", 0),
        candidates=wanted,
    )
    return comparison(scorer, LocalScorer(here), rollouts, str(loaded.dtype).removeprefix("torch."))


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
    context = "context not known" if found.max_positions is None else f"scores up to {found.max_positions:,} tokens"
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
    known = (asked >= 0) & ~np.isnan(served) & np.isfinite(here)
    if not known[actual(asked)].all():
        raise HeadstartError("a sampled token was not scored", "check the endpoint")
    gaps: Array = np.abs(np.clip(served[known], -1e4, None) - here[known])
    return gaps
