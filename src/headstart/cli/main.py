"""The `headstart` command. Every verb imports what it needs inside its function, so `--help` loads no torch."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from headstart.cli.compare import compare_command
from headstart.cli.config import config_command
from headstart.cli.diagnose import diagnose_command
from headstart.cli.distill import distill_command
from headstart.cli.evaluate import evaluate_command
from headstart.cli.explain import explain_command
from headstart.cli.preflight import preflight_command
from headstart.cli.quickstart import quickstart_command
from headstart.cli.report import report_command
from headstart.errors import HeadstartError
from headstart.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("quickstart")(quickstart_command)
app.command("preflight")(preflight_command)
app.command("diagnose")(diagnose_command)
app.command("distill")(distill_command)
app.command("evaluate")(evaluate_command)
app.command("explain")(explain_command)
app.command("compare")(compare_command)
app.command("report")(report_command)
app.command("config")(config_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headstart {__version__}")
        raise typer.Exit


@app.callback()
def headstart(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """On-policy distillation of language models that knows where to stop."""


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One readable line on stderr instead of Python's file, line number and source."""
    _say("warning", "bold yellow", message)


def _say(kind: str, style: str, message: object) -> None:
    from rich.console import Console
    from rich.text import Text

    # Text, not markup: messages hold brackets. soft_wrap: one problem stays one line.
    Console(stderr=True).print(Text.assemble((f"{kind}:", style), f" {message}"), soft_wrap=True)


def main() -> None:
    """Run the command line. Exits with the error's `exit_code` on a HeadstartError and with 130 on Ctrl-C."""
    warnings.showwarning = _show_warning
    try:
        app(prog_name="headstart")
    except HeadstartError as error:
        _say("error", "bold red", error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
