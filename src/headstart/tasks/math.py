r"""Mathematics with a short final answer: GSM8K, MATH-500 (and the whole MATH test set), AIME.

Prompt: the system turn "Please reason step by step, and put your final answer within \boxed{}." and the problem as the
user turn; with `chat=False` the problem and that sentence as plain text, which a base model continues. Default
sampling, that of arXiv 2605.27028: 4 samples at temperature 0.7, top-p 0.95, at most 2,048 tokens. Graded by
`grading.math`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from headstart.errors import DataError
from headstart.records import Message, PrefixState, Problem, Sampling, Verdict
from headstart.tasks.benchmark import Benchmark, Row
from headstart.tasks.grading.answers import has_answer_mark, last_boxed
from headstart.tasks.grading.math import MathGrader, shared_grader
from headstart.tasks.grading.text import gold_number

SOLUTIONS = ("answer", "solution", "reference_solution")
"""Columns that may hold a worked solution."""
_NOTES = re.compile("<<[^<>]*>>")
"""GSM8K's notes for a calculator: `48/2 = <<48/2=24>>24`."""
SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."


class MathTask(Benchmark):
    """What the three have in common; fits `interfaces.Task`. `grader` defaults to the one that all math tasks share."""

    question: str = "problem"
    system: str = SYSTEM
    samples = 4
    sampling = Sampling(temperature=0.7, top_p=0.95)
    max_tokens = 2048

    def __init__(self, data: str | Path | None, *, chat: bool = True, grader: MathGrader | None = None) -> None:
        super().__init__(data, chat=chat)
        self.grader = grader or shared_grader()

    def problems(self) -> Sequence[Problem]:
        """All problems in the source's order. Raises DataError naming source, row (from 1) and column."""
        return self._problems

    def grade(self, problem: Problem, response: str) -> Verdict:
        """Judge the final answer; see `MathGrader.grade` for statuses and details."""
        return self.grader.grade(problem.answer or "", response)

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        r"""`finished` once the answer is marked (`\boxed{...}`, or `####` with a value); nothing else is known."""
        return "finished" if has_answer_mark(prefix) else "unknown"

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        return tuple(self._problem(row, index) for index, row in enumerate(self.rows()))

    def _problem(self, row: Row, index: int) -> Problem:
        question = row.text(self.question)
        if not question.strip():
            raise DataError(f"{row.where}: column {self.question!r} is empty; {row.expected}")
        identity, answer, completion = self._identity(row, index), self._gold(row), self._solution(row)
        meta = {"question": question, "references": [str(row.values.get(column) or "") for column in SOLUTIONS]}
        if not self.chat:
            text = f"{question}\n\n{self.system}\n\n"
            return Problem(id=identity, text=text, answer=answer, meta=meta, completion=completion)
        messages: tuple[Message, ...] = (
            {"role": "system", "content": self.system},
            {"role": "user", "content": question},
        )
        return Problem(id=identity, messages=messages, answer=answer, meta=meta, completion=completion)

    def _identity(self, row: Row, index: int) -> str:
        """The row's number, counted from 0: most of these benchmarks have no ids."""
        return str(index)

    def _solution(self, row: Row) -> str | None:
        """The row's worked solution, where it ends in a box as the responses are asked to."""
        worked = (row.values.get(column) for column in SOLUTIONS)
        return next((text for text in worked if isinstance(text, str) and last_boxed(text)), None)

    def _gold(self, row: Row) -> str:
        values = row.values
        for column in ("answer", "expected_answer"):
            if values.get(column) is not None and str(values[column]).strip():
                return str(values[column])
        for column in ("solution", "reference_solution"):
            if isinstance(values.get(column), str) and (box := last_boxed(values[column])):
                return box
        raise DataError(
            rf"{row.where}: neither an answer nor a solution with \\boxed{{...}}, the columns are {', '.join(values)}; "
            f"{row.expected}"
        )


class Gsm8k(MathTask):
    """Grade-school word problems, 1,319 in the test set (arXiv 2110.14168). Ids: row numbers from 0.

    Gold is the number after `####`. Train on the `train` split, 7,473 problems.
    """

    name = "gsm8k"
    splits = ("train", "test")
    hub: ClassVar = {"openai/gsm8k": ("main", "test")}
    files = "a file with the columns question and answer (ending in '#### 42'), such as test.jsonl of grade-school-math"
    training = ("openai/gsm8k (main, split train)",)
    question = "question"

    def _gold(self, row: Row) -> str:
        answer = str(row.values.get("answer") or "")
        _, _, short = answer.rpartition("####")
        if gold_number(short) is None:
            raise DataError(f"{row.where}: column 'answer' ends in no number ({answer[-40:]!r}); expected '#### 42'")
        return short.strip()

    def _solution(self, row: Row) -> str:
        """The answer column as a response: without the calculator's notes, `#### 42` as a box."""
        worked, _, short = row.text("answer").rpartition("####")
        return f"{_NOTES.sub('', worked).strip()}\nThe answer is \\boxed{{{short.strip()}}}."


class Math500(MathTask):
    r"""Competition problems: the 500 of arXiv 2305.20050, or all 5,000 of the MATH test set (arXiv 2103.03874).

    Ids: row numbers from 0. Gold is `answer`, else the last `\boxed{...}` of `solution`. Train on MATH train without
    the 500 (7,474 problems overlap with none of them) or on NuminaMath-CoT; never on MATH test, which holds the 500.
    """

    name = "math500"
    splits = ("train", "test")
    hub: ClassVar = {
        "HuggingFaceH4/MATH-500": (None, "test"),
        "DigitalLearningGmbH/MATH-lighteval": (None, "test"),
    }
    files = "a file with the columns problem and answer (or solution), such as math500.jsonl or MATH's test.jsonl"
    training = ("DigitalLearningGmbH/MATH-lighteval (split train)", "AI-MO/NuminaMath-CoT (split train)")


class Aime(MathTask):
    """AIME 2024 or 2025, 30 problems each, answers 0 to 999. Ids: the rows' own, else row numbers from 0.

    With 30 problems the 95% interval is about 10 points either way, however many samples are drawn. There is no
    training set; NuminaMath-CoT is the usual one (check the overlap: it holds earlier AIME problems).
    """

    name = "aime"
    hub: ClassVar = {"HuggingFaceH4/aime_2024": (None, "train"), "math-ai/aime25": (None, "test")}
    files = "a file with the columns problem and answer (or expected_answer), such as aime24.jsonl or aime25.jsonl"
    training = ("AI-MO/NuminaMath-CoT (split train)",)

    def _identity(self, row: Row, index: int) -> str:
        return str(row.values.get("id", index))


MATH: dict[str, type[MathTask]] = {task.name: task for task in (Gsm8k, Math500, Aime)}
"""The tasks by name."""
