"""What graded responses say: avg@k, pass@k, maj@k, their errors, and how generation ended. Pure functions of rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from headstart.errors import ConfigError
from headstart.records import GradedResponse, Problem
from headstart.stats import mean_interval, moments, percentiles

GRAM = 4
"""Words of the runs that `repetition` counts."""


def by_problem(rows: Sequence[GradedResponse]) -> dict[str, list[GradedResponse]]:
    """Rows of each problem in sample order, problems in order of first appearance."""
    groups: dict[str, list[GradedResponse]] = {}
    for row in rows:
        groups.setdefault(row.problem_id, []).append(row)
    return {name: sorted(group, key=lambda row: row.sample_index) for name, group in groups.items()}


def problem_means(rows: Sequence[GradedResponse]) -> dict[str, float]:
    """Share of right responses to each problem, problems in order of first appearance."""
    return {name: sum(r.verdict.correct for r in group) / len(group) for name, group in by_problem(rows).items()}


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


def figures(task: str, rows: Sequence[GradedResponse]) -> dict[str, Any]:
    """What every evaluation is described by, on disk and in `EvalReport`; shares in 0..1, lengths in tokens.

    `accuracy` is avg@k over problems with the 95% interval of the mean of per-problem means.
    """
    means = list(problem_means(rows).values())
    tokens = sum(row.tokens or 0 for row in rows)
    return {
        "task": task,
        "problems": len(means),
        "samples": min(Counter(row.problem_id for row in rows).values()),
        "accuracy": sum(means) / len(means),
        "interval": mean_interval(means),
        "details": detail_means(rows),
        "truncated": sum(row.stopped is False for row in rows) / len(rows),
        **{status: status_share(rows, status) for status in ("no_answer", "timeout")},
        "mean_tokens": tokens / len(rows),
        "generated_tokens": tokens,
    }


def summary(task: str, rows: Sequence[GradedResponse], k: int | None = None) -> dict[str, Any]:
    """`figures` with all further readings of an evaluation, as plain JSON types; None where unknown.

    `k` defaults to the smallest number of samples of a problem. Raises ConfigError for k larger than that.
    """
    shared, groups = figures(task, rows), list(by_problem(rows).values())
    k = k or shared["samples"]
    _, variance = moments(list(problem_means(rows).values()))
    majority = [maj for group in groups if (maj := maj_at_k(group[:k])) is not None]
    lengths = [row.tokens for row in rows if row.tokens is not None]
    elsewhere = {"truncated": None, "mean_tokens": None, "generated_tokens": None}  # responses of unknown length
    details, order = shared["details"], (10, 50, 90)
    boxed = {"first_box", "last_box"} <= details.keys()  # how much the last box costs against the first
    return {
        **shared,
        **({} if lengths else elsewhere),
        "interval": list(shared["interval"]),
        "k": k,
        "se": math.sqrt(variance / len(groups)),
        "pass_at_k": sum(pass_at_k(sum(r.verdict.correct for r in g), len(g), k) for g in groups) / len(groups),
        "maj_at_k": sum(majority) / len(groups) if majority else None,
        **{status: status_share(rows, status) for status in ("error", "bad_gold")},
        **({"first_box_minus_last_box": details["first_box"] - details["last_box"]} if boxed else {}),
        **{f"length_p{q}": v if lengths else None for q, v in zip(order, percentiles(lengths, order), strict=True)},
        "repetition": sum(repetition(row.response) for row in rows) / len(rows),
    }


def by_category(rows: Sequence[GradedResponse], problems: Sequence[Problem]) -> dict[str, Any]:
    """`categories`: problems and accuracy of each `category` in the problems' `meta`; empty where they have none."""
    names = {problem.id: problem.meta["category"] for problem in problems if "category" in problem.meta}
    means: dict[str, list[float]] = {}
    for problem, share in problem_means(rows).items():
        if problem in names:
            means.setdefault(names[problem], []).append(share)
    categories = {name: {"problems": len(m), "accuracy": sum(m) / len(m)} for name, m in means.items()}
    return {"categories": categories} if categories else {}


def status_share(rows: Sequence[GradedResponse], status: str) -> float:
    """Share of the responses whose verdict has this status, such as `no_answer`."""
    return sum(row.verdict.status == status for row in rows) / len(rows)


def detail_means(rows: Sequence[GradedResponse]) -> dict[str, float]:
    """Average of every further yes/no reading of the task, such as `plan_right`."""
    names = sorted({name for row in rows for name in row.verdict.details})
    return {name: sum(bool(r.verdict.details.get(name)) for r in rows) / len(rows) for name in names}
