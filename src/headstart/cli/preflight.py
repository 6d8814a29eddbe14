"""`headstart preflight`: does this pair fit together, before a run is paid for?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.cli.arguments import RunArguments, run_config
from headstart.errors import ConfigError, RunFolderError
from headstart.files import make_folder

SEVERITIES = ("ok", "note", "warning", "blocking")


def preflight_command(
    arguments: RunArguments = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write diagnose/preflight.json into.")] = None,
) -> None:
    """Check that student, teacher and prompts fit together. Exits with 0 (clean), 1 (warnings) or 2 (blocking)."""
    config = run_config(arguments, "headstart preflight recipes/tiny-esr.yaml")
    if out is not None:
        try:
            make_folder(out / "diagnose")
        except RunFolderError as error:  # whose own exit code would read as "warnings"
            raise ConfigError(f"--out: {error}") from error

    from headstart.checks.run import run_preflight, write_preflight
    from headstart.cli.show import progress_bar, say, show
    from headstart.reports.readings import reading_blocks

    with progress_bar("checks") as progress:
        result = run_preflight(config, progress=progress)
    show(reading_blocks("diagnose/preflight", {"diagnose/preflight": result.to_json()}))
    counts = {severity: sum(f.severity == severity for f in result.findings) for severity in SEVERITIES}
    say("preflight: " + ", ".join(f"{count} {severity}" for severity, count in counts.items() if count))
    if out is not None:
        say(f"written: {write_preflight(out, result)}")
    raise typer.Exit(result.exit_code)
