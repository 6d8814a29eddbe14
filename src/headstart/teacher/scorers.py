"""What a teacher elsewhere can say: log-probabilities of candidate tokens at each position of a completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headstart.losses.chunked import default_chunk, slices
from headstart.models.causal import CausalModel
from headstart.records import Prompt, Rollout

Array = npt.NDArray[Any]
Level = Literal["per_row", "full", "top_k", "sampled"]
"""Which log-probabilities of a prompt an endpoint gives: of ids chosen for each row, of all ids, of the `width` most
probable ids and the actual token, of the actual token alone."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an endpoint can give, and what it serves. None: not known."""

    level: Level
    model: str
    width: int | None = None
    """Ids per row that it gives; None without a limit."""
    max_positions: int | None = None
    """Its context, tokens."""
    tokenizer: str | None = None
    """Digest of how it splits a fixed set of texts."""
    version: str | None = None
    notes: tuple[str, ...] = ()
    """Why it gives no more."""

    def __str__(self) -> str:
        gives = {
            "per_row": "log-probabilities of the ids asked for at each token",
            "full": "log-probabilities of the whole vocabulary",
            "top_k": f"log-probabilities of its {self.width} most probable ids and of the sampled token",
            "sampled": "the log-probability of the sampled token alone: a policy gradient, no top-k divergence",
        }[self.level]
        return f"{self.model}: {gives}"


class CandidateScorer(Protocol):
    """Scores candidates; safe to call for many completions at once."""

    def begin(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], candidate_ids: Array, start: int = 0
    ) -> Callable[[], Array]:
        """Ask for log-probabilities (temperature 1) of `candidate_ids` `[rows, K]`; what is returned waits for them.

        Row i holds ids that may stand in the place of completion token `start + i`; -1 pads. The last id of a row that
        is not -1 is the token that stands there. The result, float32 `[rows, K]`, is NaN where the endpoint did not
        say (never for the last id) and -inf for padding. Waiting raises ServerError.
        """
        ...

    def score(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], candidate_ids: Array, start: int = 0
    ) -> Array:
        """`begin`, and wait."""
        return self.begin(prompt_ids, completion_ids, candidate_ids, start)()

    def capabilities(self) -> Capabilities: ...

    def received(self) -> int:
        """Bytes of all replies so far."""
        return 0

    def close(self) -> None:
        """Give up what is still asked for."""
        return


class LocalScorer(CandidateScorer):
    """A CausalModel behind the same protocol: exact, for tests and comparisons."""

    def __init__(self, model: CausalModel) -> None:
        self.model = model

    def capabilities(self) -> Capabilities:
        return Capabilities("per_row", str(self.model.model.config.name_or_path), None, self.model.max_positions)

    def begin(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], candidate_ids: Array, start: int = 0
    ) -> Callable[[], Array]:
        if not len(candidate_ids):
            return lambda: np.zeros(candidate_ids.shape, dtype=np.float32)
        prompt = Prompt(0, "", tuple(prompt_ids), tuple(prompt_ids))
        rollout = Rollout(prompt, 0, tuple(completion_ids)[: start + len(candidate_ids)], False)
        return lambda: self._scored(rollout, candidate_ids, start)

    @torch.no_grad()
    def _scored(self, rollout: Rollout, candidate_ids: Array, start: int) -> Array:
        ids_RK = torch.from_numpy(candidate_ids).to(self.model.device)
        with self.model.sampling_mode():
            hidden_RD = self.model.completion_hidden(self.model.batch([rollout], "teacher"))[start:]
        parts = [
            self.model.head(hidden_RD[rows]).log_softmax(-1).gather(-1, ids_RK[rows].clamp_min(0))
            for rows in slices(len(hidden_RD), default_chunk(self.model.vocabulary))
        ]
        scored: Array = torch.cat(parts).masked_fill(ids_RK < 0, -torch.inf).float().cpu().numpy()
        return scored


def actual(candidate_ids: Array) -> Array:
    """Which places hold the last id of their row, the token that stands there; bool `[rows, K]`."""
    given_RK = candidate_ids >= 0
    last_RK = np.cumsum(given_RK[:, ::-1], axis=1)[:, ::-1] == 1
    found: Array = given_RK & last_RK
    return found
