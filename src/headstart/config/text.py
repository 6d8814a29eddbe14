"""YAML text to plain data and back: closed against duplicate keys, and `5e-5` is a number on both ways."""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import Any

import yaml
from pydantic import BaseModel
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

MAX_CHARACTERS, MAX_VALUES, MAX_LEVELS = 200_000, 5_000, 50
"""Bounds of a text, its values counted with anchors written out: PyYAML takes a second for what is close to them, and
the whole schema is 25,000 characters, 300 values and 6 levels."""
# YAML 1.2 floats. PyYAML follows YAML 1.1, where 5e-5 and 1.0e5 are text.
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")


class _Loader(yaml.SafeLoader):
    composed = 0

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level > MAX_LEVELS:  # the scanner's time goes with the square of the brackets that are open
            raise ValueError("nested too deeply")
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.composed += 1
        if self.composed > MAX_VALUES:
            raise ValueError(
                f"more than {MAX_VALUES:,} keys and values, which is no configuration; remove what is no setting"
            )
        return super().compose_node(parent, index)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        values, levels = _extent(node, {})
        if values > MAX_VALUES:
            raise ValueError(f"anchors that hold themselves, or make more than {MAX_VALUES:,} values; write them out")
        if levels > MAX_LEVELS:
            raise ValueError("nested too deeply")
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # Python refuses this beyond 4,300 digits, as it refuses to read them
        except (ValueError, LookupError, AttributeError) as error:
            what = f"{shown(node.value)} cannot be read as {node.tag.rpartition(':')[2]}"
            raise ConstructorError(None, None, what, node.start_mark) from error
        return value

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Checked before merge keys (<<) are expanded, since those repeat keys on purpose.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    what = f"the key {key.value} stands here and in line {lines[key.value]}"
                    raise ComposerError(None, None, what, key.start_mark)
                lines[key.value] = line
        return node


def _extent(node: Any, seen: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values `node` has with its anchors written out, and on how many levels."""
    if not isinstance(node, yaml.CollectionNode):
        return 1, 1
    if id(node) not in seen:
        seen[id(node)] = MAX_VALUES, 1  # met again below only if it holds itself
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        extents = [_extent(part, seen) for part in parts]
        seen[id(node)] = 1 + sum(e[0] for e in extents), 1 + max((e[1] for e in extents), default=0)
    return seen[id(node)]


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Only double quotes escape: PyYAML folds U+0085 in the other styles, and it comes back as a space.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = {
    # Dates are read as the text they are: a revision may be called 2025-01-31.
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The data in `text`. Raises yaml.YAMLError (with the place where it knows it) or ValueError."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, which is no configuration; name a YAML file of settings")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_yaml(data: Any, flow: bool = False) -> str:
    """`data` as YAML that `read_yaml` reads back to the same; on one line with `flow`."""
    if flow:
        text = yaml.dump(data, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, sort_keys=False, width=9999)
        return text.removesuffix("...\n").strip()
    return yaml.dump(data, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=120)


def plain(data: Any) -> Any:
    """A copy of `data` in JSON's types. Raises TypeError for what YAML or Python can hold and a config cannot."""
    return json.loads(json.dumps(data, default=_plain))


def _plain(value: object) -> object:
    match value:
        case PurePath():
            return str(value)
        case BaseModel():
            return value.model_dump(mode="json")
    raise TypeError(f"a configuration cannot hold a {type(value).__name__}")


def shown(value: Any, width: int = 60) -> str:
    """`value` as it is shown in a message: on one line, text in quotes, shortened to `width` characters."""
    return short(json.dumps(value, ensure_ascii=False), width)


def short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
