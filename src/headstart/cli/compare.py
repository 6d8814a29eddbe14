"""`headstart compare`: a study's arms from the same start, at equal cost, with one table and one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.arguments import file_and_overrides
from headstart.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from headstart.config.loader import Study


def compare_command(
    arguments: Annotated[
        list[str], typer.Argument(metavar="STUDY.yaml [key=value ...]", help="A study and overrides on top of it.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to make or go on with. Default: runs/<study's name>.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: one for each GPU, or one on a CPU.")
    ] = None,
) -> None:
    """Run every arm of a study with every seed, and compare them at equal steps, tokens and seconds.

    The same command goes on with a study that was stopped.
    """
    import json

    from rich.console import Console

    from headstart.config.loader import load_study
    from headstart.files import write_atomic
    from headstart.reports.page import write
    from headstart.study.page import outcome, study_page
    from headstart.study.table import collect

    path, overrides = file_and_overrides(arguments)
    if path is None:
        raise ConfigError("which study? Give a file, such as studies/horizon.yaml, and overrides after it")
    study, folder, console = load_study(path, overrides), out or Path("runs") / path.stem, Console()
    _run(study, folder, jobs, console)
    record = collect(study.config, folder)
    write_atomic(folder / "study.json", json.dumps(record, ensure_ascii=False) + "\n")
    text = path.read_text(encoding="utf-8") + "".join(f"# {override}\n" for override in overrides)
    pages = write(study_page(record, text), folder / "study.html")
    _print(record, console)
    for line in (*outcome(record), *(f"written: {page}" for page in (*pages, folder / "study.json"))):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _run(study: Study, folder: Path, jobs: int | None, console: Console) -> None:
    """The cells, with a bar on a terminal and a line each elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with console.status("Loading torch and transformers ..."):
        from headstart.study.run import run_study

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        line = bar.add_task("runs", total=None)

        def finished(name: str, done: int, total: int) -> None:
            bar.update(line, description=name, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"{done}/{total} {name}", soft_wrap=True, highlight=False, markup=False)

        run_study(study, folder, jobs, finished)


def _print(record: dict[str, object], console: Console) -> None:
    """Both tables; the intervals are on the page: this fits a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from headstart.study.page import accuracy_table, cost_table

    for found in (accuracy_table(record, intervals=False), cost_table(record)):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
        for place, name in enumerate(found.header):
            table.add_column(name, justify="right" if place else "left")
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
