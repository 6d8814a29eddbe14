"""A whole evaluation into a folder: rows as they are graded, a summary at the end, resumable after a kill.

`settings.json` says what was asked; `rows.jsonl` holds one graded response per line; `summary.json` the readings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.errors import RunFolderError
from headstart.evaluate.evaluator import TaskEvaluator, in_order
from headstart.evaluate.readings import by_category, by_problem, summary
from headstart.evaluate.rows import read_rows, to_line
from headstart.files import write_atomic
from headstart.records import GradedResponse, Problem


def evaluate_into(
    folder: Path,
    evaluator: TaskEvaluator,
    record: Mapping[str, Any],
    *,
    k: int | None,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Evaluate every question that `folder` does not hold yet, and write the summary with `record` beside it.

    A problem that a kill left with some of its samples is asked again. `progress` hears (responses graded, responses in
    all). Raises RunFolderError when the folder holds another evaluation.
    """
    q = evaluator.questions
    old = open_folder(folder, record)
    whole = {name: group for name, group in by_problem(old).items() if len(group) == q.settings.samples}
    rows = [row for group in whole.values() for row in group]
    rewrite(folder / "rows.jsonl", rows)
    total = len(q.prompts) * q.settings.samples
    progress(len(rows), total)
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:

        def keep(row: GradedResponse) -> None:
            rows.append(row)
            file.write(to_line(row))
            file.flush()
            progress(len(rows), total)

        evaluator.rows([prompt for prompt in q.prompts if prompt.problem_id not in whole], keep)
    rows = in_order(rows, q.problems)
    rewrite(folder / "rows.jsonl", rows)
    return write_summary(folder, q.task.name, rows, q.problems, record, k)


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
            write_atomic(settings, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written: {error.strerror}; choose another folder") from error
    path = folder / "rows.jsonl"
    return read_rows(path, torn=True) if path.exists() else []


def write_summary(
    folder: Path,
    task: str,
    rows: Sequence[GradedResponse],
    problems: Sequence[Problem],
    record: Mapping[str, Any],
    k: int | None,
) -> dict[str, Any]:
    """`summary.json`: all readings, then what was asked."""
    result = {**summary(task, rows, k), **by_category(rows, problems), **record}
    write_atomic(folder / "summary.json", json.dumps(result, indent=1) + "\n")
    return result


def rewrite(path: Path, rows: Sequence[GradedResponse]) -> None:
    """The rows as the whole file, replaced in one move."""
    write_atomic(path, "".join(map(to_line, rows)))
