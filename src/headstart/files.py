"""How a file gets to its place whole or not at all, and stays there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from headstart.errors import RunFolderError


def write_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` so that it holds the old or the new content at any moment.

    Raises RunFolderError when the file cannot be written, such as on a full disk; the old content is kept.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunFolderError(
            f"{path} cannot be written: {error.strerror or error}. Free space or make its folder writable."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written like `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make_folder(path: Path) -> None:
    """Make `path` and what is above it. Raises RunFolderError when that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be made: {error.strerror or error}; choose another folder") from error


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk: a rename or a new file survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, none where there is no file. A last line torn by a kill is cut off the file, so that
    the next record does not continue it."""
    if not path.exists():
        return []
    *whole, torn = path.read_text(encoding="utf-8").split("\n")
    if torn:
        path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return [json.loads(line) for line in whole]


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add records to a JSONL file, on disk before this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def refuse_other_settings(what: str, stored: Mapping[str, Any], asked: Mapping[str, Any], remedy: str) -> None:
    """Raise RunFolderError where `what` was begun with other settings, naming those that differ."""
    asked = json.loads(json.dumps(asked))
    keys = [key for key in {**stored, **asked} if stored.get(key) != asked.get(key)]
    if keys:
        raise RunFolderError(f"{what} with other settings ({', '.join(keys)} differ); {remedy}")
