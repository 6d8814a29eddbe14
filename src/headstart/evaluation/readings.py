"""What graded responses say: avg@k, pass@k, maj@k, how generation ended, and two evaluations compared by problem."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from headstart.errors import ConfigError, DataError
from headstart.evaluation.rows import read_rows
from headstart.records import GradedResponse, Problem
from headstart.stats import mcnemar, mean_interval, moments, paired_difference, percentiles

GRAM = 4
"""Words of the runs that `repetition` counts."""


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


def by_problem(rows: Sequence[GradedResponse]) -> dict[str, list[GradedResponse]]:
    """Rows of each problem in sample order, problems in order of first appearance."""
    groups: dict[str, list[GradedResponse]] = {}
    for row in rows:
        groups.setdefault(row.problem_id, []).append(row)
    return {name: sorted(group, key=lambda row: row.sample_index) for name, group in groups.items()}


def correct_shares(rows: Sequence[GradedResponse]) -> dict[str, float]:
    """Share of correct responses to each problem, in order of first appearance."""
    return {name: sum(r.verdict.correct for r in g) / len(g) for name, g in by_problem(rows).items()}


def check_k(k: int | None, n: int) -> None:
    """Raise ConfigError for k > n samples: drawing with replacement would be another quantity."""
    if k is not None and not 1 <= k <= n:
        raise ConfigError(f"pass@{k} needs at least {k} samples per problem (found {n}); use k <= {n} or more samples")


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Unbiased probability that one of k samples drawn without replacement from n is right, 1 - C(n-c,k) / C(n,k)
    (arXiv 2107.03374). Raises ConfigError for k > n.
    """
    check_k(k, n)
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(group: Sequence[GradedResponse]) -> bool | None:
    """Whether the most frequent extracted answer is right (ties: the earliest); None when no response has one."""
    answers = [row.verdict.answer for row in group if row.verdict.answer is not None]
    if not answers:
        return None
    counts = Counter(answers)
    favourite = max(counts, key=lambda answer: (counts[answer], -answers.index(answer)))
    return next(row.verdict.correct for row in group if row.verdict.answer == favourite)


def repetition(text: str) -> float:
    """Share of four-word runs that occurred before in the text: 0 for varied text, near 1 for a loop."""
    words = text.split()
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def summary(task: str, rows: Sequence[GradedResponse], k: int | None = None) -> dict[str, Any]:
    """All readings of an evaluation as plain JSON types; shares in 0..1, lengths in tokens, None where unknown.

    `k` defaults to the smallest number of samples of a problem. Raises ConfigError for k larger than that.
    """
    groups = list(by_problem(rows).values())
    fewest = min(len(group) for group in groups)
    k = k or fewest
    means = list(correct_shares(rows).values())
    n, (mean, variance) = len(means), moments(means)
    majority = [maj for group in groups if (maj := maj_at_k(group[:k])) is not None]
    lengths = [row.tokens for row in rows if row.tokens is not None]
    ended = [row.stopped for row in rows if row.stopped is not None]
    low, high = mean_interval(means)
    details = detail_means(rows)
    boxed = {"first_box", "last_box"} <= details.keys()  # how much the last box costs against the first
    return {
        "task": task,
        "n_problems": n,
        "k": k,
        "samples": fewest,
        "avg_at_k": mean,
        "interval": [low, high],
        "se": math.sqrt(variance / n),
        "pass_at_k": sum(pass_at_k(sum(r.verdict.correct for r in g), len(g), k) for g in groups) / n,
        "maj_at_k": sum(majority) / n if majority else None,
        "truncated": 1.0 - sum(ended) / len(ended) if ended else None,
        **{status: status_share(rows, status) for status in ("no_answer", "timeout", "error", "bad_gold")},
        "details": details,
        **({"first_box_minus_last_box": details["first_box"] - details["last_box"]} if boxed else {}),
        "mean_tokens": sum(lengths) / len(lengths) if lengths else None,
        **{
            f"length_p{q}": value if lengths else None
            for q, value in zip((10, 50, 90), percentiles(lengths, (10, 50, 90)), strict=True)
        },
        "repetition": sum(repetition(row.response) for row in rows) / len(rows),
    }


def by_category(rows: Sequence[GradedResponse], problems: Sequence[Problem]) -> dict[str, Any]:
    """`categories`: problems and avg@k of each `category` in the problems' `meta`; empty where they have none."""
    names = {problem.id: problem.meta["category"] for problem in problems if "category" in problem.meta}
    means: dict[str, list[float]] = {}
    for problem, share in correct_shares(rows).items():
        if problem in names:
            means.setdefault(names[problem], []).append(share)
    found = {name: {"n_problems": len(m), "avg_at_k": sum(m) / len(m)} for name, m in means.items()}
    return {"categories": found} if found else {}


def status_share(rows: Sequence[GradedResponse], status: str) -> float:
    """Share of the responses whose verdict has this status, such as `no_answer`."""
    return sum(row.verdict.status == status for row in rows) / len(rows)


def detail_means(rows: Sequence[GradedResponse]) -> dict[str, float]:
    """Average of every further yes/no reading of the task, such as `plan_right`."""
    names = sorted({name for row in rows for name in row.verdict.details})
    return {name: sum(bool(r.verdict.details.get(name)) for r in rows) / len(rows) for name in names}


def compare(a: Path, b: Path) -> Comparison:
    """Compare two result folders (or their `rows.jsonl`). Raises DataError when they share no problem or differ in
    task."""
    tasks = [_task(path) for path in (a, b)]
    if None not in tasks and tasks[0] != tasks[1]:
        raise DataError(f"{a} holds task {tasks[0]!r} and {b} task {tasks[1]!r}: only one task can be compared")
    rows = [read_rows(path / "rows.jsonl" if path.is_dir() else path) for path in (a, b)]
    shares = [correct_shares(of) for of in rows]
    shared = {problem: None for problem in shares[0] if problem in shares[1]}  # in order, quick to look up
    if not shared:
        raise DataError(f"{a} and {b} share no problem ids; compare two evaluations of the same problems")
    x, y = ([of[problem] for problem in shared] for of in shares)
    difference, interval = paired_difference(x, y)
    only_a, only_b = sum(p > q for p, q in zip(x, y, strict=True)), sum(p < q for p, q in zip(x, y, strict=True))
    single = all(len(group) == 1 for of in rows for name, group in by_problem(of).items() if name in shared)
    p_value = mcnemar(only_a, only_b) if single else None
    return Comparison(len(shared), fmean(x), fmean(y), difference, interval, only_a, only_b, p_value)


def _task(path: Path) -> str | None:
    summary = path / "summary.json" if path.is_dir() else path.with_name("summary.json")
    try:
        return str(json.loads(summary.read_text(encoding="utf-8"))["task"]) if summary.exists() else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{summary}: not the summary of an evaluation ({error})") from error
