"""The schema in words: what may stand at each key, what is wrong with a value, and the annotated default.

All of it is read from pydantic's JSON schema, which holds every key, default, bound and description once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from textwrap import wrap
from typing import Any, Final, cast

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from headstart.config.schema import Config
from headstart.config.text import short, shown, write_yaml

MISSING: Final = object()
"""Stands for a default, an example or a value that is not there (None is a value)."""
_HEADER = """\
# Every setting of a run with its default. Only student, teacher and prompts are required (what stands there now is an
# example); leave out whatever should stay as it is. On the command line, section.key=value overrides this file.
"""


@dataclass(frozen=True)
class Place:
    """A key of the configuration and the JSON schema of its value.

    `path` is dotted and names no variants: the path of `tokens` is `horizon.tokens` for every type of horizon.
    """

    path: str
    schema: Mapping[str, Any]

    @property
    def key(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def description(self) -> str:
        return " ".join(self.schema.get("description", "").split())

    @property
    def default(self) -> Any:
        """The default as plain data, or MISSING where the key is required."""
        return self.schema.get("default", MISSING)

    @property
    def example(self) -> Any:
        """A value that may stand here, or MISSING."""
        return self.schema.get("examples", [MISSING])[0]

    @cached_property
    def variants(self) -> dict[str, Place]:
        """The alternatives of a `type`-tagged section by tag, in the schema's order; empty elsewhere."""
        options = [Place(self.path, variant) for option in _options(self.schema) for variant in option.get("oneOf", ())]
        return {tag: place for place in options for tag in choices(place.schema["properties"]["type"])}

    @cached_property
    def fields(self) -> dict[str, Place]:
        """The keys of a section in order; empty for values and for tagged sections (see `within`)."""
        prefix = f"{self.path}." if self.path else ""
        keys = [item for option in _options(self.schema) for item in option.get("properties", {}).items()]
        return {name: Place(prefix + name, schema) for name, schema in keys}

    @property
    def default_tag(self) -> str | None:
        """The `type` a tagged section has when none is written, or None."""
        if not self.variants or isinstance(self.default, dict):
            return str(self.default["type"]) if self.variants else None
        # A required section whose example has no type is the first of its kinds.
        return next(iter(self.variants)) if isinstance(self.example, dict) and "type" not in self.example else None

    def within(self, value: object) -> Place:
        """The variant that `value` names with its `type`; this place itself where there is nothing to choose."""
        tag = value.get("type", self.default_tag) if isinstance(value, Mapping) else None
        return self.variants.get(tag, self) if isinstance(tag, str) else self


@cache
def root(model: type[BaseModel]) -> Place:
    """The whole configuration, of a run or of a study, with the schema's references replaced by what they name."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs")

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(item) for item in part]
        if not isinstance(part, dict):
            return part
        target = definitions[part["$ref"].rpartition("/")[2]] if "$ref" in part else {}
        return {key: resolve(item) for key, item in {**target, **part}.items() if key != "$ref"}

    return Place("", resolve(schema))


def places(start: Place) -> Iterator[Place]:
    """Every place below `start`, the fields of every variant included; paths can repeat."""
    for part in (start, *start.variants.values()):
        for child in part.fields.values():
            yield child
            yield from places(child)


def _options(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The schemas of which a value must fit one: `X | null` has two, everything else one."""
    options: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return options


def choices(schema: Mapping[str, Any]) -> list[str]:
    """The words a value, or its `type`, must be one of; or none."""
    words: list[str] = []
    for option in _options(schema):
        words += option.get("enum", [option["const"]] if "const" in option else [])
        words += [tag for variant in option.get("oneOf", ()) for tag in choices(variant["properties"]["type"])]
    return words


def allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words: `a whole number > 0, or null`."""
    *others, last = choices(schema) or [""]
    words = f"{', '.join(others)} or {last}" if others else last
    match schema:
        case {"anyOf": options}:
            return ", or ".join(map(allowed, options))
        case {"oneOf": _}:
            return f"a mapping with type {words}"
        case {"enum": _} | {"const": _}:
            return words
        case {"properties": properties}:
            return f"a mapping with keys of {', '.join(properties)}"
        case {"type": "array", "prefixItems": items}:
            return f"a list of {len(items)}, each {allowed(items[0])}"
        case {"type": "array", "items": item}:
            return f"a list of at least {schema.get('minItems', 0)}, each {allowed(item)}"
        case {"type": "integer" | "number" as kind}:
            signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
            bounds = " and ".join(f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema)
            return f"a {'whole ' * (kind == 'integer')}number {bounds}".strip()
        case {"type": kind}:
            return {"boolean": "true or false", "string": "text", "null": "null", "object": "a mapping"}[kind]
    return "anything"


# --- messages --------------------------------------------------------------------------------------------------------


def describe(error: ErrorDetails, data: Mapping[str, Any], start: Place) -> list[str]:
    """One pydantic error about `data`, a value of `start`, in lines of our own: key, value, what is allowed or meant.

    Of pydantic's errors only location and kind are used: their text names Python's types and the union's branches.
    """
    place, value, variants, unknown = start, data, {}, None
    for step in map(str, error["loc"]):
        if step in place.variants:  # pydantic puts the tag of a union into the location
            place, variants = place.variants[step], place.variants
        elif step in place.fields:
            place, value, variants = place.fields[step], value.get(step, MISSING), {}
        elif step.isdigit() and {"properties", "oneOf"} & (item := place.schema.get("items", {})).keys():
            place, value, variants = Place(f"{place.path}.{step}", item), cast(Any, value)[int(step)], {}
        else:
            unknown = step
            break
    match error["type"]:
        case "value_error":
            return str(error["ctx"]["error"]).splitlines()
        case "unusable":
            return [f"{place.path}: found {shown(value)}; {error['msg']}"]
        case "json_invalid":
            return ["the configuration holds text that is not Unicode, or is nested too deeply"]
        case "extra_forbidden" if unknown is not None:
            return [_unknown(place, unknown, value, variants, start)]
        case "missing" if value is MISSING:
            kind = "" if place.within({}).fields else f"; allowed: {allowed(place.schema)}"
            example = "" if place.example is MISSING else f"; for example {write_yaml(place.example, flow=True)}"
            return [f"{place.path}: missing, but required{kind}{example}"]
        case "union_tag_not_found":
            return [f"{place.path}.type: missing, but required; allowed: {', '.join(place.variants)}"]
        case "union_tag_invalid":
            return [_wrong(f"{place.path}.type", value["type"], ", ".join(place.variants), list(place.variants))]
    return [_wrong(place.path or "configuration", value, allowed(place.schema), choices(place.schema))]


def _wrong(path: str, value: Any, allowed: str, words: list[str]) -> str:
    line = f"{path}: found {shown(value)}; allowed: {allowed}"
    close = get_close_matches(str(value), words, n=1)
    if close and not isinstance(value, Mapping):
        return f"{line}; did you mean {close[0]}?"
    if allowed.startswith("text") and value is not None and not isinstance(value, str):
        return f"{line} (put text in quotes)"
    return line


def _unknown(section: Place, key: str, value: Mapping[str, Any], variants: dict[str, Place], start: Place) -> str:
    """The line for a key that `section`, one of `variants` if it is tagged, does not have."""
    path = short(f"{section.path}.{key}" if section.path else key, 100)
    kind = f"unknown key for type {value['type']}" if variants and "type" in value else "unknown key"
    line = f"{path}: {kind} (found {shown(value[key])})"
    owners = [tag for tag, variant in variants.items() if key in variant.fields]
    if owners:
        return f"{line}; it belongs to {section.path}.type {' or '.join(owners)}"
    if meant := _suggestions(section, key, start):
        return f"{line}; did you mean {' or '.join(meant)}?"
    return f"{line}; allowed: {', '.join(section.fields) or 'nothing'}"


def _suggestions(section: Place, key: str, start: Place) -> list[str]:
    """Dotted paths that may have been meant: a close key here first, then the same key in another section."""
    here = [section.fields[name].path for name in get_close_matches(key.lower(), section.fields, n=1)]
    elsewhere: dict[str, list[str]] = {}
    for other in places(start):
        elsewhere.setdefault(other.key, []).append(other.path)
    same = elsewhere.get(key, [])
    if not here and not same:
        close = get_close_matches(key.lower(), elsewhere, n=1, cutoff=0.75)
        same = [path for name in close for path in elsewhere[name]]
    return list(dict.fromkeys([*here, *same]))[:3]


# --- whole configurations --------------------------------------------------------------------------------------------


def resolved(config: Config) -> str:
    """`config` as YAML, every key written out; `load` reads it back to an equal Config."""
    return write_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def annotated_default() -> str:
    """The whole default configuration as YAML that `load` accepts, each key under its description.

    Required keys hold an example. Other types of a tagged section, and sections that are null by default, follow as
    commented-out blocks.
    """
    printed: set[str] = set()
    sections = ["\n".join(_entry(place, {}, printed)) for place in root(Config).fields.values()]
    return _HEADER + "\n" + "\n\n".join(sections) + "\n"


def _entry(place: Place, section: Mapping[str, Any], printed: set[str]) -> Iterator[str]:
    """Lines for one key of `section`: description, the key with its value, default or example, and its alternatives.

    `printed` holds the paths whose alternatives are printed already: every divergence has the same supports.
    """
    value = section.get(place.key, place.example if place.default is MISSING else place.default)
    yield from (f"# {line}" for line in wrap(place.description, 110))
    chosen, others = place.within(value), []
    if value is None or not chosen.fields:
        yield _leaf(place, value)
        others = [place] if place.fields else []
    else:
        yield from _block(chosen, value, printed)
        for variant in place.variants.values():  # several tags can share one place
            if variant not in (chosen, *others):
                others.append(variant)
    if place.path not in printed:
        printed.add(place.path)
        for other in others:
            yield "# or:"
            yield from (f"# {line}" for line in _block(other, {}, printed))


def _leaf(place: Place, value: Any) -> str:
    line, words = f"{place.key}: {write_yaml(value, flow=True)}", allowed(place.schema)
    if place.fields or place.variants or not ("<" in words or ">" in words or len(choices(place.schema)) > 1):
        return line
    return f"{line}  # {words}"


def _block(section: Place, value: Mapping[str, Any], printed: set[str]) -> Iterator[str]:
    """Lines for a section whose keys hold `value`, or their defaults and examples where it says nothing."""
    yield f"{section.key}:"
    for field in section.fields.values():
        yield from (f"  {line}" for line in _entry(field, value, printed))
