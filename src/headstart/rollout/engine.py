"""The in-process rollout engine: batched sampling with a key-value cache, from the very weights that are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch

from headstart.interfaces import RolloutEngine
from headstart.models.causal import CausalModel
from headstart.models.decoder import Prefill
from headstart.models.packed import hosts
from headstart.models.sharded import alone
from headstart.progress import doing
from headstart.ranks.sharding import division_of
from headstart.ranks.turns import in_turns
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout.decoding import Decoding, Row, encoded, so_far, token_limits
from headstart.rollout.memory import copies_fit, fitting_batch
from headstart.rollout.sampling import sample_tokens
from headstart.rollout.static import Capture, CudaCapture, StaticRows
from headstart.streams import uniforms


class InProcessEngine(RolloutEngine):
    """Samples from `model`; a rollout ends at a stop token (kept in the completion) or at its horizon.

    A prompt is encoded once for all its samples that enter the batch together. Finished rows leave the batch and
    waiting ones, longest prompt first, take their places. On a GPU decoding steps are captured over memory that
    stays, and on a CPU rows decode in a cache that grows. `capture` replaces CUDA graphs, on any device.
    """

    def __init__(self, model: CausalModel, stop_ids: Sequence[int], capture: Capture | None = None) -> None:
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self._capture = capture
        self._static: StaticRows | None = None

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
        candidates: int = 0,
        prefill: Prefill | None = None,
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`."""

        limits = token_limits(max_tokens, prompts)
        pairs = list(zip(prompts, limits, strict=True))
        rows = [Row(prompt, sample, limit) for prompt, limit in pairs for sample in range(samples)]

        def draws(row: Row) -> npt.NDArray[np.float64]:
            return uniforms(key, [(row.prompt.index, row.sample)], 0, row.limit).reshape(-1)

        capacity = min(batch_size or len(rows), len(rows))
        places = max((len(prompt.token_ids) + limit for prompt, limit in pairs), default=0)
        # A pass that gathers layers makes tensors which training uses too, so they must not be inference tensors.
        with alone(self.model), self.model.sampling_mode(), torch.inference_mode(not in_turns(self.model.backbone)):
            if not rows:
                return []
            decoder = self._decoder(capacity, places, sampling, candidates)
            # Captured steps outlive this call, and copies of weights do not.
            copies = isinstance(decoder, _GrowingRows) and copies_fit(self.model)
            weights = self.model.copied_weights() if copies else nullcontext()
            batch = _Batch(decoder, rows, capacity, draws, prefill)
            # Counted by whoever looks.
            with weights, doing("sampling tokens", lambda: so_far(rows)):
                while batch.refill():
                    for row in batch.advance():
                        finished(self._rollout(row, candidates))
        if self._static is not None and division_of(self.model.model) is not None:
            self._static.release()  # captured steps hold the gathered weights
        return [self._rollout(row, candidates) for row in rows]

    def alone(self) -> AbstractContextManager[None]:
        """See `RolloutEngine.alone`."""
        return alone(self.model)

    def fitting(self, prompts: Sequence[Prompt], max_tokens: int) -> int:
        """See `RolloutEngine.fitting`. The memory that captured steps keep is given back first."""
        if self._static is not None:
            self._static.release()
        return fitting_batch(self.model, prompts, max_tokens)

    def prefill(self, prompts: Sequence[Prompt]) -> Prefill | None:
        """See `RolloutEngine.prefill`."""
        return self.model.prefill([prompt.token_ids for prompt in prompts], graph=True)

    def _decoder(self, capacity: int, places: int, sampling: Sampling, candidates: int) -> _GrowingRows | StaticRows:
        top = min(max(candidates - 1, 0), self.model.vocabulary)
        growing = _GrowingRows(self.model, self.stop_ids, sampling, top)
        if self.model.shifts:
            return growing
        if self._capture is None and self.model.device.type == "cuda":
            self._capture = CudaCapture(self.model.device)
        if self._capture is not None and self._static is None:
            self._static = StaticRows(self.model, self.stop_ids, self._capture)
        if self._static is None or not capacity or not self._static.suits():
            return growing
        self._static.begin(capacity, places, sampling, top)
        return self._static

    def _rollout(self, row: Row, candidates: int) -> Rollout:
        stopped, ids_NK = row.tokens[-1] in self.stop_ids, row.candidates(candidates)
        return Rollout(row.prompt, row.sample, tuple(row.tokens), stopped, candidate_ids=ids_NK)


class _GrowingRows:
    """Rows at places 0, 1, ... of a batch, in a cache that grows with them. `StaticRows` is the other way."""

    leave = 4
    """The batch is compacted once 1/leave of its rows have finished: compaction copies the cache."""

    def __init__(self, model: CausalModel, stop_ids: frozenset[int], sampling: Sampling, top: int) -> None:
        """`top` most probable ids are kept of each row's distribution."""
        self._model, self._stop_ids, self._sampling, self._top = model, stop_ids, sampling, top
        self._state: Decoding

    def start(self, rows: Sequence[Row], prefill: Prefill | None) -> None:
        """`rows` enter an empty batch, from `prefill` where that holds their prompts."""
        self._state = encoded(self._model, rows, share=True, prefill=prefill)

    def put(self, places: Sequence[int], rows: Sequence[Row], prefill: Prefill | None) -> None:
        """`rows` take these places."""
        self._state.put(places, encoded(self._model, rows, prefill=prefill))

    def keep(self, places: Sequence[int]) -> None:
        """Only these places stay; they become 0, 1, ..."""
        self._state.keep(places)

    def advance(self, rows: Sequence[Row]) -> list[Row]:
        """A token for each of `rows`, which hold the places in order; those that ended, in order of time."""
        logits_BV = self._state.logits_BV
        if self._model.never:
            never = torch.tensor(self._model.never, device=logits_BV.device)
            logits_BV = logits_BV.index_fill(1, never, -torch.inf)
        uniform_B = torch.tensor([row.uniform_N[min(len(row.tokens), row.limit - 1)] for row in rows])
        token_B = sample_tokens(logits_BV, uniform_B.to(logits_BV.device), self._sampling)
        if self._top:
            for row, ids in zip(rows, logits_BV.topk(self._top, dim=-1).indices.cpu().numpy(), strict=True):
                if not row.done:
                    row.tops.append(ids)
        ended = [row for row, token in zip(rows, token_B.tolist(), strict=True) if row.take(token, self._stop_ids)]
        if not all(row.done for row in rows):
            self._state.step(token_B, [not row.done for row in rows])
        return ended


class _Batch:
    """The rows decoded at once, at most `capacity`, and the rows still waiting."""

    def __init__(
        self,
        decoder: _GrowingRows | StaticRows,
        rows: Sequence[Row],
        capacity: int,
        draws: Callable[[Row], npt.NDArray[np.float64]],
        prefill: Prefill | None,
    ) -> None:
        self._decoder, self._capacity, self._draws, self._prefill = decoder, capacity, draws, prefill
        # Longest first, so that whoever enters later rarely needs more places than the batch has; beside each prompt
        # those with which it begins, which are then not encoded again. The sort is stable: the samples of a prompt
        # stay together.
        host = hosts(row.prompt.token_ids for row in rows)
        order = {prompt: k for k, prompt in enumerate(host)}

        def place(row: Row) -> tuple[int, int, int]:
            whole = host[row.prompt.token_ids]
            return -len(whole), order[whole], -len(row.prompt.token_ids)

        self._waiting = sorted(rows, key=place)[::-1]
        self._rows: list[Row] = []

    def refill(self) -> bool:
        """Let finished rows leave and waiting ones enter; False when no rows are left.

        Encoding those who enter costs about two tokens of the whole batch, so an eighth of it must be done first;
        what making the batch smaller costs, the decoder knows.
        """
        done = [place for place, row in enumerate(self._rows) if row.done]
        live = len(self._rows) - len(done)
        if live and len(done) * (8 if self._waiting else self._decoder.leave) < len(self._rows):
            return True
        entering = [self._waiting.pop() for _ in range(min(self._capacity - live, len(self._waiting)))]
        for row in entering:
            row.uniform_N = self._draws(row)
        if live:
            self._replace(done, entering)
        else:
            self._rows = entering
            if entering:
                self._decoder.start(entering, self._prefill)
        return bool(self._rows)

    def _replace(self, done: list[int], entering: list[Row]) -> None:
        if entering:
            self._decoder.put(done[: len(entering)], entering, self._prefill)
            for place, row in zip(done, entering, strict=False):
                self._rows[place] = row
        if len(entering) < len(done):
            live = [place for place, row in enumerate(self._rows) if not row.done]
            self._rows = [self._rows[place] for place in live]
            self._decoder.keep(live)

    def advance(self) -> list[Row]:
        """One more token or several for every row; the rows that ended, in order of time."""
        return self._decoder.advance(self._rows)
