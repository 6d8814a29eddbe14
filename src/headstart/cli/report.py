"""`headstart report`: one page about a run, or about several side by side. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from headstart.reports.run import Run


def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Folders of runs or diagnoses.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: report.html in RUN_DIR, comparison.html in the first of several."),
    ] = None,
) -> None:
    """Write one self-contained HTML page, and a Markdown copy, about one run or several side by side."""
    from headstart.reports.contents import write_report

    print_report(*write_report(folders, out))


def print_report(paths: Sequence[Path], runs: Sequence[Run]) -> None:
    """The page's table and its sentences, what could not be read, and where the page lies."""
    from headstart.cli.show import say, show
    from headstart.reports.contents import TABLE_HEADER, table_rows, teacher
    from headstart.reports.page import Table
    from headstart.reports.run import labels
    from headstart.reports.wording import outcome

    rows = table_rows(list(zip(labels(runs), runs, strict=True)), teacher(runs))
    show([Table(TABLE_HEADER, rows)] if rows else [])
    for text in (*outcome(runs), *(f"{run.path}: {problem}" for run in runs for problem in run.problems)):
        say(text)
    for path in paths:
        say(f"written: {path}")
