"""Two evaluations of the same problems, compared pair by pair."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headstart.errors import DataError
from headstart.evaluation.readings import by_problem
from headstart.evaluation.rows import read_rows
from headstart.stats import mcnemar, paired_difference


@dataclass(frozen=True, slots=True)
class Comparison:
    """Accuracy of A minus accuracy of B over the problems both have.

    `interval` is the paired 95% interval. `mcnemar` is the exact two-sided p-value over problems that only one of the
    two gets right; None with several samples per problem.
    """

    problems: int
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    only_a: int
    only_b: int
    mcnemar: float | None


def compare(a: Path, b: Path) -> Comparison:
    """Compare two result folders (or their `rows.jsonl`). Raises DataError when they share no problem or differ in
    task."""
    tasks = [_task(path) for path in (a, b)]
    if None not in tasks and tasks[0] != tasks[1]:
        raise DataError(f"{a} holds task {tasks[0]!r} and {b} task {tasks[1]!r}: only one task can be compared")
    means = [_means(path) for path in (a, b)]
    shared = [problem for problem in means[0] if problem in means[1]]
    if not shared:
        raise DataError(f"{a} and {b} share no problem ids; compare two evaluations of the same problems")
    x, y = ([m[problem][0] for problem in shared] for m in means)
    single = all(m[problem][1] == 1 for m in means for problem in shared)
    difference, interval = paired_difference(x, y)
    gaps = np.array(x) - np.array(y)
    only_a, only_b = int((gaps > 0).sum()), int((gaps < 0).sum())
    return Comparison(
        problems=len(shared),
        a=float(np.mean(x)),
        b=float(np.mean(y)),
        difference=difference,
        interval=interval,
        only_a=only_a,
        only_b=only_b,
        mcnemar=mcnemar(only_a, only_b) if single else None,
    )


def _means(path: Path) -> dict[str, tuple[float, int]]:
    """Share of right responses and number of samples of each problem."""
    groups = by_problem(read_rows(path / "rows.jsonl" if path.is_dir() else path))
    return {name: (sum(r.verdict.correct for r in rows) / len(rows), len(rows)) for name, rows in groups.items()}


def _task(path: Path) -> str | None:
    summary = path / "summary.json" if path.is_dir() else path.with_name("summary.json")
    try:
        return str(json.loads(summary.read_text(encoding="utf-8"))["task"]) if summary.exists() else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{summary}: not the summary of an evaluation ({error})") from error
