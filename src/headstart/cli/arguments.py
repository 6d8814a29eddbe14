"""What several verbs take: an optional file first, then `section.key=value` overrides; and a folder named by time."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.errors import ConfigError

if TYPE_CHECKING:
    from headstart.config.schema import Config

RunArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="RUN.yaml [section.key=value ...]", help="A run file (or recipe:NAME) and overrides on it."),
]


def file_and_overrides(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """`RUN.yaml a.b=c` -> (RUN.yaml, [a.b=c]); without a file -> (None, all arguments)."""
    given = arguments or []
    # An override may be longer than any file name, which the file system says with an error.
    if not given or ("=" in given[0] and (len(given[0]) > 255 or not Path(given[0]).exists())):
        return None, given
    return Path(given[0]), given[1:]


def run_config(arguments: list[str] | None, example: str) -> Config:
    """The run that the arguments describe. Raises ConfigError, with the example, when there are none."""
    from headstart.config.loader import load

    if not arguments:
        raise ConfigError(f"which run? Give a file: {example}")
    return load(*file_and_overrides(arguments))


def dated_folder(name: str) -> Path:
    """`runs/<name>-<time>`."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
