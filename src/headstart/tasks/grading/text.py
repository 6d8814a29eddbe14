r"""Graders of plain text: exact, last number, last box. Pure, linear in the text's length, and they never raise.

Status is `correct`, `wrong` or `no_answer`. They compare strings and plain numbers only: `1/2` and `\frac{1}{2}` differ
for them.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal
from itertools import pairwise
from typing import NamedTuple

from headstart.records import Verdict

# A sign counts only where it cannot be a minus between two things ("3-4" ends in 4). ASCII digits only.
_NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)\]}])[-+])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
# Two backslashes are a line break, so a brace after them is a real one; yet a box escaped twice is still read as a box.
_BRACES = re.compile(r"\\boxed\s*\{|\\(?!\\boxed).|[{}]", re.DOTALL)
# A space matters only between two letters or digits: "x = 3" is "x=3", but "1 2" is not "12".
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")


def grade_exact(response: str, gold: str) -> Verdict:
    """Compare the stripped response with the stripped gold answer."""
    answer = response.strip()
    return _verdict(answer == gold.strip(), answer) if answer else Verdict(correct=False, status="no_answer")


def grade_number(response: str, gold: str) -> Verdict:
    """Compare the last number of the response with the gold number, as decimals (`18.0` is `18`).

    Thousands commas and dollar signs are dropped. Gold may end in GSM8K's `#### 42`.
    """
    answer, expected = last_number(response), gold_number(gold)
    if answer is None:
        return Verdict(correct=False, status="no_answer")
    return _verdict(answer == expected, str(answer.normalize()))


def grade_boxed(response: str, gold: str) -> Verdict:
    r"""Compare the last complete `\boxed{...}` with the gold answer, up to white space, or as numbers if both are.

    Gold may be bare, boxed itself, or end in `#### 42`. Details: `first_box` says whether the *first* complete box is
    right, `open_box` whether a box was opened and never closed (a truncated response).
    """
    boxes = find_boxes(response)
    expected = _gold_box(gold)
    first = bool(boxes.complete) and _same(boxes.complete[0], expected)
    details = {"first_box": first, "open_box": boxes.open}
    if not boxes.complete or not boxes.complete[-1].strip():
        return Verdict(correct=False, status="no_answer", details=details)
    return _verdict(_same(boxes.complete[-1], expected), _normal(boxes.complete[-1]), details)


def last_number(text: str) -> Decimal | None:
    """The last number written in `text`, or None."""
    found = deque(_NUMBER.finditer(_plain_number(text)), maxlen=1)
    return Decimal(found[0][0].replace(",", "")) if found else None


def gold_number(gold: str) -> Decimal | None:
    """The number of a gold answer: after the last `####` if there is one, else the last number; None without one."""
    return last_number(gold.rsplit("####", 1)[-1])


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` holds, braces balanced, or None. Of nested boxes the inner one counts."""
    complete = find_boxes(text).complete
    return complete[-1] if complete else None


def has_answer_mark(text: str) -> bool:
    r"""Whether the text already gives its answer away: a complete `\boxed{...}` or a `####` line with a number."""
    _, mark, rest = text.rpartition("####")
    return last_boxed(text) is not None or (bool(mark) and last_number(rest) is not None)


class Boxes(NamedTuple):
    r"""What the complete boxes of a text hold, and whether one was opened and never closed (a truncated response)."""

    complete: tuple[str, ...]  # in order of their opening
    open: bool


def find_boxes(text: str) -> Boxes:
    r"""The `\boxed{...}` of a text, braces balanced; of nested boxes only the inner one."""
    # One pass with a stack: looking for the closing brace of each box on its own is quadratic on "\boxed{" * n.
    stack: list[int | None] = []  # where a box's content starts; None for an ordinary brace
    spans: list[tuple[int, int]] = []
    for token in _BRACES.finditer(text):
        match token[0]:
            case "{":
                stack.append(None)
            case "}":
                start = stack.pop() if stack else None
                if start is not None:
                    spans.append((start, token.start()))
            case box if len(box) > 2:
                stack.append(token.end())
    inner = _innermost(sorted(spans))
    return Boxes(tuple(text[start:end] for start, end in inner), any(start is not None for start in stack))


def _innermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    r"""Spans without those that hold another one: `\boxed{\boxed{4}}` is one answer, and copies stay linear."""
    return [span for span, following in pairwise([*spans, (-1, -1)]) if not span[0] <= following[0] < span[1]]


def _gold_box(gold: str) -> str:
    boxed = last_boxed(gold)
    return gold.rsplit("####", 1)[-1] if boxed is None else boxed


def _same(answer: str, expected: str) -> bool:
    if _normal(answer) == _normal(expected):
        return True
    left, right = _whole_number(answer), _whole_number(expected)
    return left is not None and left == right


def _whole_number(text: str) -> Decimal | None:
    """The number that `text` is as a whole, or None."""
    found = _NUMBER.fullmatch(_plain_number(text).strip())
    return None if found is None else Decimal(found[0].replace(",", ""))


def _plain_number(text: str) -> str:
    for written, plain in (("\\!", ""), ("{,}", ","), ("\\$", ""), ("$", ""), ("\N{MINUS SIGN}", "-")):
        text = text.replace(written, plain)
    return text


def _normal(text: str) -> str:
    return _LOOSE_SPACE.sub("", " ".join(text.split()))


def _verdict(correct: bool, answer: str, details: dict[str, bool] | None = None) -> Verdict:
    return Verdict(correct, "correct" if correct else "wrong", details or {}, answer)
