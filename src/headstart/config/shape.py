"""The schema seen as a tree of places: what may stand where.

Read from the JSON schema, which knows every key, default, bound and description once. The loader words its messages
from it, and the annotated default configuration is printed from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from pydantic import BaseModel

from headstart.config.schema import Config
from headstart.config.study import StudyConfig

MISSING: Final = object()
"""Stands for a default, an example or a value that is not there (None is a value)."""


@cache
def _json_schema(model: type[BaseModel] = Config) -> dict[str, Any]:
    return model.model_json_schema()


@cache
def _definitions() -> dict[str, Any]:
    """Every section of either schema by the name of its class."""
    return {**_json_schema(StudyConfig)["$defs"], **_json_schema()["$defs"]}


def _tags(schema: Mapping[str, Any]) -> list[str]:
    """The values of a `type`: one, or several that share their fields."""
    return [schema["const"]] if "const" in schema else list(schema["enum"])


def _follow(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` with its reference replaced by what it refers to; the field's own description and default win."""
    if "$ref" not in schema:
        return dict(schema)
    target = _definitions()[schema["$ref"].rpartition("/")[2]]
    return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}


@dataclass(frozen=True)
class Place:
    """One place of the configuration.

    `path` is dotted and names no variants: the place of `tokens` is `horizon.tokens` for every type of horizon.
    """

    path: str
    schema: Mapping[str, Any]
    required: bool = False

    @property
    def key(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def description(self) -> str:
        return " ".join(str(self.schema.get("description", "")).split())

    @property
    def default(self) -> Any:
        """The default as plain data, or MISSING where the key is required."""
        return self.schema.get("default", MISSING)

    @property
    def example(self) -> Any:
        """A value that may stand here, or MISSING."""
        return self.schema.get("examples", [MISSING])[0]

    @property
    def options(self) -> list[dict[str, Any]]:
        """The schemas of which a value must fit one: `X | null` has two, everything else one."""
        return [_follow(option) for option in self.schema.get("anyOf", [self.schema])]

    @property
    def variants(self) -> dict[str, Place]:
        """The alternatives of a `type`-tagged section by tag, in the schema's order; empty elsewhere."""
        places = [Place(self.path, _follow(option)) for option in self.schema.get("oneOf", [])]
        return {tag: place for place in places for tag in _tags(place.schema["properties"]["type"])}

    @property
    def fields(self) -> dict[str, Place]:
        """The keys of a section in order; empty for values and for tagged sections (see `within`)."""
        for option in self.options:
            if "properties" in option:
                prefix = f"{self.path}." if self.path else ""
                required = option.get("required", ())
                return {
                    name: Place(prefix + name, _follow(schema), name in required)
                    for name, schema in option["properties"].items()
                }
        return {}

    @property
    def default_tag(self) -> str | None:
        """The `type` a tagged section has when none is written, or None."""
        return self.default["type"] if self.variants and self.default is not MISSING else None

    def within(self, value: object) -> Place:
        """The variant that `value` names with its `type`; this place itself where there is nothing to choose."""
        tag = value.get("type", self.default_tag) if isinstance(value, Mapping) else None
        return self.variants.get(tag, self) if isinstance(tag, str) else self

    @property
    def allowed(self) -> str:
        """What may stand here, in words."""
        return allowed(self.schema)


def root(model: type[BaseModel] = Config) -> Place:
    """The whole configuration, of a run or of a study."""
    return Place("", _json_schema(model))


def places(place: Place | None = None) -> Iterator[Place]:
    """Every place below `place` (default: all), the fields of every variant included; paths can repeat."""
    place = root() if place is None else place
    for part in (place, *place.variants.values()):
        for child in part.fields.values():
            yield child
            yield from places(child)


def choices(schema: Mapping[str, Any]) -> list[str]:
    """The words a value must be one of, or none."""
    if "oneOf" in schema:
        return list(Place("", schema).variants)
    found = [option.get("enum", [option["const"]] if "const" in option else []) for option in Place("", schema).options]
    return [word for words in found for word in words]


def allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words: `a whole number > 0, or null`."""
    match _follow(schema):
        case {"anyOf": options}:
            return ", or ".join(allowed(option) for option in options)
        case {"oneOf": _}:
            return f"a mapping with type {_listed(choices(schema))}"
        case {"enum": _} | {"const": _}:
            return _listed(choices(schema))
        case {"properties": properties}:
            return f"a mapping with keys of {', '.join(properties)}"
        case {"type": "array", "prefixItems": items}:
            return f"a list of {len(items)}, each {allowed(items[0])}"
        case {"type": "array", "items": item} as many:
            return f"a list of at least {many.get('minItems', 0)}, each {allowed(item)}"
        case {"type": "integer"} as number:
            return "a whole number" + _bounds(number)
        case {"type": "number"} as number:
            return "a number" + _bounds(number)
        case {"type": kind}:
            return {"boolean": "true or false", "string": "text", "null": "null", "object": "a mapping"}[kind]
    return "anything"


def _listed(words: list[str]) -> str:
    *head, last = words
    return f"{', '.join(head)} or {last}" if head else last


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    found = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return f" {' and '.join(found)}" if found else ""
