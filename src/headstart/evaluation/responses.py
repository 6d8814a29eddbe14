"""Responses made elsewhere, graded here: rows of `{"id": ..., "responses": [...]}` with the benchmark's own ids."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headstart.errors import DataError
from headstart.interfaces import Task
from headstart.records import GradedResponse, Problem


def read_responses(path: Path, problems: Collection[str]) -> dict[str, list[str]]:
    """The responses in the JSONL file at `path`, by id, which must be one of `problems`.

    Raises DataError naming line and field of what is wrong.
    """
    try:
        # Only "\n" ends a line: str.splitlines would also split inside strings that hold U+2028 and the like.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a JSONL file of responses") from error
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, responses = _fields(line, f"{path}, line {number}")
        if name not in problems:
            close = difflib.get_close_matches(name, problems, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; ids look like {next(iter(problems))!r}"
            raise DataError(f"{path}, line {number}: the task has no problem with id {name!r}{hint}")
        if name in found:
            raise DataError(f"{path}, line {number}: id {name!r} comes twice; put all its responses into one row")
        found[name] = responses
    if not found:
        raise DataError(f'{path}: no responses; expected lines like {{"id": "0", "responses": ["..."]}}')
    return found


def grade_responses(
    task: Task,
    problems: Sequence[Problem],
    responses: Mapping[str, Sequence[str]],
    graded: Callable[[GradedResponse], None] = lambda row: None,
) -> list[GradedResponse]:
    """Every response to `problems`, judged in threads side by side; `graded` hears each in its turn."""
    rows = []
    items = [(problem, *item) for problem in problems for item in enumerate(responses[problem.id])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(lambda item: _grade(task, *item), items):
            rows.append(row)
            graded(row)
    return rows


def _grade(task: Task, problem: Problem, place: int, response: str) -> GradedResponse:
    return GradedResponse(problem.id, place, response, None, None, task.grade(problem, response))


def _fields(line: str, where: str) -> tuple[str, list[str]]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or "id" not in row:
        raise DataError(f"{where}: expected an object with id and responses")
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses or not all(isinstance(r, str) for r in responses):
        raise DataError(f"{where}: field 'responses' must be a non-empty list of strings")
    return str(row["id"]), responses
