"""How a verb's free arguments are read: an optional file first, then `section.key=value` overrides."""

from __future__ import annotations

from pathlib import Path


def file_and_overrides(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """`RUN.yaml a.b=c` -> (RUN.yaml, [a.b=c]); without a file -> (None, all arguments)."""
    given = arguments or []
    # An override may be longer than any file name, which the file system says with an error.
    if not given or ("=" in given[0] and (len(given[0]) > 255 or not Path(given[0]).exists())):
        return None, given
    return Path(given[0]), given[1:]
