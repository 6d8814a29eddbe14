"""`headstart diagnose`: where the teacher stops teaching, where the signal is, and which horizon follows from it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.arguments import file_and_overrides
from headstart.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from headstart.diagnosis.decay import DecayCurve, Share
    from headstart.diagnosis.run import Diagnosis
    from headstart.stats import Estimate


def diagnose_command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN.yaml [section.key=value ...]", help="A configuration and overrides on top of it."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write or to go on with. Default: runs/diagnosis-<time>.")
    ] = None,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Then settle it by experiment: a few short trainings at several horizons.")
    ] = False,
) -> None:
    """Measure, before training, where the teacher stops teaching, and recommend a horizon and its cost."""
    from headstart.config.loader import load

    path, overrides = file_and_overrides(arguments)
    if path is None and not overrides:
        raise ConfigError("which run? Give a file: headstart diagnose recipes/tiny-esr.yaml --out runs/tiny-diagnosis")
    config = load(path, overrides)
    folder = out or Path("runs") / f"diagnosis-{datetime.now():%Y%m%d-%H%M%S}"

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from headstart.diagnosis.run import diagnose  # imports torch

    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        line = bar.add_task("loading", total=None)
        found = diagnose(
            config,
            folder,
            progress=lambda done, total, text: bar.update(line, completed=done, total=total, description=text),
            say=lambda text: console.print(text, soft_wrap=True, highlight=False),
        )
    console.print(_decay_table(found.decay), "", _position_table(found), "")
    console.print(found.recommendation.sentence, style="bold", soft_wrap=True, highlight=False, markup=False)
    for reason in found.recommendation.reasons:
        console.print(f"- {reason}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"written: {folder / 'diagnose'}", soft_wrap=True)
    if pilot:
        from headstart.cli.pilot import pilot_into

        pilot_into(config, folder)


def _decay_table(decay: DecayCurve) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    kind = "" if decay.labelled else ", agreement with the teacher's majority"
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        title=f"{decay.task}, {decay.prompts} problems: right answers{kind}",
        caption="R: the teacher finishes the student's first N tokens; G: the student the teacher's; own: its own",
    )
    for name in ("N", "R, %", "T own", "S own", "G, %", "damage D", "clean"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in decay.points:
        known = point.after_clean.n + point.after_wrong.n
        table.add_row(
            str(point.prefix_tokens),
            _share(point.after_student),
            *(f"{share.mean:.0%}" for share in (point.after_own, point.student_continues)),
            _share(point.gift),
            _damage(point.damage),
            f"{point.after_clean.n / known:.0%}" if known else "-",
        )
    return table


def _position_table(found: Diagnosis) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        title=f"{found.positions['rollouts']} full rollouts of the student, by position",
        caption="nats: the divergence; share: of all of it, up to here; agree: both favour one token",
    )
    for name in ("tokens", "nats", "share", "entropy S", "entropy T", "T's top", "agree", "top-16"):
        table.add_column(name, justify="right")

    def mean(reading: dict[str, Any], form: str) -> str:
        return format(reading["mean"], form)

    for row in found.positions["bins"]:
        share = row["divergence_share"]
        table.add_row(
            f"{row['first']}-{row['last']}",
            mean(row["divergence"], ".3f"),
            "-" if share is None else f"{share:.0%}",
            *(mean(row[name], ".2f") for name in ("student_entropy", "teacher_entropy", "teacher_top")),
            *(mean(row[name], ".0%") for name in ("agree", "overlap")),
        )
    return table


def _share(share: Share) -> str:
    return f"{100 * share.mean:.0f} [{100 * share.low:.0f},{100 * share.high:.0f}]"


def _damage(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    return f"{estimate.value:.2f} [{estimate.low:.2f},{estimate.high:.2f}]"
