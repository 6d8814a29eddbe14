"""The page of one run, or of several side by side: which sections, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from headstart.records import Result
from headstart.reports.comparison import share_eval
from headstart.reports.page import Block, Code, Fold, Page, Section, Text, write
from headstart.reports.readings import reading_sections
from headstart.reports.results import Named, before_and_after, cost_section, training_section, what_was_run
from headstart.reports.run import Record, Run, labels, read_run
from headstart.reports.wording import outcome

REMEDIES = (
    ("diagnose/preflight", "headstart preflight {run}/config.yaml --out {run}", "whether the pair fits together"),
    ("diagnose/decay", "headstart diagnose {run}/config.yaml --out {run}", "where to stop"),
    ("explain/cascade", "headstart explain {run}", "what training did beyond the accuracy"),
)


def write_report(paths: Sequence[Path], out: Path | None = None) -> tuple[list[Path], list[Run]]:
    """Read the run folders, write the page and its Markdown twin; returns their paths and the runs.

    `out` is the page's file: by default `report.html` in the folder of a single run, `comparison.html` in the first of
    several. Raises RunFolderError when a folder holds no run or the page cannot be written.
    """
    runs = [read_run(path) for path in paths]
    place = out or runs[0].path / ("report.html" if len(runs) == 1 else "comparison.html")
    return write(build_page(runs), place), runs


def report(folders: Path | str | Sequence[Path | str], out: Path | str | None = None) -> Result:
    """One self-contained HTML page, and a Markdown twin, about a run or several side by side; see `write_report`.

    `pages` are the files that were written; `str(result)` is the outcome in words.
    """
    several = [folders] if isinstance(folders, str | Path) else list(folders)
    pages, runs = write_report([Path(folder) for folder in several], None if out is None else Path(out))
    return Result({"pages": [str(page) for page in pages]}, "\n".join(outcome(runs)))


def build_page(runs: Sequence[Run]) -> Page:
    """The content of the page. Folders without training, such as those of a diagnosis, add their readings."""
    named = list(zip(labels(runs), runs, strict=True))
    trained = [(name, run) for name, run in named if run.steps or run.points] or named
    evaluated = [(name, run) for name, run in trained if run.points]
    lead: list[Block] = [Text(_subtitle(named), "soft"), *(Text(said, "outcome") for said in outcome(runs))]
    lead += [Text(f"{run.path.name}: {problem}", "warning") for run in runs for problem in run.problems]
    sections: list[Section] = []
    if evaluated:
        sections += [_before_and_after(evaluated), cost_section(evaluated, teacher(runs))]
    if any(run.steps for _, run in trained):
        sections.append(training_section(trained))
    sections += [what_was_run(trained), *reading_sections(named)]
    sections += _missing(trained[0][1].path, {name for run in runs for name in run.readings})
    title = trained[0][0] if len(trained) == 1 else f"{len(trained)} runs compared"
    return Page(f"Headstart: {title}", lead, sections)


def teacher(runs: Sequence[Run]) -> tuple[str, Record] | None:
    """The teacher's own accuracy with its interval and a name that says on what it was measured; None when nowhere."""
    for run in runs:
        with suppress(KeyError, TypeError):
            found = share_eval(run.readings["diagnose/decay"]["teacher"])
            if found is not None:
                return "teacher (in the diagnosis)", found
    return None


def _before_and_after(runs: Named) -> Section:
    """A table for the first run, those of the others in folds."""
    note = "Paired: both evaluations drew the same problems with the same random numbers; intervals are over problems."
    (name, first), *others = runs
    blocks: list[Block] = [before_and_after(name, first.points), Text(note, "soft")]
    blocks += [Fold(other, [before_and_after(other, run.points)]) for other, run in others]
    return Section("Before and after", blocks)


def _subtitle(named: Named) -> str:
    """Who learned from whom, in which folders."""
    first = named[0][1]
    student, master = (first.setting(who, "path") or "unknown" for who in ("student", "teacher"))
    folders = ", ".join(str(run.path.resolve().name) for _, run in named)
    seeds = ", ".join(sorted({str(run.setting("training", "seed")) for _, run in named}))
    started = first.environment.get("started", "at an unknown time")
    return f"{student} learning from {master}; seed {seeds}; started {started}; from {folders}."


def _missing(run: Path, have: set[str]) -> list[Section]:
    """What would add to this page, and the command for it; nothing when everything is there."""
    lacking = [(command, what) for name, command, what in REMEDIES if name not in have]
    blocks: list[Block] = []
    for command, what in lacking:
        blocks += [Text(f"To know {what}:"), Code(command.format(run=run))]
    return [Section("What is not here", blocks)] if blocks else []
