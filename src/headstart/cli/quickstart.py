"""`headstart quickstart`: the whole method on the bundled tiny pair, with a table and a page at the end."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


class PairName(StrEnum):
    """The bundled students: a strong and a weak executor."""

    strong = "strong"
    weak = "weak"


def quickstart_command(
    pair: Annotated[
        PairName, typer.Option(help="weak: the student that executes worse, where early stopping loses.")
    ] = PairName.strong,
    out: Annotated[Path | None, typer.Option(help="Folder to make. Default: runs/quickstart-<time>.")] = None,
    seed: Annotated[int, typer.Option(help="Keys every random draw.")] = 0,
) -> None:
    """Distil a bundled student in about two minutes, with early stopping and with full rollouts, and compare."""
    from rich.console import Console

    from headstart.cli.report import print_report
    from headstart.errors import RunFolderError
    from headstart.reports.contents import write_report

    folder = out or Path("runs") / f"quickstart-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists already; choose another folder with --out")
    console = Console()
    with console.status("Loading torch and transformers ..."):
        from headstart.quickstart import FOLDERS, quickstart

    def say(text: str) -> None:
        console.print(text, style="bold", soft_wrap=True, highlight=False)

    results = quickstart(folder, pair.value, seed, say)
    console.print(_decay_table(results), "")
    print_report(*write_report([folder / name for name in FOLDERS], folder / "report.html"))
    console.print(f"whole quickstart: {results['seconds']:.0f} s")


def _decay_table(results: dict[str, Any]) -> Table:
    """How often the teacher is right when it continues prefixes of growing length."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def share(entry: dict[str, Any]) -> str:
        return f"{entry['successes'] / entry['n']:.0%} of {entry['n']}" if entry["n"] else "-"

    columns = ("after_student", "after_clean", "after_wrong", "after_own")
    titles = ("the student's", "still clean", "already wrong", "its own")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title="the teacher's accuracy when it continues ...")
    for name in ("prefix", *titles):
        table.add_column(name, justify="right")
    for point in results["decay"]["points"]:
        table.add_row(str(point["prefix_tokens"]), *(share(point[column]) for column in columns))
    return table
