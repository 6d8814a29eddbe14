"""Graded responses on disk: one JSON object per line, appended as they are made, read back whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.errors import DataError
from headstart.records import GradedResponse, Verdict


def to_line(row: GradedResponse) -> str:
    """One line of `rows.jsonl`, in ASCII: a response may hold half of a surrogate pair, which UTF-8 cannot."""
    return json.dumps(asdict(row)) + "\n"


def read_rows(path: Path, *, torn: bool = False) -> list[GradedResponse]:
    """The rows of a `rows.jsonl`. Raises DataError naming the line that cannot be read; with `torn`, a last line that a
    kill cut short is left out instead.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); name a folder that `headstart evaluate` wrote") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line or (torn and number == len(lines)):
            continue
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a graded response ({error})") from error
    return rows


def _row(data: dict[str, Any]) -> GradedResponse:
    return GradedResponse(**{**data, "verdict": Verdict(**data["verdict"])})
