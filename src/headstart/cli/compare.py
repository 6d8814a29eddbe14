"""`headstart compare`: a study's arms from the same start, at equal cost, with one table and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.cli.arguments import file_and_overrides
from headstart.cli.show import progress_bar, say, show
from headstart.errors import ConfigError


def compare_command(
    arguments: Annotated[
        list[str], typer.Argument(metavar="STUDY.yaml [key=value ...]", help="A study and overrides on top of it.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to make, or to resume. Default: runs/<study's name>.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: one for each GPU, or one on a CPU.")
    ] = None,
) -> None:
    """Run every arm of a study with every seed, and compare them at equal steps, tokens and seconds.

    The same command resumes a study that was stopped.
    """
    from rich.console import Console

    from headstart.config.loader import load_study
    from headstart.study.page import accuracy_table, cost_table

    path, overrides = file_and_overrides(arguments)
    if path is None:
        raise ConfigError("which study? Give a file, such as studies/horizon.yaml, and overrides after it")
    folder, console = out or Path("runs") / path.stem, Console()
    load_study(path, overrides)  # what is wrong in it is said before torch is loaded
    with console.status("Loading torch and transformers ..."):
        from headstart.study.run import compare

    with progress_bar("runs", console) as bar:

        def finished(done: int, total: int, text: str = "", /) -> None:
            bar(done, total, text)
            if not console.is_terminal:
                say(f"{done}/{total} {text}", console)

        record = compare(path, overrides, out=folder, jobs=jobs, progress=finished)
    show([accuracy_table(record), cost_table(record)], console)
    say(str(record), console)
    for name in ("study.html", "study.md", "study.json"):
        say(f"written: {folder / name}", console)
