"""Readings at every position of full rollouts: where the divergence lies, and how sure both models are there.

Divergence, both entropies, the teacher's confidence, agreement and overlap (METHODS of arXiv 2605.27028, 2605.07804),
binned by position with their spread. What an early-stopped run trains is only the first bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.assemble.pair import Pair
from headstart.errors import ConfigError, VocabularyError
from headstart.interfaces import OnProgress, silent
from headstart.losses.chunked import compared, default_chunk, inside, slices
from headstart.losses.divergence import inside_rows, position_stats
from headstart.losses.readings import TokenTable, pair_readings
from headstart.models.alignment import CONTROLS
from headstart.records import Rollout
from headstart.stats import Array, resamples
from headstart.teacher.local import LocalTeacher

EDGES = (0, 4, 8, 16, 32, 64, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 4000, 8000, 16000, 32000)
"""Edges (completion tokens) of the bins in which readings are averaged."""
BINNED = (
    "divergence", "student_entropy", "teacher_entropy", "teacher_logprob", "student_top", "teacher_top", "agree",
    "overlap", "shared_mass",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenReadings(TokenTable):
    """M completion tokens of some rollouts, in row order; `row` is the rollout's index in the list that was read.

    `divergence` is the run's own divergence (nats); `teacher_rank` 1 = the teacher's favourite; the rest as in
    `PositionStats` and `pair_readings`.
    """

    row: Array
    position: Array
    divergence: Array
    student_entropy: Array
    teacher_entropy: Array
    student_logprob: Array
    teacher_logprob: Array
    teacher_rank: Array
    student_top: Array
    teacher_top: Array
    agree: Array
    overlap: Array
    shared_mass: Array
    teacher_ids: Array
    teacher_probs: Array

    def of_rows(self, rows: Sequence[int]) -> TokenReadings:
        """The tokens of these rollouts only; `row` keeps its numbers."""
        return self.where(np.isin(self.row, np.asarray(rows, dtype=self.row.dtype)))


def read_tokens(
    pair: Pair, rollouts: Sequence[Rollout], *, batch_size: int = 8, progress: OnProgress = silent
) -> TokenReadings:
    """Score every completion token of `rollouts`, at least one, under both models, `batch_size` rollouts at a time.

    The divergence is the configured one, over what is compared in training; every other reading is of the same
    distributions. Tokens that a teacher with another tokenizer cannot score are left out. Raises VocabularyError when
    these are all.
    """
    teacher = LocalTeacher(pair.teacher, pair.vocabulary.aligner)
    if teacher.aligner is not None and teacher.aligner.kind in CONTROLS:
        raise ConfigError(
            f"divergence.alignment {teacher.aligner.kind} is a control for training, which gives no divergence at a "
            "token to read; set coarse, strict or byte"
        )
    rollouts = teacher.align(rollouts)
    parts: list[TokenReadings] = []
    # Rollouts of similar length share a batch; rows are put back in order below.
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].completion_ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        parts += _read_batch(pair, teacher, [rollouts[i] for i in rows], np.array(rows))
        progress(min(start + batch_size, len(order)), len(order))
    if not parts:
        raise VocabularyError(
            "the teacher scores no token of these rollouts: none starts where one of its own tokens starts; "
            "headstart preflight says what the two tokenizers share"
        )
    readings = TokenReadings.concat(parts)
    return readings.where(np.lexsort((readings.position, readings.row)))


def _read_batch(pair: Pair, teacher: LocalTeacher, rollouts: Sequence[Rollout], rows_B: Array) -> list[TokenReadings]:
    batch, head = pair.student.batch(rollouts, "student"), pair.student.trained_head()
    tokens_M = head.of_tokens(batch.tokens_M)
    parts = []
    with pair.student.sampling_mode():
        scores = teacher.score(rollouts)
        hidden_MD = pair.student.completion_hidden(batch)
        for rows in slices(len(tokens_M), default_chunk(pair.vocabulary.largest)):
            student_mV, teacher_mV, _ = compared(head, hidden_MD[rows], scores, rows)
            stats = position_stats(student_mV, teacher_mV, tokens_M[rows])
            readings = pair_readings(student_mV, teacher_mV)
            if head.events is not None:
                readings["teacher_ids"] = head.events.ids(readings["teacher_ids"])
            columns = {
                "row": rows_B[batch.row_M[rows].cpu().numpy()],
                "position": batch.position_M[rows],
                "divergence": inside_rows(
                    pair.config.divergence, student_mV, teacher_mV, tokens_M[rows], inside(scores, rows)
                ).value_M,
                **{name.removesuffix("_M"): getattr(stats, name) for name in stats.__slots__},
                **readings,
            }
            parts.append(TokenReadings.of(columns))
    return parts


def binned(readings: TokenReadings, edges: Sequence[int] = EDGES) -> list[dict[str, Any]]:
    """Mean and spread of every reading by position: one record per bin that holds tokens.

    `first` and `last` are positions (inclusive), `tokens` and `rollouts` what was counted. Each reading has `mean`,
    `p25`, `p50`, `p75` over tokens and `se`, the standard error of the mean over rollouts (tokens of one rollout
    depend on each other; None with fewer than two rollouts). `rank` holds the shares of teacher ranks 1, 2-5 and over
    5; `divergence_share` is the cumulative share of all divergence up to the bin's end.
    """
    total = float(readings.divergence.sum())
    bins: list[dict[str, Any]] = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = readings.where((readings.position >= low) & (readings.position < high))
        if not len(inside.row):
            continue
        so_far = float(readings.divergence[readings.position < high].sum())
        rank = inside.teacher_rank
        bins.append(
            {
                "first": low,
                "last": high - 1,
                "tokens": len(inside.row),
                "rollouts": len(np.unique(inside.row)),
                "divergence_share": so_far / total if total > 0 else None,
                "rank": {
                    "1": float((rank == 1).mean()),
                    "2-5": float(((rank >= 2) & (rank <= 5)).mean()),
                    "over 5": float((rank > 5).mean()),
                },
                **{name: _spread(getattr(inside, name), inside.row) for name in BINNED},
            }
        )
    return bins


def _spread(values: Array, row: Array) -> Mapping[str, float | None]:
    values = values.astype(np.float64)
    rows, index = np.unique(row, return_inverse=True)
    means = np.bincount(index, weights=values) / np.bincount(index)
    se = float(means.std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else None
    p25, p50, p75 = np.percentile(values, [25, 50, 75])
    return {"mean": float(values.mean()), "p25": float(p25), "p50": float(p50), "p75": float(p75), "se": se}


def coverage_interval(readings: TokenReadings, share: float, seed: int = 0) -> tuple[int, int]:
    """95% interval of `coverage`: the same N on resampled rollouts."""
    rows, index = np.unique(readings.row, return_inverse=True)
    mass_RN = np.zeros((len(rows), int(readings.position.max()) + 1))
    np.add.at(mass_RN, (index, readings.position), readings.divergence.astype(np.float64))
    so_far_BN = np.cumsum(resamples(len(rows), seed)[1:] @ mass_RN, axis=1)
    known_BN = so_far_BN[so_far_BN[:, -1] > 0]
    tokens_B = 1 + np.argmax(known_BN >= share * known_BN[:, -1:] - 1e-12, axis=1)
    low, high = np.percentile(tokens_B, [2.5, 97.5], method="nearest") if len(tokens_B) else (0, 0)
    return int(low), int(high)


def coverage(readings: TokenReadings, share: float) -> int:
    """The smallest N such that the first N positions hold at least `share` of all divergence (0 when there is none)."""
    mass = np.bincount(readings.position, weights=readings.divergence.astype(np.float64))
    if not mass.sum() > 0:
        return 0
    return int(np.searchsorted(np.cumsum(mass), share * mass.sum() - 1e-12) + 1)
