"""`headstart compare`: a study's arms from the same start, at equal cost, with one table and one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.arguments import file_and_overrides
from headstart.cli.show import progress_bar, say, show
from headstart.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from headstart.config.loader import Study


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
    import json

    from rich.console import Console

    from headstart.config.loader import load_study
    from headstart.files import write_atomic
    from headstart.reports.page import write
    from headstart.study.page import accuracy_table, cost_table, outcome, study_page
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
    show([accuracy_table(record), cost_table(record)], console)
    for line in (*outcome(record), *(f"written: {page}" for page in (*pages, folder / "study.json"))):
        say(line, console)


def _run(study: Study, folder: Path, jobs: int | None, console: Console) -> None:
    """The cells, with a bar on a terminal and a line each elsewhere."""
    with console.status("Loading torch and transformers ..."):
        from headstart.study.run import run_study

    with progress_bar("runs", console) as bar:

        def finished(done: int, total: int, text: str = "", /) -> None:
            bar(done, total, text)
            if not console.is_terminal:
                say(f"{done}/{total} {text}", console)

        run_study(study, folder, jobs, finished)
