"""`headstart preflight`: does this pair fit together, before a run is paid for?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.arguments import file_and_overrides
from headstart.errors import ConfigError, RunFolderError
from headstart.files import make_folder

if TYPE_CHECKING:
    from rich.table import Table

    from headstart.checks.findings import Preflight

STYLES = {"ok": "green", "note": "cyan", "warning": "bold yellow", "blocking": "bold red"}


def preflight_command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN.yaml [section.key=value ...]", help="A configuration and overrides on top of it."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write diagnose/preflight.json into.")] = None,
) -> None:
    """Check that student, teacher and prompts fit together. Exits with 0 (clean), 1 (warnings) or 2 (blocking)."""
    from headstart.config.loader import load

    path, overrides = file_and_overrides(arguments)
    if path is None and not overrides:
        raise ConfigError("which run? Give a file (headstart preflight recipes/tiny-esr.yaml)")
    config = load(path, overrides)
    if out is not None:
        try:
            make_folder(out / "diagnose")
        except RunFolderError as error:  # whose own exit code would read as "warnings"
            raise ConfigError(f"--out: {error}") from error

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from headstart.checks.run import run_preflight, write_preflight

    console = Console()
    columns = (TextColumn("checks"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, disable=not console.is_terminal, transient=True) as bar:
        line = bar.add_task("checks", total=None)
        result = run_preflight(config, progress=lambda done, total: bar.update(line, completed=done, total=total))
    console.print(_table(result))
    if out is not None:
        console.print(f"written: {write_preflight(out, result)}", soft_wrap=True)
    raise typer.Exit(result.exit_code)


def _table(result: Preflight) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    counts = {severity: sum(f.severity == severity for f in result.findings) for severity in STYLES}
    title = ", ".join(f"{count} {severity}" for severity, count in counts.items() if count)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title=f"preflight: {title}")
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("what was found, and what to do")
    for finding in result.findings:
        # Text, not markup: messages hold brackets.
        told = Text(finding.message)
        if finding.remedy is not None:
            told.append(f"\n-> {finding.remedy}", style=STYLES[finding.severity])
        table.add_row(Text(finding.severity, style=STYLES[finding.severity]), finding.check, told)
    return table
