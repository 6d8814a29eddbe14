"""What lm-eval calls with a row of the benchmark and the one text it decoded: Headstart's verdict on it."""

from collections.abc import Mapping, Sequence
from typing import Any

from headstart.tasks.grading.math import shared_grader


def graded(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    verdict = shared_grader().grade(row["answer"], responses[0])
    return {"accuracy": float(verdict.correct), "no_answer": float(verdict.status == "no_answer")}
