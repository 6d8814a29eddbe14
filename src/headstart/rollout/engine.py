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
        self.stop_ids = frozenset(stop_ids)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int | Sequence[int],
        sampling: Sampling,
        key: tuple[int, str, int],
        batch_size: int | None = None,
        finished: Callable[[Rollout], None] = lambda rollout: None,
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`."""

        def draws(row: _Row) -> npt.NDArray[np.float64]:
            uniform_1N = uniforms(key, [(row.prompt.index, row.sample)], 0, row.limit)
            return uniform_1N.reshape(-1)

        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        pairs = list(zip(prompts, limits, strict=True))
        rows = [_Row(prompt, sample, limit) for prompt, limit in pairs for sample in range(samples)]
        batch = _Batch(self.model, rows, batch_size or len(rows), draws)
        with self.model.sampling_mode():
            while batch.refill():
                for row in batch.advance(sampling, self.stop_ids):
                    finished(self._rollout(row))
        return [self._rollout(row) for row in rows]

    def _rollout(self, row: _Row) -> Rollout:
        return Rollout(row.prompt, row.sample, tuple(row.tokens), row.tokens[-1] in self.stop_ids)


@dataclass(slots=True, eq=False)
class _Row:
    """A rollout in the making: which it is, its horizon, its uniform numbers once it decodes, its tokens so far."""

    prompt: Prompt
    sample: int
    limit: int
    uniform_N: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
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
        """Let finished rows leave and waiting ones enter; False when no rows are left.

        Encoding those who enter costs about two tokens of the whole batch, so an eighth of it must be done first;
        making the batch smaller copies the cache, for which a quarter must be done.
        """
        done = [place for place, row in enumerate(self._rows) if row.done]
        live = len(self._rows) - len(done)
        if live and len(done) * (8 if self._waiting else 4) < len(self._rows):
            return True
        entering = [self._waiting.pop() for _ in range(min(self._capacity - live, len(self._waiting)))]
        for row in entering:
            row.uniform_N = self._draws(row)
        if live:
            self._replace(done, entering)
        else:
            self._rows = entering
            self._state = _encoded(self._model, entering) if entering else None
        return bool(self._rows)

    def _replace(self, done: list[int], entering: list[_Row]) -> None:
        assert self._state is not None
        if entering:
            self._state.put(done[: len(entering)], _encoded(self._model, entering))
            for place, row in zip(done, entering, strict=False):
                self._rows[place] = row
        if len(entering) < len(done):
            live = [place for place, row in enumerate(self._rows) if not row.done]
            self._rows = [self._rows[place] for place in live]
            self._state = self._state.taken(live)

    def advance(self, sampling: Sampling, stop_ids: frozenset[int]) -> list[_Row]:
        """One more token for every row; the rows it was the last for. Rows that are done keep drawing until they leave;
        nothing reads it.
        """
        assert self._state is not None
        logits_BV = self._state.logits_BV
        uniform_B = torch.tensor([row.uniform_N[min(len(row.tokens), row.limit - 1)] for row in self._rows])
        token_B = sample_tokens(logits_BV, uniform_B.to(logits_BV.device), sampling)
        ended = []
        for row, token in zip(self._rows, token_B.tolist(), strict=True):
            if not row.done:
                row.tokens.append(token)
                row.done = token in stop_ids or len(row.tokens) == row.limit
                if row.done:
                    ended.append(row)
        if not all(row.done for row in self._rows):
            self._state.step(token_B, [not row.done for row in self._rows])
        return ended


def _encoded(model: CausalModel, rows: Sequence[_Row]) -> Decoding:
    """The state in which `rows` begin; each of their prompts is encoded once."""
    prompts = list({id(row.prompt): row.prompt for row in rows}.values())
    state = Decoding.of(model, prompts)
    if len(prompts) == len(rows):
        return state
    places = {id(prompt): place for place, prompt in enumerate(prompts)}
    return state.taken([places[id(row.prompt)] for row in rows])
