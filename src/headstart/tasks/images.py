"""Images in the rows of a source: found, fetched where that is asked for, and digested. Pixels are read later."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from headstart.config.prompts import PromptsConfig, SourceConfig
from headstart.errors import DataError
from headstart.pictures import Picture
from headstart.tasks.reading import is_file_source

PART, MARK = ("image", "image_url", "input_image"), "<image>"
"""Types of message parts that are images; and how conversations whose images are in a column mark their places."""
KEYS = ("bytes", "base64", "image", "path", "url", "image_url")
SECONDS, LARGEST = 60, 2**26
"""What fetching one address may take, in seconds and bytes."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Where the images of a source are: files seen from `folder`, and addresses where `allowed` is urls."""

    allowed: Literal["files", "urls"] | None
    folder: Path

    @classmethod
    def of(cls, config: PromptsConfig, source: SourceConfig, *, given: bool) -> Gallery:
        """`given`: its rows came from Python."""
        allowed = config.images or ("files" if config.sees else None)
        own = not given and is_file_source(source.source)
        return cls(allowed, Path(source.source).expanduser().parent if own else Path())

    def pictures(self, value: Any, where: str) -> Iterator[Picture]:
        """What a cell holds: null, an image or a list of them. Raises DataError for what is none or is not there."""
        match value:
            case None:
                return
            case list() | tuple():
                for item in value:
                    yield from self.pictures(item, where)
            case bytes() | bytearray():
                yield _digested(bytes(value), bytes(value), f"{len(value):,} bytes")
            case str():
                yield self._named(value, where)
            case Mapping():
                found = [(key, value[key]) for key in KEYS if value.get(key) is not None]
                if not found:
                    raise DataError(
                        f"{where}: an image is an object with {', '.join(value)}; expected {' or '.join(KEYS)}"
                    )
                key, inner = found[0]
                yield from self.pictures(_decoded(inner, where) if key == "base64" else inner, where)
            case _ if hasattr(value, "save") and hasattr(value, "getexif"):  # Pillow's
                value.save(file := io.BytesIO(), "png")
                yield _digested(file.getvalue(), file.getvalue(), "an image in memory")
            case _:
                raise DataError(f"{where}: an image is a {type(value).__name__}; expected a path or bytes")

    def _named(self, name: str, where: str) -> Picture:
        if name.startswith("data:"):
            data = _decoded(name.partition("base64,")[2], where)
            return _digested(data, data, f"{name[:30]}...")
        if name.startswith(("http://", "https://")):
            if self.allowed != "urls":
                raise DataError(
                    f"{where}: the image {name[:200]!r} is an address, and addresses are fetched only when asked for: "
                    "set prompts.images=urls, or give files"
                )
            return _digested(data := _fetched(name, where), data, name)
        path = self.folder / Path(name).expanduser()
        try:
            return _digested(path.read_bytes(), path, name)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"{where}: the image {name[:200]!r} cannot be read ({reason}; seen from {str(self.folder)!r}); correct "
                "the path or remove the row"
            ) from error


def lifted(
    turns: Sequence[Any], gallery: Gallery, column: Sequence[Picture], where: str
) -> tuple[list[Any], tuple[Picture, ...]]:
    """Turns with text for content where it had image parts, and the images with their places, in order.

    Those of the `column` go to parts that name no image themselves, else to the marks `<image>` in the text, else in
    front of the first user turn's text. Raises DataError where their numbers differ.
    """
    waiting, made, found = list(column), [dict(t) if isinstance(t, Mapping) else t for t in turns], list[Picture]()
    for number, turn in enumerate(made):
        key = "content" if isinstance(turn, dict) and "content" in turn else "value"
        content = turn.get(key) if isinstance(turn, dict) else None
        if isinstance(content, str) and waiting and MARK in content:
            content = _marked(content)
        if not isinstance(content, list) or not any(map(_is_image, content)):
            continue
        if gallery.allowed is None:
            kind = next(part for part in content if _is_image(part))["type"]
            raise DataError(
                f"{where}: the content has a part of type {kind!r}, but models are loaded without what sees images: "
                "set prompts.images=files, or remove the row"
            )
        turn[key], images = _text_and_images(content, gallery, waiting, where)
        found += [replace(image, turn=number) for image in images]
    if waiting and not found:
        first = next((n for n, turn in enumerate(made) if isinstance(turn, dict) and _asks(turn)), 0)
        return made, tuple(replace(image, turn=first) for image in waiting)
    if waiting:
        raise DataError(f"{where}: {len(column)} images for {len(column) - len(waiting)} places in the messages")
    return made, tuple(found)


def _text_and_images(
    parts: Sequence[Any], gallery: Gallery, waiting: list[Picture], where: str
) -> tuple[str, list[Picture]]:
    text, images, last = "", list[Picture](), "image"
    for part in parts:
        if _is_image(part):
            own = list(gallery.pictures({k: v for k, v in part.items() if k != "type"} or None, where))
            if not own and not waiting:
                raise DataError(f"{where}: an image part without an image; name the column in prompts.image_column")
            images += [replace(image, place=len(text)) for image in own or [waiting.pop(0)]]
            last = "image"
            continue
        said = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(said, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{where}: the content has a part of type {kind!r} that is no text; remove the row")
        text, last = f"{text}{chr(10) * (last == 'text')}{said}", "text"
    return text, images


def _marked(content: str) -> list[dict[str, str]]:
    """Text with marks, as parts."""
    first, *rest = content.split(MARK)
    parts = [{"type": "text", "text": first}] * bool(first)
    for text in rest:
        parts += [{"type": "image"}, *[{"type": "text", "text": text}] * bool(text)]
    return parts


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in PART


def _asks(turn: Mapping[str, Any]) -> bool:
    return turn.get("role") == "user" or turn.get("from") in ("human", "user")


def _digested(data: bytes, content: bytes | Path, name: str) -> Picture:
    return Picture(hashlib.sha256(data).hexdigest()[:16], content, name)


def _decoded(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise DataError(f"{where}: an image is no base64 text ({error})") from error


def _fetched(address: str, where: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=SECONDS) as reply:
            data: bytes = reply.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: the image {address[:200]!r} cannot be fetched ({error}); give a file") from error
    if len(data) > LARGEST:
        raise DataError(f"{where}: the image {address[:200]!r} has more than {LARGEST >> 20} MiB; give a smaller file")
    return data
