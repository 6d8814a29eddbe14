"""Decoding in memory that stays: every step is the same work on the same tensors, so that it can be captured.

A row lies left-aligned: the token at position p is at place p of its row, and what a token sees follows from its
position alone. Drawing, stopping and counting happen on the device; the host looks every few steps at what was drawn.
Cache and state are allocated once for all steps; a step works on the leading rows and places that are needed, rounded
up to powers of two, and is captured once for each such shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from headstart.errors import first_line
from headstart.models.causal import FAILURES, FULL, SLIDING, CausalModel
from headstart.models.decoder import Prefill
from headstart.models.packed import ATTENTION
from headstart.models.stepper import Stepper
from headstart.records import Prompt, Sampling
from headstart.rollout.cache import ReservingLayer, StaticLayer
from headstart.rollout.decoding import Decoding, Row, encoded
from headstart.rollout.sampling import draw_tokens, require_finite

EVERY = 8
"""Steps between two looks of the host: after a look the device waits for the host, before it a row that ended waits."""
LEAST_ROWS, LEAST_PLACES = 8, 128
"""Smaller shapes are not worth a capture of their own."""


@dataclass(frozen=True, slots=True)
class _State:
    """B rows of up to T tokens: everything that a step reads and writes."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values `[B, heads, T, head_dim]`."""
    logits_BV: Tensor
    """Of every row's next token."""
    position_B: Tensor
    """Of every row's next token; its number of tokens so far."""
    end_B: Tensor
    """Where the row ends at the latest; it is done when it is there."""
    uniform_BT: Tensor
    tokens_BT: Tensor
    """Uniform numbers and drawn tokens by position."""

    @classmethod
    def like(cls, state: Decoding, B: int, T: int) -> _State:
        """All rows done, all values finite: a masked NaN would still spoil the attention."""
        logits_EV = state.logits_BV
        count = partial(torch.zeros, dtype=torch.int64, device=logits_EV.device)
        return cls(
            tuple((_storage(layer.keys, B, T), _storage(layer.values, B, T)) for layer in state.cache.layers),
            logits_EV.new_zeros(B, logits_EV.shape[1]),
            count(B),
            count(B),
            logits_EV.new_zeros(B, T, dtype=torch.float64),
            count(B, T),
        )

    def leading(self, B: int, T: int) -> _State:
        """The first B rows, with T places of their cache; the same memory."""
        layers = tuple((keys[:B, :, :T], values[:B, :, :T]) for keys, values in self.layers)
        return _State(layers, *(x[:B] for x in self.rows()))

    def rows(self) -> tuple[Tensor, ...]:
        return self.logits_BV, self.position_B, self.end_B, self.uniform_BT, self.tokens_BT


@dataclass(frozen=True, slots=True)
class _Tops:
    """The most probable ids `[B, EVERY, K]` of what each row drew since the host last looked, at position `start_B`."""

    ids_BSK: Tensor
    start_B: Tensor

    @classmethod
    def empty(cls, B: int, K: int, device: torch.device) -> _Tops:
        zeros = partial(torch.zeros, dtype=torch.int64, device=device)
        return cls(zeros(B, EVERY, K), zeros(B))

    def leading(self, B: int) -> _Tops:
        return _Tops(self.ids_BSK[:B], self.start_B[:B])

    def keep(self, state: _State) -> None:
        """The ids of this step. A row that does not move writes behind what it has drawn, where nobody reads."""
        top_BK = state.logits_BV.topk(self.ids_BSK.shape[2], dim=-1).indices
        step_B = (state.position_B - self.start_B).clamp_max(EVERY - 1)
        self.ids_BSK.scatter_(1, step_B[:, None, None].expand(-1, 1, top_BK.shape[1]), top_BK[:, None])


def _storage(like: Tensor, B: int, T: int) -> Tensor:
    return like.new_zeros(B, like.shape[1], T, like.shape[3])


class StaticRows:
    """Rows at places 0, 1, ... of a batch, decoded by captured steps; methods as in `engine._GrowingRows`.

    Memory and captured steps stay from one rollout to the next while the model's weights are the same tensors (their
    values may change) and neither more rows nor more places are asked for, nor less than a quarter of them.
    """

    leave = 2  # steps have powers of two

    def __init__(self, model: CausalModel, stop_ids: frozenset[int], capture: Capture) -> None:
        self._model, self._stop_ids, self._capture = model, stop_ids, capture
        self._stop_S = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=model.device)
        self._replays: dict[tuple[int, int, bool, Sampling, int], Work] = {}
        self._tops: dict[int, _Tops] = {}
        self._state: _State | None = None
        self._stepper: Stepper | None = None
        self._weights: tuple[object, ...] = ()
        self._captures = True
        self._suits: bool | None = None

    def suits(self) -> bool:
        """Whether the model decodes here as it does in a growing cache. Tried once; UserWarning where it does not."""
        if self._suits is None:
            reason = self._refusal()
            self._suits = reason is None
            if reason is not None:
                warnings.warn(f"rollouts are decoded without captured steps, which is slower: {reason}", stacklevel=2)
        return self._suits

    def begin(self, rows: int, places: int, sampling: Sampling, top: int = 0) -> None:
        """Make ready for up to `rows` rows at once of up to `places` tokens; `top` most probable ids are kept of each
        row's distribution."""
        model, T = self._model.model, -(-(places + 1) // 64) * 64
        weights = (self._model.fast, *(x.data_ptr() for x in (*model.parameters(), *model.buffers())))
        kept = (0, 0) if self._state is None else self._state.tokens_BT.shape
        if weights != self._weights or not (rows <= kept[0] and kept[1] >= T and kept[0] * kept[1] <= 4 * rows * T):
            self.release()
            self._shape, self._weights = (rows, T), weights
        self._capacity, self._sampling, self._complete, self._top = rows, sampling, False, top
        if top and top not in self._tops:
            self._tops[top] = _Tops.empty(self._shape[0], top, self._model.device)

    def release(self) -> None:
        """Give all memory back."""
        self._state = self._stepper = None
        self._replays.clear()
        self._tops.clear()
        self._capture.forget()

    def start(self, rows: Sequence[Row], prefill: Prefill | None) -> None:
        self.put(range(len(rows)), rows, prefill)
        self._narrow(len(rows))

    def put(self, places: Sequence[int], rows: Sequence[Row], prefill: Prefill | None) -> None:
        self._write(places, rows, encoded(self._model, rows, prefill=prefill))

    def _write(self, places: Sequence[int], rows: Sequence[Row], entering: Decoding) -> None:
        if self._state is None:
            self._state, self._stepper = _State.like(entering, *self._shape), entering.stepper
            if self._stepper is not None:
                self._stepper.reach(self._state.layers[0][0], self._shape[1])
        mine = self._state
        place_E, age_E = torch.tensor(places, device=self._model.device), entering.age_B
        uniform_ET = np.zeros((len(rows), mine.uniform_BT.shape[1]))
        for e, row in enumerate(rows):
            first = len(row.prompt.token_ids)
            uniform_ET[e, first : first + len(row.uniform_N)] = row.uniform_N
        end_E = age_E + torch.tensor([row.limit for row in rows], device=age_E.device)
        mine.uniform_BT[place_E] = torch.from_numpy(uniform_ET).to(age_E.device)
        mine.logits_BV[place_E], mine.position_B[place_E], mine.end_B[place_E] = entering.logits_BV, age_E, end_E
        P = entering.mask_BT.shape[1]  # whose rows lie right-aligned
        source_EP = (torch.arange(P, device=age_E.device) + P - age_E[:, None]).clamp_max(P - 1)
        for stores, layer in zip(mine.layers, entering.cache.layers, strict=True):
            for store, new in zip(stores, (layer.keys, layer.values), strict=True):
                store[:, :, :P].index_copy_(0, place_E, new.gather(2, source_EP[:, None, :, None].expand_as(new)))

    def keep(self, places: Sequence[int]) -> None:
        assert self._state is not None
        index = torch.tensor(places, device=self._model.device)
        for store in (*self._state.rows(), *(store for stores in self._state.layers for store in stores)):
            store[: len(places)] = store.index_select(0, index)
        self._narrow(len(places))

    def _narrow(self, rows: int) -> None:
        """Steps of the leading `rows` rows from now on; what stands behind them is done."""
        assert self._state is not None
        self._rows = min(self._capacity, _power(max(rows, LEAST_ROWS)))
        self._state.end_B[rows : self._rows] = self._state.position_B[rows : self._rows]

    def advance(self, rows: Sequence[Row]) -> list[Row]:
        """Up to EVERY tokens for each row. Raises NonFiniteError when a row's logits are not finite."""
        assert self._state is not None
        live = [row for row in rows if not row.done]
        steps = min(EVERY, max(row.limit - len(row.tokens) for row in live))
        places = max(len(row.prompt.token_ids) + len(row.tokens) for row in live) + steps
        state = self._state.leading(self._rows, self._state.tokens_BT.shape[1])
        before_B = state.position_B.clone()
        if self._top:
            self._tops[self._top].start_B[: self._rows] = before_B
        self._run(steps, min(_power(max(places, LEAST_PLACES)), state.tokens_BT.shape[1]))
        index_Bk = before_B[:, None] + torch.arange(steps, device=before_B.device)
        drawn_Bk = state.tokens_BT.gather(1, index_Bk.clamp_max(state.tokens_BT.shape[1] - 1))
        table = torch.cat([(state.position_B - before_B)[:, None], drawn_Bk], dim=1).tolist()  # the host waits here
        ended, stuck, ids_BSK = [], False, self._tops[self._top].ids_BSK.cpu().numpy() if self._top else None
        for place, (row, (moved, *tokens)) in enumerate(zip(rows, table, strict=False)):
            if ids_BSK is not None and not row.done:
                row.tops += [*ids_BSK[place, :moved].copy()]
            for step, token in enumerate(tokens[:moved]):
                if row.take(token, self._stop_ids):
                    ended.append((step, row))
            stuck |= not row.done and moved < steps
        if stuck:  # by logits that are not finite, or by a wide nucleus
            require_finite(state.logits_BV[: len(rows)])
            assert not self._complete, "a complete draw moves every row"
        self._complete = stuck
        return [row for _, row in sorted(ended, key=lambda pair: pair[0])]

    def _run(self, steps: int, places: int) -> None:
        """So many steps. The first one of a shape is done as it is, which warms up for its capture."""
        assert self._state is not None
        key = (self._rows, places, self._complete, self._sampling, self._top)
        if key not in self._replays:
            state = self._state.leading(self._rows, places)
            tops = self._tops[self._top].leading(self._rows) if self._top else None
            step = partial(self._step, state, self._sampling, self._complete, tops)
            self._capture.warm(step)
            self._replays[key] = self._captured(step)
            steps -= 1
        for _ in range(steps):
            self._replays[key]()

    def _captured(self, step: Work) -> Work:
        if self._captures:
            try:
                return self._capture.capture(step)
            except RuntimeError as error:
                self._captures = False
                warnings.warn(
                    f"decoding steps run uncaptured, which is slower, for their capture failed: {first_line(error)}",
                    stacklevel=2,
                )
        return step

    def _step(self, state: _State, sampling: Sampling, complete: bool, tops: _Tops | None = None) -> None:
        """Draw a token for every row and feed it. No number that changes from step to step is Python's."""
        position_B1 = state.position_B[:, None]
        if tops is not None:
            tops.keep(state)
        uniform_B = state.uniform_BT.gather(1, position_B1).squeeze(1)
        token_B, drawn_B = draw_tokens(state.logits_BV, uniform_B, sampling, complete=complete)
        moves_B = (state.position_B < state.end_B) & drawn_B
        state.tokens_BT.scatter_(1, position_B1, token_B[:, None])  # no row's token yet where the row does not move
        stops_B = moves_B & (token_B[:, None] == self._stop_S).any(dim=1)
        state.position_B.add_(moves_B)
        state.end_B.copy_(torch.where(stops_B, state.position_B, state.end_B))
        # Rows that are done are fed at place 0, which nobody reads any more: there may be no position beyond theirs.
        place_B = (state.position_B - moves_B.long()) * (state.position_B < state.end_B)
        logits_BV = self._fed(state, token_B, place_B)
        state.logits_BV.copy_(torch.where(moves_B[:, None], logits_BV, state.logits_BV))

    def _fed(self, state: _State, token_B: Tensor, place_B: Tensor) -> Tensor:
        """Logits `[B, V]` after `token_B`, which goes to `place_B`."""
        model, place_B1 = self._model, place_B[:, None]
        cache = Cache(layers=[StaticLayer(keys, values, place_B) for keys, values in state.layers])
        place_T = torch.arange(state.layers[0][0].shape[2], device=token_B.device)
        seen_BT = place_T <= place_B1
        if self._stepper is not None:
            return model.head(self._stepper(token_B, place_B, seen_BT, cache))
        near_BT = seen_BT if model.window is None else seen_BT & (place_T > place_B1 - model.window)
        mask = self._mask(seen_BT, near_BT)
        return model.head(model.hidden(token_B[:, None], mask, place_B1, cache)[:, -1])

    def _mask(self, seen_BT: Tensor, near_BT: Tensor) -> Any:
        """What the model's own attention takes: `[B, 1, 1, T]`, by kind of layer where there are several kinds."""
        kinds, dtype = self._model.layer_kinds, self._model.model.dtype
        masks = {FULL: seen_BT[:, None, None], SLIDING: near_BT[:, None, None]}
        if self._model.backbone.config._attn_implementation == "eager":  # adds its mask
            least = torch.finfo(dtype).min
            masks = {kind: (~mask).to(dtype) * least for kind, mask in masks.items()}
        return masks if len(kinds) > 1 else masks[next(iter(kinds))]

    def _refusal(self) -> str | None:
        """Why this model cannot decode here, from one step of two rows; None if it can."""
        attention, strange = self._model.backbone.config._attn_implementation, self._model.layer_kinds - {FULL, SLIDING}
        if attention not in ("sdpa", "eager", ATTENTION):
            return f"attention {attention!r} takes no mask of ours; use attention sdpa or eager"
        if strange or not self._model.caches:
            return f"the model has layers of {', '.join(sorted(strange)) or 'its own kind'}"
        ids = [tuple(i % self._model.vocabulary for i in range(k, 3 * k)) for k in (3, 5)]
        rows = [Row(Prompt(0, "", prompt, prompt), 0, 1, np.zeros(1)) for prompt in ids]
        state = Decoding.of(self._model, [row.prompt for row in rows])
        if not all(type(layer) is ReservingLayer for layer in state.cache.layers):
            return "its cache keeps more than keys and values"
        try:
            self.begin(len(rows), max(map(len, ids)) + 1, Sampling())
            self._write(range(len(rows)), rows, state)
            assert self._state is not None
            token_B = state.logits_BV.argmax(-1)
            found_BV = self._fed(self._state, token_B, state.age_B)
        except FAILURES as error:
            return f"a step of {type(self._model.backbone).__name__} failed ({first_line(error)})"
        state.step(token_B, [True, True])
        if not self._model.agree(found_BV, state.logits_BV):
            return f"a step of {type(self._model.backbone).__name__} gave other logits than in a growing cache"
        return None


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


Work = Callable[[], None]


class Capture(Protocol):
    """How a decoding step is recorded. Its work must touch the same tensors every time and never ask for a value."""

    def warm(self, work: Work) -> None:
        """Do the work where it will be captured: libraries set up what they may not set up during a capture."""

    def capture(self, work: Work) -> Work:
        """What does the same work again. Nothing of it is done yet. RuntimeError where it cannot be captured."""

    def forget(self) -> None:
        """All that was captured has been dropped."""


class CudaCapture:
    """Raw CUDA graphs on one stream of their own. They share their memory, for they run one after another and leave
    what they made in tensors that were there before."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream(device)
        self.forget()

    def warm(self, work: Work) -> None:
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            work()
        here.wait_stream(self._stream)

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")  # other threads keep running
        # torch.cuda.graph stays on its stream when a capture fails; the context around it does not.
        with torch.cuda.stream(torch.cuda.current_stream(self._stream.device)), recording:
            work()
        return graph.replay

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines: libraries keep a workspace for every stream that they ever saw."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
