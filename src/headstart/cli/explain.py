"""`headstart explain`: what training did to the student, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.errors import ConfigError


def explain_command(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Settings on top of the run's, such as evaluation.limit=48."),
    ] = None,
    twin: Annotated[
        Path | None, typer.Option(help="Its full-rollout counterpart: the same student trained on full rollouts.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Some of cascade,commitment,swap,selection,efficiency,samples, by commas.")
    ] = None,
    selection: Annotated[
        bool, typer.Option("--selection", help="Also train one arm on full rollouts for each selection rule.")
    ] = False,
) -> None:
    """Explain a finished run: student before and after, its full-rollout counterpart and teacher, side by side.

    Writes RUN_DIR/explain/*.json. --only selection trains its arms, too.
    """
    if bad := [item for item in overrides or [] if "=" not in item]:
        raise ConfigError(f"{bad[0]!r} is no setting; write key=value, such as evaluation.limit=48 (one run at a time)")
    from headstart.cli.show import progress_bar, say, show
    from headstart.explanation.run import READINGS, explain  # imports torch
    from headstart.reports.readings import reading_blocks

    with progress_bar("explaining") as progress:
        readings = explain(
            run,
            twin=twin,
            only=[name.strip() for name in only.split(",")] if only else READINGS,
            overrides=overrides or (),
            selection_arms=selection or only == "selection",
            progress=progress,
        )
    for name in readings:
        show(reading_blocks(f"explain/{name}", {f"explain/{key}": value for key, value in readings.items()}))
    say(f"written to {run / 'explain'}")
