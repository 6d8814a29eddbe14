"""Token selection: what each rule would pick.

(arXiv 2605.27028 compares first, middle, last, random tokens and those of largest divergence or entropy.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from headstart.config.schema import AllTokens, FormatTokens, PlacedTokens, Selection, TopTokens
from headstart.diagnosis.positions import TokenReadings
from headstart.explanation.models import Models, Reading, token_share
from headstart.losses.selection import CLASSES, TokenClass, chosen
from headstart.stats import Array, Estimate, by_problem, estimate, is_noise, ratio, resamples, share
from headstart.streams import uniforms

SIGNALS = ("divergence", "student_entropy", "teacher_entropy")
COMPARED: tuple[TokenClass, ...] = ("number", "word", "symbol")
"""Classes of tokens that are separate rules; of the others a rollout holds too few."""


def rules(tokens: int) -> dict[str, Selection]:
    """The rules that are compared, `tokens` of each rollout; `all` is the whole rollout, the others' upper bound."""
    placed = {kind: PlacedTokens(type=kind, tokens=tokens) for kind in ("first", "last", "middle", "random", "window")}
    signals = [*((name,) for name in SIGNALS), *combinations(SIGNALS, 2)]
    tops = {f"top {' x '.join(by)}".replace("_", " "): TopTokens(by=by, tokens=tokens) for by in signals}
    formats = {f"format {name}": FormatTokens(classes=(name,), tokens=tokens) for name in COMPARED}
    return {"all": AllTokens(), **placed, **tops, **formats}


@dataclass(frozen=True, slots=True)
class TokenSelection(Reading):
    """What the rules pick on the student's rollouts.

    `correlation`: Spearman's rank correlation of position with each signal, `pooled` over all tokens and as the mean
    `per_rollout`. `picked`, by rule: the `mean_position` of its tokens and the `divergence_share` that lies on them.
    `overlap[a][b]`: the mean Jaccard index of what rules a and b pick. `classes`, by class of token: its share of the
    `tokens`, its mean `divergence` (nats per token) and its `divergence_share`.
    """

    tokens: int
    rollouts: int
    correlation: Mapping[str, Mapping[str, Any]]
    picked: Mapping[str, Mapping[str, Any]]
    overlap: Mapping[str, Mapping[str, float | None]]
    classes: Mapping[str, Mapping[str, Any]]


def explain_selection(models: Models, tokens: int, class_V: Array) -> TokenSelection:
    """What the rules pick at `tokens` a rollout, on the full rollouts of the student before training."""
    responses, read = models.responses("before"), models.read("before", "before")
    counts_RP, problem_of = resamples(len(models.problems), models.seed), models.problem_of(responses)
    problem_M = problem_of[read.row]
    class_M = class_V[[responses[row].completion_ids[n] for row, n in zip(read.row, read.position, strict=True)]]
    masks = {name: pick(rule, read, models.seed, class_M) for name, rule in rules(tokens).items()}
    class_masks = {name: class_M == number for number, name in enumerate(CLASSES)}
    total_P, _ = by_problem(problem_M, read.divergence, len(models.problems))

    def divergence_share(mask_M: Array) -> Estimate | None:
        on_P, _ = by_problem(problem_M, read.divergence * mask_M, len(models.problems))
        return share(counts_RP, on_P, total_P)

    def mean(values: Array) -> float | None:
        return float(values.mean()) if len(values) else None

    correlation: dict[str, dict[str, Any]] = {
        name: {
            "pooled": spearman(read.position, getattr(read, name)),
            "per_rollout": _correlation(read, getattr(read, name), problem_of, counts_RP),
        }
        for name in SIGNALS
    }
    return TokenSelection(
        sentence=_sentence(correlation["divergence"]["per_rollout"], tokens),
        tokens=tokens,
        rollouts=len(responses),
        correlation=correlation,
        picked={
            name: {"mean_position": mean(read.position[mask]), "divergence_share": divergence_share(mask)}
            for name, mask in masks.items()
        },
        overlap={a: {b: jaccard(masks[a], masks[b], read.row) for b in masks} for a in masks},
        classes={
            name: {
                "tokens": token_share(counts_RP, problem_M, mask),
                "divergence": mean(read.divergence[mask]),
                "divergence_share": divergence_share(mask),
            }
            for name, mask in class_masks.items()
            if mask.any()
        },
    )


def pick(rule: Selection, read: TokenReadings, seed: int, class_M: Array | None = None) -> Array:
    """The tokens of `read` that `rule` picks: bool `[M]`. `class_M` holds indices in CLASSES (format rules only)."""
    rows, slices = _rollouts(read)
    draws = uniforms((seed, "selection", 0), [(int(row), 0) for row in rows], 0, int(read.position.max()) + 1)
    mask_M = np.zeros(len(read.row), dtype=bool)
    for draws_N, tokens in zip(draws, slices, strict=True):
        signals = {name: getattr(read, name)[tokens] for name in SIGNALS}
        classes = None if class_M is None else class_M[tokens]
        mask_M[tokens] = chosen(rule, draws_N[: tokens.stop - tokens.start], signals, classes)
    return mask_M


def _rollouts(read: TokenReadings) -> tuple[Array, list[slice]]:
    """The rows that have tokens, and the tokens of each."""
    rows, starts = np.unique(read.row, return_index=True)
    return rows, [slice(start, end) for start, end in zip(starts, [*starts[1:], len(read.row)], strict=True)]


def jaccard(a_M: Array, b_M: Array, row_M: Array) -> float | None:
    """Tokens that both masks pick per tokens that either picks, as the mean over rollouts in which one picks any."""
    both, either = (np.bincount(row_M, weights=mask_M) for mask_M in (a_M & b_M, a_M | b_M))
    return float((both[either > 0] / either[either > 0]).mean()) if (either > 0).any() else None


def ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean: Array = (ends - (counts - 1) / 2.0)[inverse.reshape(-1)]
    return mean


def spearman(a: Array, b: Array) -> float | None:
    """Pearson's correlation of the ranks; None where one side is constant."""
    x, y = (ranks(v) - (len(v) + 1) / 2.0 for v in (a, b))
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / norm) if norm > 0 else None


def _correlation(read: TokenReadings, signal: Array, problem_of_row: Array, counts_RP: Array) -> Estimate | None:
    """The rank correlation of position with `signal`, as the mean over rollouts where it is defined."""
    rows, slices = _rollouts(read)
    by_rollout = [spearman(read.position[tokens], signal[tokens]) for tokens in slices]
    defined = np.array([value is not None for value in by_rollout])
    values = np.array([value for value in by_rollout if value is not None])
    return estimate(ratio(counts_RP, *by_problem(problem_of_row[rows][defined], values, counts_RP.shape[1])))


def _sentence(trend: Estimate | None, tokens: int) -> str:
    if is_noise(trend) or trend is None or trend.value is None:
        text = "Within a rollout the divergence shows no trend with position beyond noise."
    else:
        way = "falls" if trend.value < 0 else "rises"
        text = f"Within a rollout the divergence {way} with position (rank correlation {trend.value:+.2f})."
    return f"{text} What each rule is worth at {tokens} tokens a rollout, a study tells: one arm for each `selection`."
