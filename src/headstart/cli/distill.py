"""`headstart distill`: train a student, or resume a run that stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.arguments import RunArguments, run_config
from headstart.errors import ConfigError
from headstart.train.signals import StopSignals

if TYPE_CHECKING:
    from headstart.train.loop import RunResult


def distill_command(
    arguments: RunArguments = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make. Default: output.dir, else runs/<time>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the run in this folder.")] = None,
    allow_changed: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="With --resume: what may differ from the start (training.steps,prompts)."
        ),
    ] = None,
) -> None:
    """Distil a student from its teacher, as RUN.yaml says."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and StopSignals.current is not None:
        StopSignals.current.defer()  # a rank that left now would leave the others waiting for it
    names = [name.strip() for name in allow_changed.split(",")] if allow_changed is not None else []
    if resume is not None and (arguments or out is not None):
        raise ConfigError("--resume takes its configuration from the run folder; leave out everything else")
    if resume is None and names:
        raise ConfigError("--allow-changed goes with --resume DIR: it names what of that run may differ from its start")
    example = "headstart distill recipes/tiny-esr.yaml, or --resume DIR"
    config = run_config(arguments, example) if resume is None else None

    from headstart.distillation.run import distill  # imports torch, so only once the configuration is known to be right

    _print_result(distill(config, out=out, resume=resume, allow_changed=names))


def _print_result(result: RunResult) -> None:
    from headstart.cli.show import say, show
    from headstart.reports.contents import before_and_after
    from headstart.reports.run import read_run

    if os.environ.get("RANK", "0") != "0":
        return
    if result.after is not None:
        show([before_and_after(result.after.task, read_run(result.path).points)])
    p = result.progress
    say(
        f"{p.step} steps, {p.generated_tokens:,} generated tokens, {p.seconds:.1f} s of training. "
        f"Run folder: {result.path}"
    )
