"""The answer of a response: what is left without its thinking blocks. A draft in a thought is not an answer."""

from __future__ import annotations

import re
from collections import Counter

_NAMES = r"(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad|seed:think)\s*"
_OPEN = rf"<{_NAMES}>|\[THINK\]|◁think▷|<\|(?:begin_of_thought|START_THINKING)\|>|<\|channel\|>analysis<\|message\|>"
_CLOSE = rf"</{_NAMES}>|\[/THINK\]|◁/think▷|<\|(?:end_of_thought|END_THINKING)\|>|<\|channel\|>final<\|message\|>"
_TAG = re.compile(rf"(?i)(?=[<\[◁])(?:{_OPEN}|{_CLOSE})")
_TOKEN = re.compile(
    rf"(?P<open>(?P<begins>(?:^|(?<=[.!?:>]))[ \t]*)?(?:{_OPEN}))|(?P<close>{_CLOSE})"
    r"|(?P<fence>^[ \t]*```|\"{3}|'{3})|(?P<quote>(?<!\\)[\"`]|(?<![A-Za-z\\])'|(?<!\\)'(?![A-Za-z]))"
    r"|(?P<comment>(?:^|(?<=[ \t]))(?:\#|//)[ ])|(?P<line>\n)",
    re.MULTILINE | re.IGNORECASE,
)


def answer_part(response: str) -> str:
    """`response` without its thinking blocks; empty when it was cut inside one.

    A block that is never closed was cut, if it begins a line or follows a sentence; elsewhere its tag is a word. A
    closing tag without an opening one ends a thought that the prompt opened (Qwen3, DeepSeek-R1 and others put
    `<think>` into the generation prompt): everything before it is thought, so that nested blocks end with their last
    tag. Tags inside a quoted string or a fenced block, and lone closing ones in a comment, are text. Linear in the
    text's length.
    """
    if not _TAG.search(response):
        return response
    kept: list[str] = []
    place, thought, cut = 0, None, False  # where the answer continues, where a thought begins, and if it may be cut
    for tag, commented in _tags(response):
        if tag.lastgroup == "open":
            if thought is None or (tag["begins"] is not None and not cut):
                thought, cut = tag.start(), tag["begins"] is not None
        elif thought is not None or not commented:
            if thought is None:
                kept.clear()
            else:
                kept.append(response[place:thought])
            place, thought, cut = tag.end(), None, False
    return "".join([*kept, response[place : thought if cut else None]])


def _tags(text: str) -> list[tuple[re.Match[str], bool]]:
    """The tags that are no text of a program, and whether they stand in a comment."""
    tags: list[tuple[re.Match[str], bool, dict[tuple[int, str], int]]] = []
    marks: Counter[tuple[int, str]] = Counter()  # quotes by their line, fences under line -1
    line, comment = 0, -1
    for token in _TOKEN.finditer(text):
        match token.lastgroup:
            case "fence":
                marks[-1, token[0].strip()] += 1
            case "quote":
                marks[line, token[0]] += 1
            case "comment":
                comment = line
            case "line":
                line += 1
            case _:
                keys = [(-1, "`" * 3), (-1, '"' * 3), (-1, "'" * 3), (line, "`"), (line, '"'), (line, "'")]
                tags.append((token, comment == line, {key: marks[key] for key in keys}))
    # A tag is in a string or a fenced block if there is an odd number of some mark before it and an odd number behind.
    return [
        (tag, commented)
        for tag, commented, before in tags
        if not any(count % 2 and (marks[key] - count) % 2 for key, count in before.items())
    ]
