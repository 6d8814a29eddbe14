"""Headstart: on-policy distillation that knows where to stop. Importing this package loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headstart.errors import HeadstartError

if TYPE_CHECKING:
    from headstart.build import distill
    from headstart.config.schema import Config

__version__ = "0.1.0"
__all__ = ["Config", "HeadstartError", "__version__", "distill"]


def __getattr__(name: str) -> Any:
    if name == "Config":  # building the schema's classes takes as long as the rest of `headstart --help`
        from headstart.config.schema import Config

        return Config
    if name == "distill":
        from headstart.build import distill

        return distill
    raise AttributeError(f"module 'headstart' has no attribute {name!r}")
