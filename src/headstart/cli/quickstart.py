"""`headstart quickstart`: the whole method on the bundled tiny pair, with a table and a page at the end."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headstart.cli.arguments import dated_folder


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
    from headstart.cli.show import say, show
    from headstart.errors import RunFolderError
    from headstart.reports.contents import write_report
    from headstart.reports.readings import reading_blocks

    folder = out or dated_folder("quickstart")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists already; choose another folder with --out")
    console = Console()
    with console.status("Loading torch and transformers ..."):
        from headstart.quickstart import FOLDERS, quickstart

    results = quickstart(folder, pair.value, seed, lambda text: say(text, console, "bold"))
    show(reading_blocks("diagnose/decay", {"diagnose/decay": results["decay"]}), console)
    print_report(*write_report([folder / name for name in FOLDERS], folder / "report.html"))
    say(f"whole quickstart: {results['seconds']:.0f} s", console)
