"""The answer of a response: what is left without its thinking blocks. A draft in a thought is not an answer."""

from __future__ import annotations

import re
from typing import NamedTuple

_NAMES = r"(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad|seed:think)\s*"
_TOKEN = re.compile(
    rf"(?P<open>(?P<begins>(?:^|(?<=[.!?:>]))[ \t]*)?(?:<{_NAMES}>|\[THINK\]|◁think▷"
    r"|<\|(?:begin_of_thought|START_THINKING)\|>|<\|channel\|>analysis<\|message\|>))"
    rf"|(?P<close></{_NAMES}>|\[/THINK\]|◁/think▷|<\|(?:end_of_thought|END_THINKING)\|>|<\|channel\|>final<\|message\|>)"
    # What tells that a tag is text of a program: an odd number of these marks before it and behind it.
    r"|(?P<fence>^[ \t]*```|\"{3}|'{3})|(?P<quote>(?<!\\)[\"`]|(?<![A-Za-z\\])'|(?<!\\)'(?![A-Za-z]))"
    r"|(?P<comment>(?:^|(?<=[ \t]))(?:\#|//)[ ])|(?P<line>\n)",
    re.MULTILINE | re.IGNORECASE,
)


class _Tag(NamedTuple):
    opens: bool
    begins: bool  # at the start of a line or behind a sentence, where a thought begins that may be cut
    start: int
    end: int
    line: int
    comment: bool
    before: dict[str, int]  # marks up to the tag: fences in the text, quotes in the line


def answer_part(response: str) -> str:
    """`response` without its thinking blocks; empty when it was cut inside one.

    A block that is never closed was cut, if it begins a line or follows a sentence; elsewhere its tag is a word. A
    closing tag without an opening one ends a thought that the prompt opened (Qwen3, DeepSeek-R1 and others put
    `<think>` into the generation prompt): everything before it is thought, so that nested blocks end with their last
    tag. Tags inside a quoted string or a fenced block, and lone closing ones in a comment, are text. Linear in the
    text's length.
    """
    kept: list[str] = []
    place, thought, cut = 0, None, False  # where the answer goes on, where a thought begins, and if it may be cut
    for tag in _tags(response):
        if tag.opens:
            if thought is None or (tag.begins and not cut):
                thought, cut = tag.start, tag.begins
        elif thought is not None or not tag.comment:
            if thought is None:
                kept.clear()
            else:
                kept.append(response[place:thought])
            place, thought, cut = tag.end, None, False
    return "".join([*kept, response[place : thought if cut else None]])


def _tags(text: str) -> list[_Tag]:
    tags: list[_Tag] = []
    lines: list[dict[str, int]] = []  # the quotes of every line
    fences: dict[str, int] = {}
    quotes: dict[str, int] = {}
    line, comment = 0, False
    for token in _TOKEN.finditer(text):
        match token.lastgroup:
            case "fence":
                mark = token[0].strip()
                fences[mark] = fences.get(mark, 0) + 1
            case "quote":
                quotes[token[0]] = quotes.get(token[0], 0) + 1
            case "comment":
                comment = True
            case "line":
                lines.append(quotes)
                quotes, line, comment = {}, line + 1, False
            case kind:
                before = {**fences, **quotes}
                begins = token["begins"] is not None
                tags.append(_Tag(kind == "open", begins, token.start(), token.end(), line, comment, before))
    lines.append(quotes)
    return [tag for tag in tags if not _inside(tag.before, {**fences, **lines[tag.line]})]


def _inside(before: dict[str, int], total: dict[str, int]) -> bool:
    return any(count % 2 and (total[mark] - count) % 2 for mark, count in before.items())
