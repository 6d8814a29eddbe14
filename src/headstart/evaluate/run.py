"""A whole evaluation into a folder: rows as they are graded, a summary at the end, resumable after a kill.

`settings.json` says what was asked; `rows.jsonl` holds one graded response per line; `summary.json` the readings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.errors import RunFolderError
from headstart.evaluate.evaluator import TaskEvaluator
from headstart.evaluate.readings import by_problem, summary
from headstart.evaluate.rows import read_rows, to_line
from headstart.records import GradedResponse

SLICE = 8
"""Batches between two writes: rows lost to a kill, against idle places at the end of each slice."""


def evaluate_into(
    folder: Path,
    evaluator: TaskEvaluator,
    record: Mapping[str, Any],
    *,
    k: int | None,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Evaluate every question that `folder` does not hold yet, and write the summary with `record` beside it.

    `progress` hears (problems done, problems in all). Raises RunFolderError when the folder holds another evaluation.
    """
    questions = evaluator.questions
    rows = open_folder(folder, record)
    groups = {name: group for name, group in by_problem(rows).items() if len(group) == questions.settings.samples}
    rows = [row for group in groups.values() for row in group]
    waiting = [p for p in questions.prompts if p.problem_id not in groups]
    size = max(1, SLICE * questions.settings.batch_size // questions.settings.samples)
    total = len(questions.prompts)
    progress(total - len(waiting), total)
    rewrite(folder / "rows.jsonl", rows)
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        for start in range(0, len(waiting), size):
            new = evaluator.rows(waiting[start : start + size])
            file.write("".join(map(to_line, new)))
            file.flush()
            rows += new
            progress(total - len(waiting) + start + len(waiting[start : start + size]), total)
    order = {problem.id: place for place, problem in enumerate(questions.problems)}
    rows.sort(key=lambda row: (order[row.problem_id], row.sample_index))
    rewrite(folder / "rows.jsonl", rows)
    return write_summary(folder, questions.task.name, rows, record, k)


def open_folder(folder: Path, record: Mapping[str, Any]) -> list[GradedResponse]:
    """The rows that an earlier, killed evaluation of the same `record` left in `folder`, which is made if need be."""
    settings = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if settings.exists():
            if json.loads(settings.read_text(encoding="utf-8")) != json.loads(json.dumps(record)):
                raise RunFolderError(
                    f"{folder} holds an evaluation with other settings ({settings}); choose another folder with --out"
                )
        elif any(folder.iterdir()):
            raise RunFolderError(f"{folder} is not empty and holds no evaluation; choose another folder with --out")
        else:
            rewrite_text(settings, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written: {error.strerror}; choose another folder") from error
    path = folder / "rows.jsonl"
    return read_rows(path, torn=True) if path.exists() else []


def write_summary(
    folder: Path, task: str, rows: Sequence[GradedResponse], record: Mapping[str, Any], k: int | None
) -> dict[str, Any]:
    """`summary.json`: all readings, then what was asked."""
    result = {**summary(task, rows, k), **record}
    rewrite_text(folder / "summary.json", json.dumps(result, indent=1) + "\n")
    return result


def rewrite(path: Path, rows: Sequence[GradedResponse]) -> None:
    """The rows as the whole file, replaced in one move."""
    rewrite_text(path, "".join(map(to_line, rows)))


def rewrite_text(path: Path, text: str) -> None:
    """`text` as the whole file, replaced in one move."""
    temporary = path.with_name(path.name + ".incomplete")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
