"""Dotted overrides: `section.key=value`, applied to plain data before it is validated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from headstart.config.shape import Place
from headstart.config.text import MAX_LEVELS, plain, read_yaml, short, shown

MAX_OVERRIDES = 1000


def apply_overrides(data: dict[str, Any], overrides: Sequence[str | tuple[str, Any]], start: Place) -> list[str]:
    """Change `data`, a value of `start`, in place, one override after the other (a later one wins); returns the
    problems found.

    An override is text whose value is YAML, or a path and its plain value. A change of a section's `type` drops the
    keys that only the previous type has, unless an override set them: those are kept, and validation then says that
    they do not fit.
    """
    if len(overrides) > MAX_OVERRIDES:
        return [f"{len(overrides):,} overrides: write them into a YAML file"]
    problems: list[str] = []
    set_here: set[str] = set()
    for override in overrides:
        try:
            path, value = _parsed(override) if isinstance(override, str) else override
        except ValueError as error:
            problems.append(str(error))
            continue
        problem = _set(data, path, value, set_here, start)
        problems += [problem] if problem else []
        set_here.add(path)
    return problems


def _parsed(override: str) -> tuple[str, Any]:
    """Path and value. Raises ValueError with what is wrong."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise ValueError(
            f"{short(override, 100)}: not an override; write section.key=value, such as training.steps=100"
        )
    try:
        return path, plain(read_yaml(text))
    except (ConstructorError, ValueError, TypeError) as error:
        reason = error.problem if isinstance(error, ConstructorError) else error
        raise ValueError(f"{path}: found {shown(text)}; {reason}") from error
    except yaml.YAMLError as error:
        remedy = f"put text in quotes: '{path}=\"...\"'"
        raise ValueError(f"{path}: found {shown(text)}, which is not YAML; {remedy}") from error


def _set(data: dict[str, Any], path: str, value: Any, set_here: set[str], start: Place) -> str | None:
    """Put `value` at `path`, making mappings on the way where there is nothing; returns what stands in the way."""
    *sections, key = path.split(".")
    if not all((*sections, key)) or len(sections) >= MAX_LEVELS:
        return f"{short(path, 100)}: no such key; write section.key, such as training.steps"
    place: Place | None = start
    for depth, section in enumerate(sections, start=1):
        place = place.within(data).fields.get(section) if place else None
        if data.get(section) is None:
            data[section] = {}
        if not isinstance(data[section], dict):
            above = ".".join(sections[:depth])
            return f"{path}: {above} is {shown(data[section])} and has no keys; set {above} as a whole"
        data = data[section]
    if key == "type" and place is not None and isinstance(value, str) and value in place.variants:
        _switch(data, place, value, set_here)
    data[key] = value
    return None


def _switch(data: dict[str, Any], place: Place, tag: str, set_here: set[str]) -> None:
    lost = place.within(data).fields.keys() - place.variants[tag].fields.keys()
    for key in lost & data.keys():
        touched = f"{place.path}.{key}"
        if not any(path == touched or path.startswith(f"{touched}.") for path in set_here):
            del data[key]
