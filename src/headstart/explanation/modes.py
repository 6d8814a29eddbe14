"""The mode of a rollout: which kind of response it has set out to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from headstart.explanation.cast import Cast
from headstart.models.collate import completion_text
from headstart.records import Rollout

OPENING = 16
"""Tokens of a response that count as its opening."""
CLUSTERS = 6
"""Openings that are modes of their own; the others are one mode, `OTHER`."""
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Modes:
    """How modes are told apart, in words, and the mode of every rollout of each set."""

    told_by: str
    of: tuple[tuple[str, ...], ...]


def opening(tokenizer: Any, rollout: Rollout, tokens: int = OPENING) -> str:
    """The text of the rollout's first tokens."""
    cut = len(rollout.completion_ids) > tokens
    first = replace(rollout, completion_ids=rollout.completion_ids[:tokens], stopped=False) if cut else rollout
    return completion_text(tokenizer, first)


def modes(cast: Cast, *sets: Sequence[Rollout]) -> Modes:
    """The mode of each rollout: the state of its first `horizon` tokens (clean, wrong, finished) where the task can
    tell, else its opening if that is among the most frequent of all sets."""
    if cast.task is not None and any(len(r.completion_ids) > cast.horizon for rollouts in sets for r in rollouts):
        states = tuple(tuple(_state(cast, r) for r in rollouts) for rollouts in sets)
        if any(state not in ("unknown", "finished") for of in states for state in of):
            return Modes(f"state of the first {cast.horizon} tokens, told by the task", states)
    openings = [[opening(cast.pair.tokenizer, r) for r in rollouts] for rollouts in sets]
    return Modes(f"the {CLUSTERS} most frequent openings of {OPENING} tokens", by_frequency(openings))


def by_frequency(openings: Sequence[Sequence[str]], clusters: int = CLUSTERS) -> tuple[tuple[str, ...], ...]:
    """Each opening as it is if it is among the `clusters` most frequent of all sets together, else OTHER.

    Equal counts are kept in alphabetical order, so the result does not depend on the order of the rollouts.
    """
    counted = Counter(text for texts in openings for text in texts)
    kept = set(sorted(counted, key=lambda text: (-counted[text], text))[:clusters])
    return tuple(tuple(text if text in kept else OTHER for text in texts) for texts in openings)


def _state(cast: Cast, rollout: Rollout) -> str:
    if len(rollout.completion_ids) <= cast.horizon:
        return "finished"
    assert cast.task is not None
    return cast.task.prefix_state(
        cast.problems[rollout.prompt.index], opening(cast.pair.tokenizer, rollout, cast.horizon)
    )
