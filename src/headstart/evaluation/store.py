"""A whole evaluation into a folder: rows as they are graded, a summary at the end, resumable after a kill.

`settings.json` says what was asked; `rows.jsonl` holds one graded response per line; `summary.json` the readings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import Interrupted, RunFolderError, StopRequested
from headstart.evaluation.evaluator import in_order
from headstart.evaluation.readings import by_category, by_problem, check_k, summary
from headstart.evaluation.rows import read_rows, to_line
from headstart.files import LOCK, append, is_temporary, locked, write_atomic, write_json
from headstart.interfaces import OnProgress
from headstart.records import GradedResponse, Problem, Result

ROWS = "rows.jsonl"


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be graded: `samples` responses to each problem (by id), made and graded by `answer`.

    `answer(left, keep)` calls `keep` with every graded response to the problems `left`, as soon as it is graded.
    """

    task: str
    problems: Sequence[Problem]
    samples: Mapping[str, int]
    answer: Callable[[Collection[str], Callable[[GradedResponse], None]], object]


def evaluate_into(
    folder: Path, work: Work, record: Mapping[str, Any], *, k: int | None, progress: OnProgress
) -> Result:
    """Do all the work that `folder` does not hold yet, and write the summary with `record` beside it.

    A problem that a kill left with some of its samples is answered again in full. `progress` is called with (responses
    graded, responses in all). Raises ConfigError for a `k` larger than the number of samples, and RunFolderError when
    the folder holds another evaluation, before anything is graded.
    """
    check_k(k, min(work.samples.values()))
    _refuse_foreign(folder)
    with locked(folder):
        rows = _answer(folder, work, by_problem(_open(folder, record)), progress)
        result = {**summary(work.task, rows, k), **by_category(rows, work.problems), **record}
        write_json(folder / "summary.json", result)
    low, high = (f"{100 * end:.1f}" for end in result["interval"])
    accuracy = f"{result['avg_at_k']:.1%} [{low}, {high}]"
    return Result(result, f"{work.task}: {accuracy} of {result['n_problems']} problems; {folder}")


def _answer(
    folder: Path, work: Work, groups: Mapping[str, list[GradedResponse]], progress: OnProgress
) -> list[GradedResponse]:
    """All rows in order: those of whole `groups`, and those of the other problems as they are graded."""
    rows = [row for name, group in groups.items() if len(group) == work.samples.get(name) for row in group]
    whole, total = {row.problem_id for row in rows}, sum(work.samples.values())
    _write(folder, rows)
    progress(len(rows), total)
    with (folder / ROWS).open("ab", buffering=0) as file:

        def keep(row: GradedResponse) -> None:
            rows.append(row)
            append(folder / ROWS, file, to_line(row).encode())
            progress(len(rows), total)

        try:
            work.answer([name for name in work.samples if name not in whole], keep)
        except StopRequested as stop:
            done = f"stopped with {len(rows)} of {total} responses graded"
            raise Interrupted(f"{done}; the same command with --out {folder} resumes", *stop.args) from None
    rows = in_order(rows, work.problems)
    _write(folder, rows)
    return rows


def _refuse_foreign(folder: Path) -> None:
    """Raise RunFolderError when `folder` holds something other than an evaluation."""
    left = folder.iterdir() if folder.is_dir() and not (folder / "settings.json").exists() else ()
    if not all(entry.name == LOCK or is_temporary(entry) for entry in left):  # what a kill may leave
        raise RunFolderError(f"{folder} is not empty and holds no evaluation; choose another folder with --out")


def _open(folder: Path, record: Mapping[str, Any]) -> list[GradedResponse]:
    """The rows that an earlier, killed evaluation of the same `record` left in `folder`."""
    settings = folder / "settings.json"
    if not settings.exists():
        write_json(settings, record)
    elif json.loads(settings.read_text(encoding="utf-8")) != json.loads(json.dumps(record)):
        raise RunFolderError(
            f"{folder} holds an evaluation with other settings ({settings}); choose another folder with --out"
        )
    path = folder / ROWS
    return read_rows(path, torn=True) if path.exists() else []


def _write(folder: Path, rows: Sequence[GradedResponse]) -> None:
    write_atomic(folder / ROWS, "".join(map(to_line, rows)))
