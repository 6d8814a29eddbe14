"""`headstart diagnose`: where the teacher stops teaching, where the signal is, and which horizon follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.cli.arguments import RunArguments, dated_folder, run_config


def diagnose_command(
    arguments: RunArguments = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write, or to resume. Default: runs/diagnosis-<time>.")
    ] = None,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Then settle it by experiment: a few short trainings at several horizons.")
    ] = False,
) -> None:
    """Measure, before training, where the teacher stops teaching, and recommend a horizon and its cost."""
    config = run_config(arguments, "headstart diagnose recipes/tiny-esr.yaml --out runs/tiny-diagnosis")
    folder = out or dated_folder("diagnosis")

    from headstart.cli.show import progress_bar, say, show
    from headstart.diagnosis.run import diagnose  # imports torch
    from headstart.reports.readings import reading_blocks

    with progress_bar("loading") as progress:
        result = diagnose(config, out=folder, progress=progress, say=say)
    readings = {
        "diagnose/decay": result.decay.to_json(),
        "diagnose/positions": result.positions,
        "diagnose/recommendation": result.recommendation.to_json(),
    }
    for name in readings:
        show(reading_blocks(name, readings))
    say(f"written: {folder / 'diagnose'}")
    if pilot:
        from headstart.study.pilot import run_pilot

        with progress_bar("trained and graded") as progress:
            settled = run_pilot(config, folder, progress, say)
        show(reading_blocks("diagnose/pilot", {"diagnose/pilot": settled.to_json()}))
