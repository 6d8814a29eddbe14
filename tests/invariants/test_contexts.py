"""The student is trained in the context it sampled in: the same ids at the same positions, whatever path feeds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headstart.assemble.pair import Pair
from headstart.models.causal import CausalModel
from headstart.models.decoder import FastDecoder, Prefill
from headstart.records import PackedPrompts, Packing, RolloutBatch
from preflight_pairs import Side, loaded, write_sides

Context = list[tuple[int, int]]
"""(token id, position) in order, padding left out."""
Call = dict[str, Any]


@contextmanager
def calls_of(model: CausalModel) -> Iterator[list[Call]]:
    """While entered, the arguments of every call of the model's backbone or of its fast decoder."""
    calls: list[Call] = []
    decoder, hook = model.decoder, None
    if decoder is None:
        hook = model.backbone.register_forward_pre_hook(
            lambda module, args, named: calls.append(named), with_kwargs=True
        )
    else:
        model.decoder = Recording(decoder, calls)  # type: ignore[assignment]
    try:
        yield calls
    finally:
        model.decoder = decoder
        if hook is not None:
            hook.remove()


@dataclass(frozen=True)
class Recording:
    decoder: FastDecoder
    calls: list[Call]

    def stepper(self, **named: bool) -> Callable[..., Tensor]:
        step = self.decoder.stepper(**named)

        def recorded(token_B: Tensor, position_B: Tensor, mask_BT: Tensor, cache: Any, shared: Any = None) -> Tensor:
            call = {"input_ids": token_B[:, None], "position_ids": position_B[:, None], "attention_mask": mask_BT}
            self.calls.append(call)
            return step(token_B, position_B, mask_BT, cache, shared)

        return recorded

    def encode(self, prompts: PackedPrompts) -> Prefill:
        ids_1L, position_1L = prompts.ids_L[None], prompts.position_L[None]
        call = {"input_ids": ids_1L, "position_ids": position_1L, "attention_mask": torch.ones_like(ids_1L)}
        self.calls.append(call)
        return self.decoder.encode(prompts)

    def complete(self, prompts: Prefill, packing: Packing) -> Tensor:
        ids_L = torch.cat([prompts.prompts.ids_L, packing.ids_L])
        position_L = torch.cat([prompts.prompts.position_L, packing.position_L])
        self.calls.append({"input_ids": ids_L[None], "position_ids": position_L[None], "packing": packing})
        return self.decoder.complete(prompts, packing)


def padded_rows(call: Call) -> list[Context]:
    ids_BT = call["input_ids"]
    # While decoding, the mask also covers what is in the cache already.
    real_BT = call["attention_mask"][:, -ids_BT.shape[1] :].bool()
    rows = zip(ids_BT, call["position_ids"].expand_as(ids_BT), real_BT, strict=True)
    return [list(zip(ids[real].tolist(), place[real].tolist(), strict=True)) for ids, place, real in rows]


def packed_rows(call: Call, batch: RolloutBatch) -> list[Context]:
    """Each row's prompt and its completion, at the places where the packing says they are."""
    packing: Packing = call["packing"]
    prompts, rows = packing.prompts, []
    fed = list(zip(call["input_ids"][0].tolist(), call["position_ids"][0].tolist(), strict=True))
    start = len(prompts.ids_L)
    for prompt, count in zip(packing.prompt_B.tolist(), batch.row_M.bincount().tolist(), strict=True):
        places = prompts.place_UP[prompt][prompts.real_UP[prompt]].tolist()
        rows.append([fed[place] for place in places] + fed[start : start + count - 1])
        start += count - 1
    return rows


def contexts(pair: Pair, prompts: Any) -> tuple[list[Context], list[Context]]:
    """What the student was fed: sampling one prompt at a time, and training on one batch of all.

    The last token of a completion is left out: it was drawn, but nothing is predicted after it.
    """
    rollouts, sampled = [], []
    for prompt in prompts:
        with calls_of(pair.student) as calls:
            rollouts += pair.sample([prompt], max_tokens=12)
        sampled.append([token for call in calls for token in padded_rows(call)[0]])
    batch = pair.student.batch(rollouts, "student")
    with calls_of(pair.student) as calls:
        pair.student.completion_hidden(batch)
    last = calls[-1]
    trained = packed_rows(last, batch) if "packing" in last else [row[:-1] for row in padded_rows(last)]
    assert [row[: len(p.token_ids)] for row, p in zip(sampled, prompts, strict=True)] == [
        [(token, position) for position, token in enumerate(p.token_ids)] for p in prompts
    ]
    return sampled, trained


def sides(folder: Path, packing: bool, fast: bool) -> tuple[Pair, Any]:
    pair, prompts = loaded(write_sides(folder, Side(), Side(seed=2)))
    assert pair.student.packs, "loading switches it on"
    assert pair.student.decoder is not None, "loading switches it on"
    pair.student.packs = packing
    if not fast:
        pair.student.decoder = None
    assert len({len(p.token_ids) for p in prompts.prompts[:4]}) > 1, "padding and packing have work to do"
    return pair, prompts.prompts[:4]


PATHS = [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize(("packing", "fast"), PATHS, ids=["padded", "packed", "fast decoder"])
def test_the_student_is_trained_in_the_context_it_sampled_in(tmp_path: Path, packing: bool, fast: bool) -> None:
    sampled, trained = contexts(*sides(tmp_path, packing, fast))
    assert sampled == trained


@pytest.mark.parametrize("packing", [False, True])
def test_a_checkpoint_that_shifts_positions_in_training_is_seen(tmp_path: Path, packing: bool) -> None:
    """Otherwise the comparison above could not fail."""
    pair, prompts = sides(tmp_path, packing, fast=False)

    def shift(module: Any, positional: Any, named: Call) -> Any:
        return positional, named | ({} if named.get("use_cache") else {"position_ids": named["position_ids"] + 1})

    pair.student.backbone.register_forward_pre_hook(shift, with_kwargs=True)
    sampled, trained = contexts(pair, prompts)
    assert [[(token, position + 1) for token, position in row] for row in sampled] == trained
