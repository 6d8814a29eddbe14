"""`headstart config`: show the defaults, a resolved configuration, or the JSON schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from headstart.cli.arguments import RunArguments, file_and_overrides
from headstart.errors import ConfigError


def config_command(
    arguments: RunArguments = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema instead.")] = False,
) -> None:
    """Print the annotated default configuration, or RUN.yaml resolved: overrides applied, defaults filled in."""
    from headstart.config.loader import load
    from headstart.config.render import annotated_default, json_schema, resolved

    if schema and arguments:
        raise ConfigError(f"--schema prints the schema of every configuration; leave out {' '.join(arguments)}")
    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
    elif not arguments:
        typer.echo(annotated_default(), nl=False)
    else:
        typer.echo(resolved(load(*file_and_overrides(arguments))), nl=False)
