"""The in-process rollout engine: batched sampling with a key-value cache, from the very weights that are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from headstart.models.causal import CausalModel
from headstart.numerics.sampling import sample_tokens
from headstart.numerics.streams import uniforms
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout.decoding import Decoding


class InProcessEngine:
    """Samples from `model`; a rollout ends at a stop token (kept in the completion) or at its horizon.

    A prompt is encoded once for all its samples that enter the batch together. Finished rows leave the batch and
    waiting ones, longest prompt first, take their places.
    """

    def __init__(self, model: CausalModel, stop_ids: Sequence[int]) -> None:
        self.model = model
        self._stop_ids = frozenset(stop_ids)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int,
        sampling: Sampling,
        key: tuple[int, str, int],
        batch_size: int | None = None,
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`."""

        def draws(row: _Row) -> npt.NDArray[np.float64]:
            return uniforms(key, [(row.prompt.index, row.sample)], 0, max_tokens)[0]

        rows = [_Row(prompt, sample) for prompt in prompts for sample in range(samples)]
        batch = _Batch(self.model, rows, batch_size or len(rows), draws)
        with self.model.sampling_mode():
            while batch.refill():
                batch.advance(sampling, self._stop_ids, max_tokens)
        return [Rollout(r.prompt, r.sample, tuple(r.tokens), r.tokens[-1] in self._stop_ids) for r in rows]


@dataclass(slots=True, eq=False)
class _Row:
    """A rollout in the making: which it is, its uniform numbers once it decodes, its tokens so far."""

    prompt: Prompt
    sample: int
    uniform_N: npt.NDArray[np.float64] | None = None
    tokens: list[int] = field(default_factory=list)
    done: bool = False


class _Batch:
    """The rows decoded at once, at most `capacity`, and the rows still waiting."""

    def __init__(
        self,
        model: CausalModel,
        rows: Sequence[_Row],
        capacity: int,
        draws: Callable[[_Row], npt.NDArray[np.float64]],
    ) -> None:
        self._model, self._capacity, self._draws = model, capacity, draws
        # Longest first, so that whoever enters later needs no more places than the batch has. The sort is stable:
        # the samples of a prompt stay together.
        self._waiting = sorted(rows, key=lambda row: len(row.prompt.token_ids), reverse=True)[::-1]
        self._rows: list[_Row] = []
        self._state: Decoding | None = None

    def refill(self) -> bool:
        """Let finished rows leave and waiting prompts enter; False when no rows are left.

        Moving rows copies the cache, about the cost of decoding a token, so a quarter of the rows must be done first.
        """
        done = sum(row.done for row in self._rows)
        if self._rows and 4 * done < len(self._rows):
            return True
        keep = [place for place, row in enumerate(self._rows) if not row.done]
        room = (self._capacity - len(keep)) // self._samples
        entering = [self._waiting.pop() for _ in range(min(room, len(self._waiting)))]
        self.finished += [row for row in self._rows if row.done]
        self._rows = [self._rows[place] for place in keep]
        if not self._rows and not entering:
            return False
        parts = [(self._state, torch.tensor(keep, device=self._model.device))] if keep else []
        if entering:
            state = Decoding.of(self._model, [prompt for _, prompt in entering])
            index = torch.arange(len(entering), device=self._model.device).repeat_interleave(self._samples)
            parts.append((state, index))
        self._state = Decoding.gathered(parts)
        for place, prompt in entering:
            for sample, uniform_N in enumerate(self._draws(prompt)):
                self._rows.append(_Row((place, sample), prompt, uniform_N))
        return True

    def advance(self, sampling: Sampling, stop_ids: frozenset[int], max_tokens: int) -> None:
        """One more token for every row. Rows that are done keep drawing until they leave; nothing reads it."""
        uniform_B = torch.tensor([row.uniform_N[min(len(row.tokens), max_tokens - 1)] for row in self._rows])
        token_B = sample_tokens(self._state.logits_BV, uniform_B.to(self._model.device), sampling)
        for row, token in zip(self._rows, token_B.tolist(), strict=True):
            if not row.done:
                row.tokens.append(token)
                row.done = token in stop_ids or len(row.tokens) == max_tokens
        if not all(row.done for row in self._rows):
            self._state.step(token_B)
