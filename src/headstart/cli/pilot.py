"""`headstart diagnose --pilot`: the plan, a bar, and a table of arms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.config.schema import Config


def pilot_into(config: Config, out: Path) -> None:
    """Run the pilot of `config` into the folder `out` and print what it found."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from headstart.build.pilot import run_pilot
    from headstart.files import locked

    console = Console()
    columns = (TextColumn("trained and graded"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with locked(out / "diagnose"), Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        line = bar.add_task("rungs", total=None)
        pilot = run_pilot(
            config,
            out,
            lambda done, total: bar.update(line, completed=done, total=total),
            lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False),
        )
    table = Table("N", "learning rate", "accuracy", "steps", "outcome", title="pilot")
    for track in sorted(pilot.tracks, key=lambda track: track.arm):
        graded = [outcome for outcome in track.outcomes if outcome.scores]
        table.add_row(
            str(track.arm.tokens),
            f"{track.arm.lr:.2g}",
            " -> ".join(f"{outcome.accuracy:.1%}" for outcome in graded) or "-",
            " -> ".join(str(outcome.steps) for outcome in graded) or "-",
            track.reason or ("winner" if pilot.winner and track.arm == pilot.winner.arm else ""),
        )
    console.print(table)
    console.print(pilot.sentence, soft_wrap=True, highlight=False, markup=False)
