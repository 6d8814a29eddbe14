"""What is wrong with a configuration, in words of the configuration: one line per problem."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic_core import ErrorDetails

from headstart.config.shape import MISSING, Place, choices, places
from headstart.config.text import short, shown, write_yaml


def describe(error: ErrorDetails, data: Mapping[str, Any], start: Place) -> list[str]:
    """The lines for one pydantic error about `data`, a value of `start`. Of pydantic's own errors only place and kind
    are used, never the text."""
    place, value, rest = _locate(error["loc"], data, start)
    match error["type"]:
        case "value_error":
            return str(error["ctx"]["error"]).splitlines()
        case "unusable":
            return [f"{place.path}: found {shown(value)}; {error['msg']}"]
        case "json_invalid":
            return ["the configuration holds text that is not Unicode, or is nested too deeply"]
        case "extra_forbidden" if rest:
            return [_unknown(place, rest, value[rest], start)]
        case "missing" if value is MISSING:
            kind = "" if place.fields else f"; allowed: {place.allowed}"
            return [f"{place.path}: missing, but required{kind}{_for_example(place)}"]
        case "union_tag_not_found":
            return [f"{place.path}.type: missing, but required; allowed: {', '.join(place.variants)}"]
        case "union_tag_invalid":
            return [_wrong(f"{place.path}.type", value["type"], ", ".join(place.variants), list(place.variants))]
    return [_wrong(place.path or "configuration", value, place.allowed, choices(place.schema))]


def _locate(loc: tuple[int | str, ...], data: Mapping[str, Any], start: Place) -> tuple[Place, Any, str | None]:
    """The innermost known place of `loc`, the value there, and the unknown key below it, if that is the trouble."""
    place, value = start, data
    for step in loc:
        if step in place.variants:  # pydantic puts the tag of a union into the path
            place = place.variants[str(step)]
        elif step in place.fields:
            place = place.fields[str(step)]
            value = value.get(place.key, MISSING)
        else:
            return place, value, str(step) if place.fields and isinstance(value, Mapping) else None
    return place, value, None


def _wrong(path: str, value: Any, allowed: str, words: list[str]) -> str:
    line = f"{path}: found {shown(value)}; allowed: {allowed}"
    close = get_close_matches(str(value), words, n=1)
    if close and not isinstance(value, Mapping):
        return f"{line}; did you mean {close[0]}?"
    if allowed.startswith("text") and value is not None and not isinstance(value, str):
        return f"{line} (put text in quotes)"
    return line


def _unknown(place: Place, key: str, value: Any, start: Place) -> str:
    path = short(f"{place.path}.{key}" if place.path else key, 100)
    tag = place.schema.get("properties", {}).get("type", {}).get("const")
    kind = f"unknown key for type {tag}" if tag and place.path in _tagged(start) else "unknown key"
    line = f"{path}: {kind} (found {shown(value)})"
    owners = [tag for tag, variant in _tagged(start).get(place.path, {}).items() if key in variant.fields]
    if owners:
        return f"{line}; it belongs to {place.path}.type {' or '.join(owners)}"
    suggestions = _suggestions(place, key, start)
    if suggestions:
        return f"{line}; did you mean {' or '.join(suggestions)}?"
    return f"{line}; allowed: {', '.join(place.fields) or 'nothing'}"


def _tagged(start: Place) -> dict[str, dict[str, Place]]:
    return {place.path: place.variants for place in places(start) if place.variants}


def _suggestions(place: Place, key: str, start: Place) -> list[str]:
    """Dotted paths that may have been meant: close keys here first, then the same key in another section."""
    here = [place.fields[name].path for name in get_close_matches(key.lower(), place.fields, n=1)]
    elsewhere: dict[str, list[str]] = {}
    for other in places(start):
        elsewhere.setdefault(other.key, []).append(other.path)
    same = elsewhere.get(key, [])
    if not here and not same:
        same = [
            path for name in get_close_matches(key.lower(), elsewhere, n=1, cutoff=0.75) for path in elsewhere[name]
        ]
    return list(dict.fromkeys([*here, *same]))[:3]


def _for_example(place: Place) -> str:
    return "" if place.example is MISSING else f"; for example {write_yaml(place.example, flow=True)}"
