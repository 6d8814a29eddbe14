"""Plug-ins: the user's own classes, named in the configuration as package.module:Name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from headstart.errors import ConfigError

HORIZON_METHODS = ("tokens", "observe", "state_dict", "load_state_dict")
TASK_METHODS = ("problems", "grade", "prefix_state")
"""Methods a plug-in needs to fit `interfaces.HorizonPolicy` and `interfaces.Task`."""


def load_plugin(path: str, arguments: dict[str, Any], key: str, methods: tuple[str, ...]) -> Any:
    """The plug-in at `path` (package.module:Name), made with `arguments`; ConfigError when it does not fit."""
    module_name, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a plug-in may lie where the command runs; last, so that it shadows nothing
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}: {path!r} cannot be imported ({error})", "write it as package.module:Name") from error
    try:
        plugin = factory(**arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {path} does not take these arguments: {error}") from error
    missing = [method for method in methods if not callable(getattr(plugin, method, None))]
    if missing:
        raise ConfigError(f"{key}: {path} has no {', '.join(missing)}", "see the Protocols in headstart.interfaces")
    return plugin
