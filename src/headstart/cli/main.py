"""The `headstart` command. Every verb imports what it needs inside its function, so `--help` loads no torch."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from headstart.cli.chat import chat_command
from headstart.cli.evaluate import evaluate_command
from headstart.cli.init import init_command, recipes_command
from headstart.cli.verbs import (
    compare_command,
    config_command,
    diagnose_command,
    distill_command,
    explain_command,
    preflight_command,
    quickstart_command,
    report_command,
)
from headstart.errors import HeadstartError, Interrupted, LostRankError, StopRequested, first_line, out_of_memory
from headstart.progress import printing
from headstart.train.signals import StopSignals
from headstart.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("quickstart")(quickstart_command)
app.command("init")(init_command)
app.command("preflight")(preflight_command)
app.command("diagnose")(diagnose_command)
app.command("distill")(distill_command)
app.command("evaluate")(evaluate_command)
app.command("explain")(explain_command)
app.command("chat")(chat_command)
app.command("compare")(compare_command)
app.command("report")(report_command)
app.command("config")(config_command)
app.command("recipes")(recipes_command)


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
    from rich.text import Text

    # Text, not markup: messages hold brackets. soft_wrap: one problem stays one line.
    printing(stderr=True).print(Text.assemble((f"{kind}:", style), f" {message}"), soft_wrap=True)


def main() -> None:
    """Run the command line. Exits with the error's `exit_code` on a HeadstartError, 1 when memory or disk run out, and
    128 + the number of a signal that stopped it; of several ranks, only the first says so.
    """
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not know every character, and UTF-8 has no surrogates
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank that is lost gives pages of C++ frames as warnings
    with StopSignals(interruptible=True) as signals:
        try:
            app(prog_name="headstart")
        except (Exception, StopRequested) as error:
            signals.ignore()
            _end(error)


def _end(error: Exception | StopRequested) -> NoReturn:
    """Say what ended the command, and exit."""
    if (runtime := sys.modules.get("headstart.ranks.runtime")) is not None:  # else there are no other ranks yet
        error = runtime.lost_rank(error) or error
        if not isinstance(error, Interrupted | LostRankError) and not getattr(error, "everywhere", False):
            runtime.tell_others(str(error) if isinstance(error, HeadstartError) else f"{type(error).__name__}: {error}")
    message, code = _message_and_code(error)
    if _is_heard(error):
        try:
            _say("error", "bold red", message)
        except Exception:  # no memory left for rich either
            os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))
    sys.exit(code)


def _is_heard(error: Exception | StopRequested) -> bool:
    """Whether this rank says what ended it; what ends all of them is said once."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, LostRankError):
        return rank in ("0", "1")  # either may be the one that is lost
    return rank == "0" or not (isinstance(error, Interrupted | StopRequested) or getattr(error, "everywhere", False))


def _message_and_code(error: Exception | StopRequested) -> tuple[str, int]:
    """What is said of an error that ends the command, and its exit code. Raises what is a fault of the program."""
    if isinstance(error, HeadstartError):
        return str(error), error.exit_code
    if isinstance(error, StopRequested):
        return f"stopped by {signal.Signals(error.args[0]).name}; what is written so far is whole", 128 + int(
            error.args[0]
        )
    reason = first_line(error)
    if out_of_memory(error):
        return f"memory ran out: {reason}. Free memory, or lower batch_size, micro_batch, max_tokens or the horizon", 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'a file'} cannot be written: {error.strerror}. Free space, then start again", 1
    raise error
