"""YAML file and overrides to a Config, or one ConfigError that names everything that is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from headstart.config.overrides import apply_overrides
from headstart.config.problems import describe
from headstart.config.schema import Config
from headstart.config.shape import Place, root
from headstart.config.text import plain, read_yaml, shown
from headstart.errors import ConfigError


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path` (None: an empty one) with `overrides` (`section.key=value`) on top.

    Relative paths in the file mean what they mean on a command line: they start at the current directory. Raises
    ConfigError when the file cannot be read, is not YAML or not a mapping, and for every wrong key or value at once.
    """
    if path is None:
        return _checked({}, overrides, "configuration")
    data = _read(path)
    if data is None:  # an empty file, or one with comments only
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: found {shown(plain(data))}; a configuration is a mapping of sections")
    return _checked(data, overrides, str(path))


def parse(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The configuration in `data` (left unchanged) with `overrides` on top. Raises ConfigError as `load` does."""
    return _checked(data, overrides, "configuration")


def _read(path: Path) -> Any:
    try:
        return read_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `headstart config > {path}` writes one to start from") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {error.problem or error.context}; mend the YAML there") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def _checked(data: Mapping[str, Any], overrides: Sequence[str], name: str) -> Config:
    try:
        values = plain(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}; use text, numbers, true, false, null, lists and mappings") from None
    problems = apply_overrides(values, overrides)
    values = _with_types(root(), values)
    try:
        # JSON mode is strict where it matters (true is not 1, "5" is not 5) and still reads lists as tuples.
        config = Config.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems += [line for one in error.errors(include_url=False) for line in describe(one, values)]
    if problems:
        unique = list(dict.fromkeys(problems))
        count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
        raise ConfigError("\n  ".join([f"{name}: {count}", *unique]))
    return config


def _with_types(place: Place, value: Any) -> Any:
    """`value` with the default `type` written into every tagged section that names none."""
    if not isinstance(value, Mapping):
        return value
    if place.default_tag is not None and "type" not in value:
        value = {"type": place.default_tag, **value}
    fields = place.within(value).fields
    return {key: _with_types(fields[key], item) if key in fields else item for key, item in value.items()}
