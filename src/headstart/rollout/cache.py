"""Caches: one with room to grow, whose rows can be taken out and overwritten during decoding, and one that stays
where it is.

transformers' dynamic cache makes a new tensor for every token and layer. Decoding 384 short rows on a CPU spent 89% of
its time there, in page faults; writing into reserved room took half the time with the same values. Recurrent and
convolution layers keep states of one size for any number of tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def reserving_cache(config: Any) -> DynamicCache:
    """A cache for a model of `config` whose attention layers reserve room.

    Sliding-window layers keep all tokens as well: the model's mask hides those outside the window, and rows of
    different length can then be moved about alike in every layer.
    """
    cache = DynamicCache(config=config)
    attention = (DynamicLayer, DynamicSlidingWindowLayer)
    cache.layers = [ReservingLayer() if type(layer) in attention else layer for layer in cache.layers]
    return cache


def states(layer: Any) -> list[Tensor]:
    """What a recurrent or convolution layer keeps, `[B, ...]` each."""
    groups = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
    return [state for group in groups for state in group.values() if state is not None]


class ReservingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values `[B, heads, length, head_dim]`: views, from `_start` to `_end`, of wider stores."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._stores: tuple[Tensor, ...] | None = None
        self._start = self._end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states.shape[2]
        if self._stores is None or self._stores[0].shape[2] < self._end + new:
            self._widen(key_states, value_states)
        assert self._stores is not None
        start, self._end = self._start, self._end + new
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store.narrow(2, self._end - new, new).copy_(states)
        self.keys, self.values = (store.narrow(2, start, self._end - start) for store in self._stores)
        return self.keys, self.values

    def _widen(self, key_states: Tensor, value_states: Tensor) -> None:
        """Stores with room for more than these; what is kept moves to their beginning."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self._end - self._start
        stores = tuple(_store(x, length + x.shape[2]) for x in (key_states, value_states))
        if length:
            stores[0][:, :, :length], stores[1][:, :, :length] = self.keys, self.values
        self._stores, self._start, self._end = stores, 0, length

    def keep(self, length: int) -> None:
        """Forget all but the last `length` places. Nothing is copied."""
        self._start = self._end - length
        self.keys, self.values = self.keys[:, :, -length:], self.values[:, :, -length:]

    def pad(self, places: int) -> None:
        """Pad on the left, so that rows with `places` more tokens can enter."""
        self._replace(*(nn.functional.pad(x, (0, 0, places, 0)) for x in (self.keys, self.values)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Only the rows named by `beam_idx` (repeats allowed), in that order."""
        self._replace(*(x.index_select(0, beam_idx) for x in (self.keys, self.values)))

    def _replace(self, keys: Tensor, values: Tensor) -> None:
        self._stores, self._start, self._end = None, 0, 0
        self.update(keys, values)

    def put(self, rows: Tensor, other: ReservingLayer) -> None:
        """Overwrite `rows` with those of `other`, right-aligned. What stays to their left is masked, and finite: a
        masked NaN would still spoil the attention."""
        width = other.get_seq_length()
        self.keys[:, :, -width:].index_copy_(0, rows, other.keys)
        self.values[:, :, -width:].index_copy_(0, rows, other.values)


class StaticLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values `[B, heads, T, head_dim]` in storage that neither moves nor grows.

    A token of row b goes to place `place_B[b]`, a number that stays on the device, and attention sees all T places:
    the mask says which of them count.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, place_B: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._place_B = keys, values, place_B
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            store.scatter_(2, self._place_B[:, None, None, None].expand_as(states), states)
        return self.keys, self.values


def _store(like: Tensor, length: int) -> Tensor:
    rows, heads, _, width = like.shape
    return like.new_empty(rows, heads, length + max(64, length // 2), width)
