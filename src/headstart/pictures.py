"""Pictures in chat messages. No torch and no Pillow at run time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Picture:
    """An image in a chat turn: it stands before character `place` of the content of turn `turn`.

    Messages stay text, so nothing that reads, compares or hashes them meets pixels; two pictures are the same where
    their bytes (`sha256`) and places are. `content` is the file, or its bytes; `name` is for messages of errors.
    """

    sha256: str
    content: Path | bytes = field(compare=False, repr=False)
    name: str = field(default="", compare=False)
    turn: int = 0
    place: int = 0
