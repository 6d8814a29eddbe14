"""The answer of a response: what is left without its thinking blocks. A draft in a thought is not an answer."""

from __future__ import annotations

import re

_NAMES = r"(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|seed:think)"
# An opening tag starts a line; a closing one ends a word, so that `text.split("</think>")` in a program is neither.
_TAG = re.compile(
    rf"(?P<open>^[ \t]*(?:<{_NAMES}>|\[THINK\]|◁think▷))|(?P<close>(?:</{_NAMES}>|\[/THINK\]|◁/think▷)(?=\s|\Z|[*#`\\]))",
    re.MULTILINE | re.IGNORECASE,
)


def answer_part(response: str) -> str:
    """`response` without its thinking blocks; empty when it was cut inside one.

    A closing tag without an opening one ends a thought that the prompt opened (Qwen3, DeepSeek-R1 and others put
    `<think>` into the generation prompt): everything before it is thought. Linear in the text's length.
    """
    kept: list[str] = []
    place, thinking = 0, False
    for tag in _TAG.finditer(response):
        if tag["open"]:
            if not thinking:
                kept.append(response[place : tag.start()])
            thinking = True
        else:
            if not thinking:
                kept.clear()
            thinking, place = False, tag.end()
    return "".join(kept) if thinking else "".join([*kept, response[place:]])
