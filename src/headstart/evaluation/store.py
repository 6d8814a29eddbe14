"""A whole evaluation into a folder: rows as they are graded, a summary at the end, resumable after a kill.

`settings.json` says what was asked; `rows.jsonl` holds one graded response per line; `summary.json` the readings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import RunFolderError
from headstart.evaluation.evaluator import in_order
from headstart.evaluation.readings import by_category, by_problem, check_k, summary
from headstart.evaluation.rows import read_rows, to_line
from headstart.files import write_atomic
from headstart.interfaces import OnProgress
from headstart.records import GradedResponse, Problem, Result

ROWS = "rows.jsonl"


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be graded: `samples` responses to each problem (by id), which `answer` makes and judges.

    `answer(left, keep)` tells `keep` every graded response to the problems `left`, as soon as it is judged.
    """

    task: str
    problems: Sequence[Problem]
    samples: Mapping[str, int]
    answer: Callable[[Collection[str], Callable[[GradedResponse], None]], object]


def evaluate_into(
    folder: Path, work: Work, record: Mapping[str, Any], *, k: int | None, progress: OnProgress
) -> Result:
    """Do all the work that `folder` does not hold yet, and write the summary with `record` beside it.

    A problem that a kill left with some of its samples is asked again. `progress` hears (responses graded, responses in
    all). Raises ConfigError for a `k` larger than the number of samples, and RunFolderError when the folder holds
    another evaluation, before anything is graded.
    """
    check_k(k, min(work.samples.values()))
    groups = by_problem(_open(folder, record))
    rows = [row for name, group in groups.items() if len(group) == work.samples.get(name) for row in group]
    whole, total = {row.problem_id for row in rows}, sum(work.samples.values())
    _rewrite(folder, rows)
    progress(len(rows), total)
    with (folder / ROWS).open("a", encoding="utf-8") as file:

        def keep(row: GradedResponse) -> None:
            rows.append(row)
            file.write(to_line(row))
            file.flush()
            progress(len(rows), total)

        work.answer([name for name in work.samples if name not in whole], keep)
    rows = in_order(rows, work.problems)
    _rewrite(folder, rows)
    result = {**summary(work.task, rows, k), **by_category(rows, work.problems), **record}
    write_atomic(folder / "summary.json", json.dumps(result, indent=1) + "\n")
    low, high = result["interval"]
    text = (
        f"{work.task}: {result['avg_at_k']:.1%} [{100 * low:.1f}, {100 * high:.1f}] of {result['n_problems']} problems"
    )
    return Result(result, f"{text}; {folder}")


def _open(folder: Path, record: Mapping[str, Any]) -> list[GradedResponse]:
    """The rows that an earlier, killed evaluation of the same `record` left in `folder`, which is made if need be."""
    settings = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if settings.exists():
            if json.loads(settings.read_text(encoding="utf-8")) != json.loads(json.dumps(record)):
                raise RunFolderError(
                    f"{folder} holds an evaluation with other settings ({settings}); choose another folder with --out"
                )
        elif any(not entry.name.endswith(".tmp") for entry in folder.iterdir()):  # what a kill may leave
            raise RunFolderError(f"{folder} is not empty and holds no evaluation; choose another folder with --out")
        else:
            write_atomic(settings, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written: {error.strerror}; choose another folder") from error
    path = folder / ROWS
    return read_rows(path, torn=True) if path.exists() else []


def _rewrite(folder: Path, rows: Sequence[GradedResponse]) -> None:
    """The rows as the whole file, replaced in one move."""
    write_atomic(folder / ROWS, "".join(map(to_line, rows)))
