"""`headstart config`: show the defaults, a resolved configuration, or the JSON schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from headstart.cli.arguments import file_and_overrides
from headstart.errors import ConfigError


def config_command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN.yaml section.key=value", help="A configuration and overrides on top of it."),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema instead.")] = False,
) -> None:
    """Print the annotated default configuration, or RUN.yaml resolved: overrides applied, defaults filled in."""
    from headstart.config.loader import load
    from headstart.config.render import annotated_default, json_schema, resolved

    path, overrides = file_and_overrides(arguments)
    if schema and arguments:
        raise ConfigError(f"--schema prints the schema of every configuration; leave out {' '.join(arguments)}")
    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
    elif path is None and not overrides:
        typer.echo(annotated_default(), nl=False)
    else:
        typer.echo(resolved(load(path, overrides)), nl=False)
