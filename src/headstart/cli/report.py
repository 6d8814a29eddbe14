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
    """Write one self-contained HTML page, and a Markdown twin, about one run or several side by side."""
    from headstart.reports.contents import write_report

    print_report(*write_report(folders, out))


def print_report(paths: Sequence[Path], runs: Sequence[Run]) -> None:
    """The page's table and its sentences, what could not be read, and where the page lies."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from headstart.reports.contents import teacher
    from headstart.reports.results import TABLE_HEADER, table_rows
    from headstart.reports.run import labels
    from headstart.reports.wording import outcome

    console = Console()
    rows = table_rows(list(zip(labels(runs), runs, strict=True)), teacher(runs))
    if rows:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column(TABLE_HEADER[0])
        for name in ("steps", "accuracy", *TABLE_HEADER[3:]):  # its interval is on the page: this fits 80 columns
            table.add_column(name, justify="right", no_wrap=True)
        for name, steps, accuracy, *others in rows:
            table.add_row(name, steps, accuracy.split(" [")[0], *others)
        console.print(table)
    for text in (*outcome(runs), *(f"{run.path}: {problem}" for run in runs for problem in run.problems)):
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    for path in paths:
        console.print(f"written: {path}", soft_wrap=True, highlight=False, markup=False)
