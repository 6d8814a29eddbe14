"""YAML text to plain data and back: closed against duplicate keys, and `5e-5` is a number on both ways."""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import Any

import yaml
from pydantic import BaseModel
from yaml.composer import ComposerError

# YAML 1.2 floats. PyYAML follows YAML 1.1, where 5e-5 and 1.0e5 are text.
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")


class _Loader(yaml.SafeLoader):
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
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= width else f"{text[: width - 3]}..."
