"""How a file gets to its place whole or not at all, and stays there."""

from __future__ import annotations

import json
import os
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
