"""The folder of an evaluation: rows as they are graded, a summary at the end, resumable after a kill, comparable.

`settings.json` says what was asked; `rows.jsonl` holds one graded response per line; `summary.json` the readings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from headstart.config.differences import keep_settings
from headstart.errors import DataError, Interrupted, RunFolderError, StopRequested
from headstart.evaluation.evaluator import in_order
from headstart.evaluation.readings import by_category, by_problem, check_k, problem_means, summary
from headstart.files import LOCK, append, cut_torn_line, is_temporary, locked, write_atomic, write_json
from headstart.interfaces import OnProgress
from headstart.records import GradedResponse, Problem, Result, Verdict
from headstart.stats import Estimate, cut_note, mcnemar, paired_difference
from headstart.tasks import reading

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
    accuracy = Estimate(result["accuracy"], *result["interval"])
    note = cut_note(result["truncated"], record.get("settings", {}).get("max_tokens"))
    text = f"{work.task}: {accuracy:.1%} of {result['problems']} problems" + (f" ({note})" if note else "")
    return Result(result, f"{text}; {folder}")


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
    remedy = "choose another folder with --out"
    keep_settings(folder / "settings.json", f"{folder} holds an evaluation", record, remedy)
    cut_torn_line(folder / ROWS)
    return read_rows(folder / ROWS) if (folder / ROWS).exists() and (folder / ROWS).stat().st_size else []


def _write(folder: Path, rows: Sequence[GradedResponse]) -> None:
    write_atomic(folder / ROWS, "".join(map(to_line, rows)))


def to_line(row: GradedResponse) -> str:
    """One line of `rows.jsonl`, in ASCII: a response may hold half of a surrogate pair, which UTF-8 cannot."""
    return json.dumps(asdict(row)) + "\n"


def read_rows(path: Path) -> list[GradedResponse]:
    """The rows of a `rows.jsonl`. Raises DataError naming the row that cannot be read."""
    rows = []
    for number, row in enumerate(reading.read_rows(str(path)), start=1):
        try:
            rows.append(GradedResponse(**{**row, "verdict": Verdict(**row["verdict"])}))
        except (TypeError, KeyError) as error:
            raise DataError(f"{path}, row {number}: not a graded response ({error})") from error
    return rows


@dataclass(frozen=True, slots=True)
class Comparison:
    """Accuracy of A minus accuracy of B over the problems both have.

    `interval` is the paired 95% interval. `mcnemar` is the exact two-sided p-value over problems that only one of the
    two gets right; None with several samples per problem.
    """

    problems: int
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    only_a: int
    only_b: int
    mcnemar: float | None


def compare(a: Path, b: Path) -> Comparison:
    """Compare two result folders (or their `rows.jsonl`). Raises DataError when they share no problem or differ in
    task."""
    tasks = [_task(path) for path in (a, b)]
    if None not in tasks and tasks[0] != tasks[1]:
        raise DataError(f"{a} holds task {tasks[0]!r} and {b} task {tasks[1]!r}: only one task can be compared")
    rows = [read_rows(path / "rows.jsonl" if path.is_dir() else path) for path in (a, b)]
    shares = [problem_means(of) for of in rows]
    shared = {problem: None for problem in shares[0] if problem in shares[1]}  # in order, quick to look up
    if not shared:
        raise DataError(f"{a} and {b} share no problem ids; compare two evaluations of the same problems")
    x, y = ([of[problem] for problem in shared] for of in shares)
    difference, interval = paired_difference(x, y)
    only_a, only_b = sum(p > q for p, q in zip(x, y, strict=True)), sum(p < q for p, q in zip(x, y, strict=True))
    single = all(len(group) == 1 for of in rows for name, group in by_problem(of).items() if name in shared)
    p_value = mcnemar(only_a, only_b) if single else None
    return Comparison(len(shared), fmean(x), fmean(y), difference, interval, only_a, only_b, p_value)


def _task(path: Path) -> str | None:
    summary = path / "summary.json" if path.is_dir() else path.with_name("summary.json")
    try:
        return str(json.loads(summary.read_text(encoding="utf-8"))["task"]) if summary.exists() else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{summary}: not the summary of an evaluation ({error})") from error
