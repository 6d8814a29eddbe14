"""Values on the wire: JSON with a tag for every container, so that only built-in types can come out."""

from __future__ import annotations

import builtins
import itertools
import os
import struct

TYPE_CHECKING = False  # `typing` costs 6 ms to import, in every sandbox
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SMALL = 2**63  # reading a long decimal number takes quadratic time, so larger ones travel in hexadecimal
ITERATOR_LIMIT = 100_000  # items taken from a returned iterator


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """`value` as tagged JSON data; what is not a plain value becomes a reference made by `refer`."""
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -SMALL <= number < SMALL else ["x", hex(number)]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, complex):
        return ["c", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["b", value.hex()]
    if isinstance(value, range):
        return ["r", [encode(part, refer) for part in (value.start, value.stop, value.step)]]
    if isinstance(value, dict):
        return ["d", [[encode(key, refer), encode(item, refer)] for key, item in dict.items(value)]]
    containers: tuple[tuple[str, Any], ...] = (("l", list), ("t", tuple), ("s", set), ("f", frozenset))
    for tag, container in containers:
        if isinstance(value, container):
            # A call per item would be half the cost of the large results of HumanEval+.
            return [
                tag,
                [
                    item if type(item) is int and -SMALL <= item < SMALL else encode(item, refer)
                    for item in container.__iter__(value)
                ],
            ]
    if hasattr(kind, "__next__") or kind in (type({}.keys()), type({}.values()), type({}.items())):
        return ["i", [encode(item, refer) for item in itertools.islice(value, ITERATOR_LIMIT)]]
    name = getattr(value, "__name__", "") if isinstance(value, type) else ""
    if name and vars(builtins).get(name) is value:
        return ["n", name]
    return ["h", refer(value)]


def decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    """The value of tagged JSON data: exact built-in types, and whatever `resolve` gives for a reference."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    tag, body = data
    match tag:
        case "l" | "t" | "s" | "f" | "i":
            items = [item if type(item) is int else decode(item, resolve) for item in body]
            return {"l": list, "t": tuple, "s": set, "f": frozenset, "i": iter}[tag](items)  # type: ignore[operator]
        case "d":
            return {decode(key, resolve): decode(item, resolve) for key, item in body}
        case "x":
            return int(body, 16)
        case "c":
            return complex(float(body[0]), float(body[1]))
        case "b":
            return bytes.fromhex(body)
        case "r":
            return range(*[int(decode(part, resolve)) for part in body])
        case "n" if isinstance(vars(builtins)[body], type):
            return vars(builtins)[body]
        case "h":
            return resolve(int(body))
    raise ValueError(f"unknown tag {tag!r}")


def frame(data: bytes) -> bytes:
    return struct.pack(">Q", len(data)) + data


def read_frame(fd: int) -> bytes | None:
    """The next frame, or None when the other side is gone."""
    header = _read_exactly(fd, 8)
    return None if header is None else _read_exactly(fd, struct.unpack(">Q", header)[0])


def _read_exactly(fd: int, size: int) -> bytes | None:
    parts = []
    while size > 0:
        part = os.read(fd, min(size, 2**20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
