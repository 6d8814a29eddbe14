"""A configuration as text: the annotated default, a resolved one, and the JSON schema."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from headstart.config.schema import Config
from headstart.config.shape import MISSING, Place, choices, root
from headstart.config.text import write_yaml

_HEADER = """\
# Every setting of a run with its default. Only student, teacher and prompts are required (what stands there now is an
# example); leave out whatever should stay as it is. On the command line, section.key=value overrides this file.
"""


def annotated_default() -> str:
    """The whole default configuration as YAML that `load` accepts, each key under its description.

    Required keys hold an example. Other types of a tagged section, and sections that are null by default, follow as
    commented-out blocks.
    """
    told: set[str] = set()
    sections = ("\n".join(_entry(place, _start(place), told)) for place in root().fields.values())
    return _HEADER + "\n" + "\n\n".join(sections) + "\n"


def resolved(config: Config) -> str:
    """`config` as YAML, every key written out; `load` reads it back to an equal Config."""
    return write_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _start(place: Place) -> Any:
    """The value printed for a place: its default, or an example where it has none."""
    if place.default is not MISSING:
        return place.default
    return place.example


def _entry(place: Place, value: Any, told: set[str]) -> Iterator[str]:
    """Lines for one key: description, the key with its value, and what may stand there instead.

    `told` holds the paths whose alternatives are printed already: every divergence has the same supports.
    """
    yield from (f"# {line}" for line in wrap(place.description, 110))
    if value is None or not (place.fields or place.variants):
        yield _leaf(place, value)
        others = [place] if place.fields else []
    else:
        chosen = place.within(value)
        yield from _block(chosen, value, told)
        others = []
        for variant in place.variants.values():  # several tags can share one place
            if variant not in (chosen, *others):
                others.append(variant)
    if place.path not in told:
        told.add(place.path)
        for other in others:
            yield "# or:"
            yield from (f"# {line}" for line in _block(other, {}, told))


def _leaf(place: Place, value: Any) -> str:
    line = f"{place.key}: {write_yaml(value, flow=True)}"
    bounded = any(sign in place.allowed for sign in "<>")
    if place.fields or not (bounded or len(choices(place.schema)) > 1):
        return line
    return f"{line}  # {place.allowed}"


def _block(section: Place, value: dict[str, Any], told: set[str]) -> Iterator[str]:
    """Lines for a section whose keys hold `value`, or their defaults and examples where it says nothing."""
    yield f"{section.key}:"
    for name, field in section.fields.items():
        yield from (f"  {line}" for line in _entry(field, value.get(name, _start(field)), told))
