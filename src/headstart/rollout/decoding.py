"""The rows being decoded: what they are, and their cache, their mask, the logits of their next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from headstart.models.apart import Kept, SharedPrompts, may_part
from headstart.models.causal import CausalModel, Sight
from headstart.models.decoder import FastDecoder, Prefill
from headstart.models.stepper import Stepper
from headstart.records import Prompt
from headstart.rollout.cache import ReservingLayer, reserving_cache, states

SHARED = 2**20
"""Bytes per layer that a step need not read from which sharing prompts is faster: at .7 MB it takes .02 ms longer, at
14 MB a fifth of the time."""


def token_limits(max_tokens: int | Sequence[int], prompts: Sequence[Prompt]) -> Sequence[int]:
    """One horizon for each prompt, from what `RolloutEngine.generate` takes."""
    return [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens


@dataclass(slots=True, eq=False)
class Row:
    """A rollout in the making: which it is, its horizon, its uniform numbers once it decodes, its tokens so far."""

    prompt: Prompt
    sample: int
    limit: int
    uniform_N: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """One for each token that it may have."""
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    tops: list[npt.NDArray[np.int64]] = field(default_factory=list)
    """Per token the most probable ids when it was drawn, where candidates are asked for."""

    def take(self, token: int, stop_ids: frozenset[int]) -> bool:
        """One more token; whether it was the last. Rows that are done keep drawing until they leave: not taken."""
        if self.done:
            return False
        self.tokens.append(token)
        self.done = token in stop_ids or len(self.tokens) == self.limit
        return self.done

    def candidates(self, width: int) -> npt.NDArray[np.int64] | None:
        """`Rollout.candidate_ids` with `width` columns; None for 0."""
        if not width:
            return None
        ids_NK = np.full((len(self.tokens), width), -1, dtype=np.int64)
        for n, top in enumerate(self.tops):
            ids_NK[n, : len(top)] = top
        ids_NK[:, -1] = self.tokens
        return ids_NK


@dataclass(slots=True)
class Decoding:
    """B rows of different age (tokens seen so far) side by side, right-aligned in T places."""

    model: CausalModel
    cache: Any
    mask_BT: Tensor
    age_B: Tensor
    logits_BV: Tensor
    """Logits of every row's next token."""
    stepper: Stepper | None = None
    """What feeds tokens; without one the model's own forward does."""
    shared: SharedPrompts | None = None
    """Prompts that lie there once for all their rows; the cache has what follows them."""
    shift_B: Tensor | None = None
    """What is added to a row's age for its position, where prompts show images."""

    @classmethod
    def of(
        cls, model: CausalModel, prompts: Sequence[Prompt], share: bool = False, prefill: Prefill | None = None
    ) -> Decoding:
        """One row for each prompt, encoded together, if not in `prefill`; equal ones once, where the model has a fast
        decoder, whose rows may `share` what they have in common."""
        fast = model.fast
        if fast is not None:
            ids = [prompt.token_ids for prompt in prompts]
            if prefill is None or not {*ids} <= {*prefill.prompts.tokens}:
                prefill = model.encode(fast, ids)
            return cls._from_prefill(model, fast, prefill, ids, share)
        texts = [torch.tensor(prompt.token_ids) for prompt in prompts]
        ids_BP = pad_sequence(texts, True, model.pad_id, "left")
        mask_BP = pad_sequence([torch.ones_like(text) for text in texts], True, 0, "left").to(model.device)
        # Without a cache of the model's own it is the texts that rows keep.
        cache = reserving_cache(model.backbone.config) if model.caches else Cache(layers=[ReservingLayer()])
        ids_BP = ids_BP.to(model.device)
        sight = model.seen([prompt.images for prompt in prompts], ids_BP, mask_BP)
        shift_B = None if sight is None else sight.shift_B
        state = cls(model, cache, mask_BP, mask_BP.sum(dim=1), mask_BP, shift_B=shift_B)
        state._run(ids_BP, (mask_BP.cumsum(dim=1) - 1).clamp_min(0), sight)
        return state

    @classmethod
    def _from_prefill(
        cls, model: CausalModel, fast: FastDecoder, prefill: Prefill, ids: Sequence[tuple[int, ...]], share: bool
    ) -> Decoding:
        packed = prefill.prompts
        P = packed.place_UP.shape[1]
        length_U = packed.real_UP.sum(dim=1)
        # Padding goes from the right of a row to its left.
        moved_UP = (torch.arange(P, device=length_U.device) + length_U[:, None]) % P
        place_UP, mask_UP = packed.place_UP.gather(1, moved_UP), packed.real_UP.gather(1, moved_UP)
        number = {tokens: u for u, tokens in enumerate(packed.tokens)}
        prompt_B = [number[prompt] for prompt in ids]
        rows = torch.tensor(prompt_B, device=length_U.device)
        cache, shared = reserving_cache(model.backbone.config), None
        logits_BV = model.head(prefill.hidden_UD.detach()[rows])
        saved = (len(ids) - len(packed.tokens)) * P * sum(x[0].nbytes for x in prefill.kept[0])
        if share and saved > SHARED and may_part(logits_BV):
            shared = SharedPrompts.of([_cached(kept, place_UP) for kept in prefill.kept], mask_UP, prompt_B)
        else:
            for layer, kept in zip(cache.layers, prefill.kept, strict=True):
                layer.update(*_cached(kept, place_UP[rows]))
        return cls(model, cache, mask_UP[rows].long(), length_U[rows], logits_BV, model.stepper(fast), shared)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows (repeats allowed), in this order."""
        index = torch.tensor(rows, device=self.mask_BT.device)
        if self.shared is not None:
            self.shared = self.shared.keep(rows)
        self.cache.reorder_cache(index)
        self.mask_BT, self.age_B, self.logits_BV = self.mask_BT[index], self.age_B[index], self.logits_BV[index]
        self.shift_B = None if self.shift_B is None else self.shift_B[index]
        self._trim()

    def put(self, rows: Sequence[int], entering: Decoding) -> None:
        """Overwrite these rows with those of `entering`."""
        self._spread()
        if (wider := entering.mask_BT.shape[1] - self.mask_BT.shape[1]) > 0:
            self.mask_BT = pad(self.mask_BT, (wider, 0))
            for layer in self.cache.layers:
                if isinstance(layer, ReservingLayer):
                    layer.pad(wider)
        index = torch.tensor(rows, device=self.mask_BT.device)
        for mine, theirs in zip(self.cache.layers, entering.cache.layers, strict=True):
            if isinstance(mine, ReservingLayer):
                mine.put(index, theirs)
            for old, new in zip(states(mine), states(theirs), strict=True):
                old.index_copy_(0, index, new)
        self.mask_BT[index] = pad(entering.mask_BT, (self.mask_BT.shape[1] - entering.mask_BT.shape[1], 0))
        self.age_B[index], self.logits_BV[index] = entering.age_B, entering.logits_BV
        if self.shift_B is not None and entering.shift_B is not None:
            self.shift_B[index] = entering.shift_B
        self._trim()

    def step(self, token_B: Tensor, live: Sequence[bool]) -> None:
        """Feed one token to every row. Rows that are not live do not age: there may be no position beyond theirs."""
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.mask_BT[:, :1])], dim=1)
        self.age_B = self.age_B + (1 if all(live) else torch.tensor(live, device=self.age_B.device))
        if self.stepper is None:
            position_B = self.age_B - 1 if self.shift_B is None else self.age_B - 1 + self.shift_B
            self._run(token_B[:, None], position_B[:, None])
        else:
            context = (self.mask_BT, self.cache, self.shared)
            self.logits_BV = self.model.head(self.stepper(token_B, self.age_B - 1, *context))

    def _spread(self) -> None:
        """From now on every row has its prompt for itself."""
        if self.shared is not None:
            for i, layer in enumerate(self.cache.layers):
                keys, values = self.shared.spread(i, layer.keys, layer.values)
                self.cache.layers[i] = ReservingLayer()
                self.cache.layers[i].update(keys, values)
            self.shared = None

    def _trim(self) -> None:
        """As few places as the oldest row needs."""
        T = int(self.age_B.max())
        self.mask_BT = self.mask_BT[:, -T:]
        for layer in self.cache.layers if self.shared is None else ():
            if isinstance(layer, ReservingLayer):
                layer.keep(T)

    def _run(self, ids: Tensor, position_ids: Tensor, sight: Sight | None = None) -> None:
        if self.model.caches:
            hidden_BD = self.model.hidden(ids, self.mask_BT, position_ids, self.cache, sight=sight)[:, -1]
        else:
            ids_B1T1, _ = self.cache.update(ids[:, None, :, None], ids[:, None, :, None], 0)
            row_B = torch.arange(len(ids), device=ids.device)
            last_B = torch.full_like(row_B, self.mask_BT.shape[1] - 1)
            hidden_BD = self.model.hidden_at(ids_B1T1[:, 0, :, 0], self.mask_BT, row_B, last_B)
        self.logits_BV = self.model.head(hidden_BD)


def _cached(kept: Kept, place_BP: Tensor) -> Kept:
    """Keys and values `[B, K, P, d]` of the prompts that stand at these places."""
    keys, values = (x.detach()[place_BP].transpose(1, 2) for x in kept)
    return keys, values


def so_far(rows: Sequence[Row]) -> tuple[int, int]:
    """Tokens that `rows` have, and the most they can come to."""
    return sum(len(row.tokens) for row in rows), sum(len(row.tokens) if row.done else row.limit for row in rows)


def encoded(model: CausalModel, rows: Sequence[Row], share: bool = False, prefill: Prefill | None = None) -> Decoding:
    """The state in which `rows` begin; each of their prompts is encoded once, see `Decoding.of`."""
    if model.fast is not None:  # its prefill knows equal prompts, and spreads them over rows itself
        return Decoding.of(model, [row.prompt for row in rows], share, prefill)
    prompts = list({id(row.prompt): row.prompt for row in rows}.values())
    state = Decoding.of(model, prompts)
    if len(prompts) < len(rows):
        places = {id(prompt): place for place, prompt in enumerate(prompts)}
        state.keep([places[id(row.prompt)] for row in rows])
    return state
