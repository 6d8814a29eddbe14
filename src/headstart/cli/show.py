"""What every verb shows: that it loads, and the blocks of its report on the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from headstart.interfaces import OnProgress
from headstart.progress import first_rank, printing, shown
from headstart.reports.page import Block, Code, Fold, Picture, Table, Text, Tokens

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"outcome": "bold", "warning": "yellow", "soft": "dim"}
_INTERVAL = re.compile(r" \[[^\]]*\]")


def loading() -> AbstractContextManager[OnProgress]:
    """While the libraries are imported that the models need: seconds in which nothing else could be said."""
    return shown("loading torch and transformers")


def show(blocks: Iterable[Block], console: Console | None = None) -> None:
    """The blocks of a page as a terminal can show them: without pictures, folds open."""
    console = printing(console)
    for block in blocks:
        match block:
            case Text(text, kind):
                say(text, console, STYLES.get(kind, ""))
            case Table() if first_rank():
                console.print(_table(block, console.width))
            case Fold(summary, inner):
                say(summary, console, "bold")
                show(inner, console)
            case Code(text):
                say(text, console)
            case Table() | Picture() | Tokens():
                pass  # on the page


def say(text: str, console: Console | None = None, style: str = "") -> None:
    """A paragraph as it is: brackets are no markup, and a pipe gets it unbroken."""
    if first_rank():
        printing(console).print(text, style=style, soft_wrap=True, highlight=False, markup=False)


def _table(block: Table, width: int) -> object:
    """A table; intervals stay on the page where the terminal is too narrow for them."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    rows = [[str(cell) for cell in row] for row in block.rows]
    if _width(block.header, rows) > width:
        rows = [[_INTERVAL.sub("", cell) for cell in row] for row in rows]
    table = RichTable(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    for place, name in enumerate(block.header):
        table.add_column(name, justify="right" if place and not block.prose else "left")
    for row in rows:
        table.add_row(*map(RichText, row))
    return table


def _width(header: Iterable[str], rows: list[list[str]]) -> int:
    """Characters of a table whose headers may wrap at spaces and whose cells may not."""
    words = [max(map(len, name.split()), default=0) for name in header]
    cells = [max((len(row[column]) for row in rows), default=0) for column in range(len(words))]
    return sum(max(pair) + 2 for pair in zip(words, cells, strict=True))
