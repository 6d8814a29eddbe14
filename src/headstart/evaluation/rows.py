"""Rows of an evaluation: graded responses on disk, and responses made elsewhere that are graded here."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.errors import DataError
from headstart.interfaces import Task
from headstart.records import GradedResponse, Problem, Verdict


def to_line(row: GradedResponse) -> str:
    """One line of `rows.jsonl`, in ASCII: a response may hold half of a surrogate pair, which UTF-8 cannot."""
    return json.dumps(asdict(row)) + "\n"


def read_rows(path: Path, *, torn: bool = False) -> list[GradedResponse]:
    """The rows of a `rows.jsonl`. Raises DataError naming the line that cannot be read; with `torn`, a last line that a
    kill cut short is left out instead.
    """
    lines = _lines(path, "name a folder that `headstart evaluate` wrote")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line or (torn and number == len(lines)):
            continue
        try:
            data = json.loads(line)
            rows.append(GradedResponse(**{**data, "verdict": Verdict(**data["verdict"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a graded response ({error})") from error
    return rows


def read_responses(path: Path, problems: Collection[str]) -> dict[str, list[str]]:
    """The responses by problem id in a JSONL file of `{"id": ..., "responses": [...]}`; ids must be among `problems`.

    Raises DataError naming line and field of what is wrong.
    """
    responses: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path, "give a JSONL file of responses"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        name, texts = _fields(line, where)
        if name not in problems:
            close = difflib.get_close_matches(name, problems, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; ids look like {next(iter(problems))!r}"
            raise DataError(f"{where}: the task has no problem with id {name!r}{hint}")
        if name in responses:
            raise DataError(f"{where}: id {name!r} comes twice; put all its responses into one row")
        responses[name] = texts
    if not responses:
        raise DataError(f'{path}: no responses; expected lines like {{"id": "0", "responses": ["..."]}}')
    return responses


def grade_responses(
    task: Task,
    problems: Sequence[Problem],
    responses: Mapping[str, Sequence[str]],
    graded: Callable[[GradedResponse], None] = lambda row: None,
) -> list[GradedResponse]:
    """Every response to `problems`, graded in parallel threads; `graded` is called with each row in order."""

    def grade(problem: Problem, sample: int, text: str) -> GradedResponse:
        return GradedResponse(problem.id, sample, text, None, None, task.grade(problem, text))

    rows = []
    items = [(problem, *item) for problem in problems for item in enumerate(responses[problem.id])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(lambda item: grade(*item), items):
            rows.append(row)
            graded(row)
    return rows


def _lines(path: Path, remedy: str) -> list[str]:
    """Lines end at "\\n" only: str.splitlines would also split inside strings that hold U+2028 and the like."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error


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
