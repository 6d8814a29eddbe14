"""Do training prompts contain the test? Counts what is the same text, and what shares a long run of words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headstart.records import Problem

RUN = 13
"""Words in a row that two texts must share to be near (the length used by GPT-3's contamination check)."""
COMMON = 0.01
"""A run found in more than this share of the test problems is an instruction or a formula of the genre, not a copy."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Which test problems (by their place) are in the training prompts: `exact` as the same text, `near` in part.

    Example: `Overlap(train=7474, test=500, exact=(), near=(3, 17))`.
    """

    train: int
    test: int
    exact: tuple[int, ...]
    near: tuple[int, ...]

    def warning(self, task: str) -> str | None:
        """One line for the reader, or None without any overlap."""
        if not self.exact and not self.near:
            return None
        counts = (
            f"{task}: {len(self.exact)} of {self.test} test problems are among the {self.train} training prompts, "
            f"{len(self.near)} more share a run of {RUN} words with one"
        )
        if not self.exact:
            return f"{counts} (variants of a problem, or phrases of the genre)"
        return f"{counts}; its accuracy is inflated: remove these prompts or choose another test"


def overlap(train: Sequence[str], test: Sequence[str]) -> Overlap:
    """Test problems that occur in `train`: exactly (letter case and white space aside), or by a run of 13 words.

    Pass bare questions, without the instructions that a prompt puts around them. Runs are of words and numbers in
    lower case; texts shorter than a run can only match exactly. Time is linear in the words of both.
    """
    seen = {_letters(text) for text in train}
    exact = {place for place, text in enumerate(test) if _letters(text) in seen}
    runs = [frozenset(_runs(text)) for text in test]
    spread = Counter(run for own in runs for run in own)
    limit = max(1.0, COMMON * len(test))
    wanted = {run for run, count in spread.items() if count <= limit}
    shared: set[tuple[str, ...]] = set()
    for text in train:
        shared.update(wanted.intersection(_runs(text)))
    near = tuple(place for place, own in enumerate(runs) if place not in exact and not shared.isdisjoint(own))
    return Overlap(train=len(train), test=len(test), exact=tuple(sorted(exact)), near=near)


def question(problem: Problem) -> str:
    """What a problem asks, for `overlap`: its text, or what its user turns say."""
    turns = [message["content"] for message in problem.messages or () if message["role"] == "user"]
    return problem.text or "\n".join(turns)


def _letters(text: str) -> str:
    return "".join(text.casefold().split())


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return zip(*(words[start:] for start in range(RUN)), strict=False)
