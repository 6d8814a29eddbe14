"""Do the numbers hold? The same tokens scored along two paths that must agree.

Log-probabilities are compared in nats at sampled tokens. What half precision rounds away is expected: bounds depend on
the type the model computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.losses.chunked import default_chunk, weighted_divergence
from headstart.losses.divergence import token_logprobs
from headstart.models.causal import CausalModel
from headstart.models.lora import unwrap
from headstart.records import Rollout
from headstart.rollout.decoding import Decoding
from headstart.teacher.local import LocalTeacher

ZERO = 1e-5
"""Nats per token that a model may differ from itself."""
GAPS = {torch.float32: (1e-2, 1e-3), torch.float16: (0.1, 0.01), torch.bfloat16: (0.5, 0.05)}
"""Largest and mean gap (nats) between two ways to score one token that rounding alone can make."""


def sampling_logprobs(model: CausalModel, rollouts: Sequence[Rollout]) -> Tensor:
    """The same along the sampling path: token by token, with the KV cache."""
    lengths = [len(r.completion_ids) for r in rollouts]
    rows: list[list[Tensor]] = [[] for _ in rollouts]
    with model.sampling_mode():
        state = Decoding.of(model, [r.prompt for r in rollouts])
        for position in range(max(lengths)):
            tokens = [r.completion_ids[min(position, len(r.completion_ids) - 1)] for r in rollouts]
            token_B = torch.tensor(tokens, device=model.device)
            for row, length, logprob in zip(rows, lengths, token_logprobs(state.logits_BV, token_B), strict=True):
                if position < length:
                    row.append(logprob)
            if position + 1 < max(lengths):
                # A row ages only with a token that it holds: beyond its end there may be no position.
                state.step(token_B, [position + 1 < length for length in lengths])
    return torch.stack([value for row in rows for value in row])


def seen_by_teacher(pair: Pair, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts as the teacher's own: its view of the prompt, and its tokens, in the student's place."""
    own = []
    for r in pair.scorer().align(rollouts):
        ids = r.completion_ids if r.aligned is None else r.aligned.ids
        own.append(replace(r, prompt=r.prompt.as_teacher(), completion_ids=ids, aligned=None))
    return own


def self_test(pair: Pair, rollouts: Sequence[Rollout]) -> Finding:
    """The teacher beside itself, through the code of a training step: the divergence must be zero."""
    own = seen_by_teacher(pair, rollouts)
    batch = pair.teacher.batch(own, "student")
    with pair.teacher.sampling_mode():
        value_M = weighted_divergence(
            pair.config.divergence,
            pair.teacher.completion_hidden(batch),
            pair.teacher.trained_head(),
            LocalTeacher(pair.teacher).score(own),
            batch.tokens_M,
            torch.ones(len(batch.tokens_M), device=pair.teacher.device),
            chunk=default_chunk(pair.teacher.vocabulary),
        ).value_M
    largest = float(value_M.abs().max())
    figures = {"largest_nats": largest, "tokens": len(batch.tokens_M)}
    if largest <= ZERO:
        text = f"student = teacher gives a divergence of {largest:.1g} nats on {len(batch.tokens_M)} tokens"
        return Finding("self-test", "ok", text, None, figures)
    return Finding(
        "self-test",
        "blocking",
        f"the teacher diverges from itself by up to {largest:.2g} nats per token (must be below {ZERO:g})",
        "its forward pass is random or depends on state: remove noise and active dropout from the checkpoint's code, "
        "or set teacher.attention=eager",
        figures,
    )


def determinism(pair: Pair, rollouts: Sequence[Rollout]) -> Finding:
    """One sequence scored twice by the teacher, and once more in a batch of others."""
    own = seen_by_teacher(pair, rollouts)
    half = replace(own[0], completion_ids=own[0].completion_ids[: -(-len(own[0].completion_ids) // 2)])
    once_M, twice_M = pair.teacher.logprobs([half]), pair.teacher.logprobs([half])
    together_M = pair.teacher.logprobs([half, *own])[: len(once_M)]  # the others are longer, so it is padded
    (repeated, repeated_mean), (batched, batched_mean) = _gap(once_M, twice_M), _gap(once_M, together_M)
    return _gap_finding(
        "teacher determinism",
        pair.teacher,
        (max(repeated, batched), max(repeated_mean, batched_mean)),
        f"one sequence scored twice differs by at most {repeated:.2g} nats, alone and in a batch by at most "
        f"{batched:.2g}",
        "use teacher.attention=eager or teacher.dtype=float32, and check that its padding is masked",
        {
            "repeated_largest": repeated,
            "batched_largest": batched,
            "batched_mean": batched_mean,
            "tokens": len(once_M),
        },
    )


def engine_agreement(pair: Pair, rollouts: Sequence[Rollout]) -> Finding:
    """Log-probabilities of the sampling path against those of the training forward, on the student's own tokens."""
    engine_M, trainer_M = sampling_logprobs(pair.student, rollouts), pair.student.logprobs(rollouts)
    largest, mean = _gap(engine_M, trainer_M)
    ratio_M = (trainer_M - engine_M).double()
    k3 = float((ratio_M.exp() - 1 - ratio_M).mean())
    return _gap_finding(
        "engine log-probs",
        pair.student,
        (largest, mean),
        f"sampling and training score the same {len(engine_M)} tokens {mean:.2g} nats apart in the mean "
        f"and {largest:.2g} at most (k3 estimate of their KL: {k3:.2g})",
        "use student.attention=eager or student.dtype=float32, or the student is trained on what it would not say",
        {"mean": mean, "largest": largest, "k3": k3, "tokens": len(engine_M)},
    )


def _gap(a_M: Tensor, b_M: Tensor) -> tuple[float, float]:
    """How far two scorings of the same tokens are apart, in nats: at most, and in the mean."""
    gap_M = (a_M.double() - b_M.double()).abs()
    return float(gap_M.max()), float(gap_M.mean())


def _gap_finding(
    check: str, model: CausalModel, gap: tuple[float, float], message: str, remedy: str, figures: dict[str, Any]
) -> Finding:
    dtype = unwrap(model.model).dtype
    largest, mean = GAPS.get(dtype, GAPS[torch.float32])
    figures |= {"dtype": str(dtype).removeprefix("torch."), "largest_allowed": largest, "mean_allowed": mean}
    if gap[0] <= largest and gap[1] <= mean:
        return Finding(check, "ok", message, None, figures)
    bounds = f"rounding in {figures['dtype']} explains {mean:g} in the mean and {largest:g} at most"
    return Finding(check, "warning", f"{message}; {bounds}", remedy, figures)
