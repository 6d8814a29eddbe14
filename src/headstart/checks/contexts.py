"""Is the student trained in the context it sampled in? Read at the model's own door, while sampling and in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.models.causal import CausalModel
from headstart.models.decoder import FastDecoder, PromptPass
from headstart.records import PackedPrompts, Packing, Prompt, RolloutBatch

CHECK = "training context"
Fed = list[tuple[int, int]]
"""What a model is fed of one rollout: (token id, position) in order, padding left out."""


def contexts(pair: Pair, prompts: Sequence[Prompt], tokens: int) -> Finding:
    """Ids and positions fed to the student: sampled one prompt at a time, trained as one batch of all.

    The last token of a completion is left out: it was drawn, but nothing is predicted after it.
    """
    rollouts, sampled = [], []
    for prompt in prompts:
        with _listening(pair.student) as calls:
            rollouts += pair.sample([prompt], who="student", max_tokens=tokens, purpose="preflight-context")
        fed = calls if pair.student.caches else calls[-1:]  # without a cache every call has the whole text
        sampled.append([place for call in fed for place in _padded_rows(call)[0]])
    batch = pair.student.batch(rollouts, "student")
    with _listening(pair.student) as calls, pair.student.sampling_mode():
        pair.student.completion_hidden(batch)
    last = calls[-1]
    trained = _packed_rows(last, batch) if "packing" in last else [row[:-1] for row in _padded_rows(last)]
    for rollout, engine, trainer in zip(rollouts, sampled, trained, strict=True):
        if engine != trainer:
            return _differs(pair, rollout.prompt.problem_id, engine, trainer)
    compared = sum(map(len, sampled))
    text = f"{compared} tokens of {len(rollouts)} contexts are trained as they were sampled, ids and positions alike"
    return Finding(CHECK, "ok", text, None, {"tokens": compared, "rollouts": len(rollouts)})


def _differs(pair: Pair, problem: str, engine: Fed, trainer: Fed) -> Finding:
    shorter = min(len(engine), len(trainer))
    place = next((i for i in range(shorter) if engine[i] != trainer[i]), shorter)

    def shown(fed: Fed) -> str:
        if place == len(fed):
            return "nothing"
        token, position = fed[place]
        return f"id {token} ({pair.tokenizer.convert_ids_to_tokens(token)!r}) at position {position}"

    return Finding(
        CHECK,
        "blocking",
        f"problem {problem}: token {place} of the student's context was {shown(engine)} when it sampled and is "
        f"{shown(trainer)} when it is trained ({len(engine)} and {len(trainer)} tokens)",
        "the student would learn in contexts it never sampled in: remove what changes the prompt in between (an engine "
        "of your own, or code that comes with the checkpoint)",
        {
            "problem": problem,
            "place": place,
            "sampled": engine[place : place + 1],
            "trained": trainer[place : place + 1],
        },
    )


@contextmanager
def _listening(model: CausalModel) -> Iterator[list[dict[str, Any]]]:
    """While entered, the arguments of every call of the model's backbone, as other hooks have left them, and of its
    fast decoder."""
    calls: list[dict[str, Any]] = []

    def hear(module: Any, positional: Any, named: dict[str, Any]) -> None:
        calls.append(named)

    hear.listens = True  # type: ignore[attr-defined]  # so that the passes that are heard are those of training
    decoder = model.decoder
    if decoder is not None:
        model.decoder = _HeardDecoder(decoder, calls)  # type: ignore[assignment]
    handle = model.backbone.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
        model.decoder = decoder


@dataclass(frozen=True, slots=True)
class _HeardDecoder:
    decoder: FastDecoder
    calls: list[dict[str, Any]]

    def stepper(self) -> Callable[..., Tensor]:
        step = self.decoder.stepper()

        def heard(token_B: Tensor, position_B: Tensor, mask_BT: Tensor, cache: Any) -> Tensor:
            call = {"input_ids": token_B[:, None], "position_ids": position_B[:, None], "attention_mask": mask_BT}
            self.calls.append(call)
            return step(token_B, position_B, mask_BT, cache)

        return heard

    def encode(self, prompts: PackedPrompts) -> PromptPass:
        ids_1L = prompts.ids_L[None]
        self.calls.append(
            {"input_ids": ids_1L, "position_ids": prompts.position_L[None], "attention_mask": torch.ones_like(ids_1L)}
        )
        return self.decoder.encode(prompts)

    def complete(self, prompts: PromptPass, packing: Packing) -> Tensor:
        ids_L = torch.cat([prompts.prompts.ids_L, packing.ids_L])
        position_L = torch.cat([prompts.prompts.position_L, packing.position_L])
        self.calls.append({"input_ids": ids_L[None], "position_ids": position_L[None], "packing": packing})
        return self.decoder.complete(prompts, packing)


def _padded_rows(call: dict[str, Any]) -> list[Fed]:
    ids_BT = call["input_ids"]
    # While decoding, the mask also covers what is in the cache already.
    real_BT = call["attention_mask"][:, -ids_BT.shape[1] :].bool()
    rows = zip(ids_BT, call["position_ids"].expand_as(ids_BT), real_BT, strict=True)
    return [list(zip(ids[real].tolist(), place[real].tolist(), strict=True)) for ids, place, real in rows]


def _packed_rows(call: dict[str, Any], batch: RolloutBatch) -> list[Fed]:
    """Each row's prompt and its completion, at the places where the packing says they are."""
    packing = call["packing"]
    prompts, rows = packing.prompts, []
    fed = list(zip(call["input_ids"][0].tolist(), call["position_ids"][0].tolist(), strict=True))
    start = len(prompts.ids_L)
    lengths = [int(count) - 1 for count in batch.row_M.bincount()]
    for prompt, length in zip(packing.prompt_B.tolist(), lengths, strict=True):
        places = prompts.place_UP[prompt][prompts.real_UP[prompt]].tolist()
        rows.append([fed[place] for place in places] + fed[start : start + length])
        start += length
    return rows
