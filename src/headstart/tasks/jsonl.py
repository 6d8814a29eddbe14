"""A task read from a file: prompts, reference answers, and a grader of answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from headstart.config import evaluation
from headstart.config.schema import PromptsConfig
from headstart.errors import DataError
from headstart.records import PrefixState, Problem, Verdict
from headstart.tasks.grading.answers import has_answer_mark
from headstart.tasks.grading.math import shared_grader
from headstart.tasks.grading.text import gold_number, grade_boxed, grade_exact, grade_number
from headstart.tasks.prompts import load_problems
from headstart.tasks.reading import FILE_SUFFIXES, is_file_source, stem


class JsonlTask:
    """Problems with answers from a JSONL, JSON or Parquet file; fits `interfaces.Task`.

    `chat` says whether a string prompt becomes a user message or stays plain text, as `prompts.chat` does in training.
    """

    def __init__(self, config: evaluation.JsonlTask, *, chat: bool = True) -> None:
        self.config = config
        self.chat = chat
        self.name = stem(config.path.name)

    def problems(self) -> Sequence[Problem]:
        """All problems in the file's order. Raises DataError for a row without a (usable) answer or a repeated id."""
        return self._problems

    def grade(self, problem: Problem, response: str) -> Verdict:
        """Judge one response with the configured grader."""
        gold = problem.answer or ""
        match self.config.grader:
            case "exact":
                return grade_exact(response, gold)
            case "number":
                return grade_number(response, gold)
            case "boxed":
                return grade_boxed(response, gold)
            case "math":
                return shared_grader().grade(gold, response)

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        r"""`finished` once the answer is marked (`\boxed{...}`, or `####` with a value); nothing else is known."""
        marked = self.config.grader != "exact" and has_answer_mark(prefix)
        return "finished" if marked else "unknown"

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        path = str(self.config.path)
        if not is_file_source(path):
            raise DataError(f"task file {path}: unknown file type; expected one of {', '.join(FILE_SUFFIXES)}")
        columns = {name: getattr(self.config, name) for name in ("column", "answer_column", "image_column")}
        prompts = PromptsConfig(source=path, chat=self.chat, **columns)
        problems = tuple(load_problems(prompts))
        rows: dict[str, int] = {}
        for row, problem in enumerate(problems, start=1):
            self._check_answer(problem, row)
            first = rows.setdefault(problem.id, row)
            if first != row:
                raise DataError(f"{path}, row {row}: the id {problem.id!r} is already that of row {first}")
        return problems

    def _check_answer(self, problem: Problem, row: int) -> None:
        where = f"{self.config.path}, row {row}: column {self.config.answer_column!r}"
        if problem.answer is None or not problem.answer.strip():
            raise DataError(f"{where} has no answer; every problem of a task needs one")
        if self.config.grader == "number" and gold_number(problem.answer) is None:
            raise DataError(
                f"{where} holds no number ({problem.answer.strip()[-40:]!r}); use grader: exact, boxed or math"
            )
