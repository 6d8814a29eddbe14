"""A teacher that sees more than the student, and how much of that the student says."""

from __future__ import annotations

from functools import lru_cache

from headstart.models.causal import CausalModel
from headstart.records import Rollout
from headstart.teacher.local import LocalTeacher

SPAN = 8
"""Tokens in a row that count as said after the context: fewer are often the question's own matter."""
Spans = frozenset[tuple[int, ...]]


class InformedTeacher(LocalTeacher):
    """Scores with its context in view, and counts the tokens of rollouts that stand in the context but not in what the
    student is shown. Where the student learns to quote what it cannot see, that count grows."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__(model)
        self._leaked = 0

    def submit(self, rollout: Rollout) -> None:
        """See `Teacher.submit`."""
        prompt, ids = rollout.prompt, rollout.completion_ids
        self._leaked += leaked(ids, prompt.token_ids, prompt.teacher_token_ids)

    def metrics(self) -> dict[str, float]:
        """See `Teacher.metrics`: `leaked_tokens`."""
        count, self._leaked = self._leaked, 0
        return {"leaked_tokens": float(count)}


def leaked(completion: tuple[int, ...], shown: tuple[int, ...], context: tuple[int, ...]) -> int:
    """Tokens of `completion` in runs of SPAN or more that `context` has and `shown` has not; all in one vocabulary."""
    secret = _spans(context) - _spans(shown)
    said = [n for n in range(len(completion) - SPAN + 1) if completion[n : n + SPAN] in secret]
    return len({place for n in said for place in range(n, n + SPAN)})


@lru_cache(maxsize=256)
def _spans(ids: tuple[int, ...]) -> Spans:
    return frozenset(ids[n : n + SPAN] for n in range(len(ids) - SPAN + 1))
