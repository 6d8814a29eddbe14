"""Headstart: on-policy distillation that knows where to stop. Importing this package loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headstart.errors import HeadstartError
from headstart.version import __version__

if TYPE_CHECKING:
    from headstart.config.schema import Config
    from headstart.distillation.run import distill


__all__ = ["Config", "HeadstartError", "__version__", "distill"]


def __getattr__(name: str) -> Any:
    if name == "Config":  # building the schema's classes takes as long as the rest of `headstart --help`
        from headstart.config.schema import Config

        return Config
    if name == "distill":
        from headstart.distillation.run import distill

        return distill
    raise AttributeError(f"module 'headstart' has no attribute {name!r}")
