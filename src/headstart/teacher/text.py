"""The text itself as what the student is compared with: supervised fine-tuning in the place of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from headstart.errors import ConfigError
from headstart.interfaces import LogitSource, Teacher
from headstart.losses.divergence import token_logprobs, working
from headstart.records import Divergence, Rollout


class TextScores(LogitSource):
    """Cross-entropy, -ln p of each token that was written: forward KL from a distribution that is certain of it."""

    def logits(self, rows: slice | Tensor) -> Tensor:
        """There are none. Raises ConfigError: a custom horizon may ask for the teacher's distribution."""
        raise ConfigError("divergence.type: sft has no teacher's distribution, which this horizon reads; use another")

    def compare(self, student_mV: Tensor, rows: slice, tokens_m: Tensor) -> Divergence:
        """See `losses.chunked.Comparing`."""
        surrogate_m = -token_logprobs(working(student_mV), tokens_m)
        return Divergence(surrogate_m.detach(), surrogate_m)


class TextTeacher(Teacher):
    """Scores nothing: each position's target is its own token."""

    def score(self, rollouts: Sequence[Rollout], prefill: Any = None) -> LogitSource:
        """See `Teacher.score`."""
        return TextScores()
