"""Where two records of settings differ, key by key with both values: the words of a refusal to resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.config.text import shown
from headstart.errors import RunFolderError
from headstart.files import write_json

Differences = dict[str, tuple[Any, Any]]
"""(value before, value now) by dotted key; "absent" where there is none."""


def flat(record: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Values by dotted key: `{"training": {"steps": 4}}` is `{"training.steps": 4}`. A section's type comes first, as
    overrides want it."""
    found: dict[str, Any] = {}
    for key in sorted(record, key=lambda key: key != "type"):
        value = record[key]
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """What differs between two records, both taken as the JSON they are written as. A setting that is null is as good
    as absent: an older version's record lacks those that came since."""
    old, new = (flat(json.loads(json.dumps(record))) for record in (before, now))
    unlike = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return {key: (old.get(key, "absent"), new.get(key, "absent")) for key in unlike}


def described(found: Differences) -> list[str]:
    """One line for each difference: `training.steps: 6 -> 4`."""
    return [f"{key}: {shown(before)} -> {shown(now)}" for key, (before, now) in found.items()]


def refuse_other_settings(what: str, stored: Mapping[str, Any], asked: Mapping[str, Any], remedy: str) -> None:
    """Raise RunFolderError where `what` was begun with other settings, naming each that differs with both values."""
    if other := described(differences(stored, asked)):
        raise RunFolderError(f"{what} with other settings ({'; '.join(other)}); {remedy}")


def keep_settings(path: Path, what: str, asked: Mapping[str, Any], remedy: str) -> None:
    """Write what was `asked` to `path`; where it stands there already, refuse other settings."""
    if path.exists():
        refuse_other_settings(what, json.loads(path.read_text(encoding="utf-8")), asked, remedy)
    else:
        write_json(path, asked)


def chosen_before(path: Path) -> dict[str, Any]:
    """The settings at `path` where an earlier call chose them for its `minutes`; else empty."""
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return stored if "minutes" in stored else {}
