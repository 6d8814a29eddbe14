"""Responses made elsewhere, graded here: rows of `{"id": ..., "responses": [...]}` with the benchmark's own ids."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headstart.errors import DataError
from headstart.interfaces import Task
from headstart.records import GradedResponse, Problem


def grade_file(task: Task, path: Path) -> list[GradedResponse]:
    """Every response in the JSONL file at `path`, graded. Raises DataError naming line and field of what is wrong."""
    problems = {problem.id: problem for problem in task.problems()}
    items = list(_responses(path, problems))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda item: _grade(task, *item), items))


def _grade(task: Task, problem: Problem, place: int, response: str) -> GradedResponse:
    return GradedResponse(problem.id, place, response, None, None, task.grade(problem, response))


def _responses(path: Path, problems: dict[str, Problem]) -> Iterator[tuple[Problem, int, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a JSONL file of responses") from error
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, responses = _fields(line, f"{path}, line {number}")
        if name not in problems:
            close = difflib.get_close_matches(name, problems, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; ids look like {next(iter(problems))!r}"
            raise DataError(f"{path}, line {number}: the task has no problem with id {name!r}{hint}")
        if name in seen:
            raise DataError(f"{path}, line {number}: id {name!r} comes twice; put all its responses into one row")
        seen.add(name)
        for place, response in enumerate(responses):
            yield problems[name], place, response
    if not seen:
        raise DataError(f'{path}: no responses; expected lines like {{"id": "0", "responses": ["..."]}}')


def _fields(line: str, where: str) -> tuple[str, list[str]]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at character {error.pos})") from error
    if not isinstance(row, dict) or "id" not in row:
        raise DataError(f"{where}: expected an object with id and responses")
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses or not all(isinstance(r, str) for r in responses):
        raise DataError(f"{where}: field 'responses' must be a non-empty list of strings")
    return str(row["id"]), responses
