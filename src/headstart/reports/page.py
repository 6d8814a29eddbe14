"""A report as sections of blocks, written as one HTML file and as Markdown with figures beside it.

Blocks are independent of the output format; the terminal writer is in `headstart.cli.show`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from headstart.errors import RunFolderError
from headstart.files import make_folder, write_atomic


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `kind` is empty, `soft`, `outcome` or `warning`."""

    text: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """The first column names the row; the others are figures, or sentences where it is `prose`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure as SVG text; `name` is its file name, `alt` describes it for readers who cannot see it."""

    name: str
    svg: str
    alt: str
    caption: str

    @property
    def uri(self) -> str:
        """A data URI: embedded as an image rather than inline markup, so that ids of figures cannot clash."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


@dataclass(frozen=True, slots=True)
class Code:
    """Verbatim text, such as a command or a configuration."""

    text: str


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a rollout: its text, a shade from 0 (none) to 5, and the note shown on hovering."""

    text: str
    shade: int
    note: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """A rollout, token by token; `notes` name its most divergent tokens in words."""

    title: str
    tokens: Sequence[Token]
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that HTML shows on demand and Markdown always."""

    summary: str
    blocks: Sequence[Block]


Block = Text | Table | Picture | Code | Tokens | Fold


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Page:
    """`lead` comes before the first section."""

    title: str
    lead: Sequence[Block]
    sections: Sequence[Section]


def write(page: Page, out: Path) -> list[Path]:
    """Write `page` to `out` (HTML, self-contained and offline) and its Markdown copy beside it; returns both paths.

    The copy's figures go into `<stem>_figures/`. Raises RunFolderError when the files cannot be written.
    """
    copy, figures = out.with_suffix(".md"), out.with_name(f"{out.stem}_figures")
    blocks = [*page.lead, *(block for section in page.sections for block in section.blocks)]
    try:
        make_folder(out.parent)
        for picture in _pictures(blocks):
            make_folder(figures)
            write_atomic(figures / f"{picture.name}.svg", picture.svg)
        write_atomic(out, html(page))
        write_atomic(copy, markdown(page, figures.name))
    except RunFolderError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise RunFolderError(
            f"the report cannot be written to {out}: {reason}. Choose another place with --out."
        ) from error
    return [out, copy]


def html(page: Page) -> str:
    """The page as one HTML document."""
    from jinja2 import Environment, StrictUndefined

    source = files("headstart.reports").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["a"] = lambda block, kind: type(block).__name__ == kind
    return environment.from_string(source).render(page=page)


def markdown(page: Page, figures: str) -> str:
    """The same content as Markdown; figures are linked in the folder `figures`."""
    parts = [f"# {_plain(page.title)}", *(_block(block, figures) for block in page.lead)]
    for section in page.sections:
        parts += [f"## {_plain(section.title)}", *(_block(block, figures) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block, figures: str) -> str:
    match block:
        case Text(text, kind):
            return f"> {_plain(text)}" if kind in ("outcome", "warning") else _plain(text)
        case Table(header, rows, prose):
            lines = [header, ["---"] + ["---" if prose else "---:"] * (len(header) - 1), *rows]
            return "\n".join(
                f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in lines
            )
        case Picture(name, _, alt, caption):
            return f"![{_plain(alt)}]({figures}/{name}.svg)\n\n*{_plain(caption)}*"
        case Code(text):
            return _fenced(text)
        case Tokens(title, tokens, notes):
            text = "".join(f"{token.text}⟨{token.note.split()[0]}⟩" if token.shade else token.text for token in tokens)
            return "\n\n".join([f"**{_plain(title)}**", _fenced(text), *(f"- {_plain(note)}" for note in notes)])
        case Fold(summary, blocks):
            return "\n\n".join([f"**{_plain(summary)}**", *(_block(inner, figures) for inner in blocks)])


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _plain(text: str) -> str:
    """One line of text with all Markdown markup escaped."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def _pictures(blocks: Sequence[Block]) -> Iterator[Picture]:
    """Every figure, those inside folds included."""
    for block in blocks:
        if isinstance(block, Picture):
            yield block
        elif isinstance(block, Fold):
            yield from _pictures(block.blocks)
