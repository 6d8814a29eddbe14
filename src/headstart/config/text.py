"""YAML text to plain data and back: bounded, without duplicate keys, and with `5e-5` a number in both directions."""

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
"""Bounds of a text, its values counted with anchors written out. PyYAML takes a second for a text close to them; the
whole schema is 25,000 characters, 300 values and 6 levels."""
# YAML 1.2 floats. PyYAML follows YAML 1.1, where 5e-5 and 1.0e5 are text.
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values = self.levels = 0
        self.extents: dict[Any, tuple[int, int]] = {}

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level > MAX_LEVELS:  # the scanner is quadratic in the open brackets
            raise ValueError("nested too deeply")
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node. Counts values and levels as if every alias were written out, which few lines make many."""
        before, beside, alias = self.values, self.levels, self.check_event(yaml.AliasEvent)
        self.values, self.levels = before + 1, 0
        if self.values > MAX_VALUES:
            raise ValueError(
                f"more than {MAX_VALUES:,} keys and values, which is no configuration; remove what is no setting"
            )
        node = super().compose_node(parent, index)
        if not alias:
            self.extents[node] = self.values - before, self.levels + 1
        values, levels = self.extents.get(node, (MAX_VALUES, 0))  # an alias inside its own anchor has none yet
        if before + values > MAX_VALUES:
            raise ValueError(f"anchors that hold themselves, or make more than {MAX_VALUES:,} values; write them out")
        if levels > MAX_LEVELS:
            raise ValueError("nested too deeply")
        self.values, self.levels = before + values, max(beside, levels)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Checked before merge keys (<<) are expanded, since those repeat keys on purpose.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    what = f"the key {key.value} stands here and in line {lines[key.value]}"
                    raise ComposerError(None, None, what, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
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


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Only double quotes escape: PyYAML folds U+0085 in the other styles, and it comes back as a space.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = {
    # Dates are read as text: a revision may be called 2025-01-31.
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The data in `text`. Raises yaml.YAMLError (with line and column where they are known) or ValueError."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, which is no configuration; name a YAML file of settings")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_yaml(data: Any, flow: bool = False) -> str:
    """`data` as YAML that `read_yaml` reads back equal; on one line with `flow`."""
    width = 9999 if flow else 120
    text = yaml.dump(data, Dumper=_Dumper, default_flow_style=flow, allow_unicode=True, sort_keys=False, width=width)
    return text.removesuffix("...\n").strip() if flow else text


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
    """`value` as messages quote it: on one line, text in quotes, shortened to `width` characters."""
    return short(json.dumps(value, ensure_ascii=False), width)


def short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
