"""Rollouts -> tensors, from the student's or the teacher's view of the prompt; and -> text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from headstart.models.packed import pack
from headstart.records import Rollout, RolloutBatch


def collate(
    rollouts: Sequence[Rollout],
    view: Literal["student", "teacher"],
    pad_id: int,
    device: torch.device,
    *,
    packed: bool = False,
) -> RolloutBatch:
    """Prompts padded on the left to P, completions on the right to N; padding is never attended to.

    The completion is the same in both views; only the prompt in front of it differs. See `RolloutBatch` for a worked
    example. Tensors are made on the CPU and moved to `device` once. `packed` adds the same tokens without padding, for
    a model that can take them (`CausalModel.packs`).
    """
    prompts = [r.prompt.token_ids if view == "student" else r.prompt.teacher_token_ids for r in rollouts]
    P = max(len(p) for p in prompts)
    N = max(len(r.completion_ids) for r in rollouts)
    input_ids_BT = torch.full((len(rollouts), P + N), pad_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros((len(rollouts), P + N), dtype=torch.int64)
    for b, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True)):
        real = slice(P - len(prompt), P + len(rollout.completion_ids))
        input_ids_BT[b, real] = torch.tensor((*prompt, *rollout.completion_ids), dtype=torch.int64)
        attention_mask_BT[b, real] = 1
    position_ids_BT = (attention_mask_BT.cumsum(dim=1) - 1).clamp_min(0)
    completion_mask_BN = attention_mask_BT[:, P:].bool()
    row_M, position_M = completion_mask_BN.nonzero(as_tuple=True)
    return RolloutBatch(
        input_ids_BT=input_ids_BT.to(device),
        attention_mask_BT=attention_mask_BT.to(device),
        position_ids_BT=position_ids_BT.to(device),
        completion_mask_BN=completion_mask_BN.to(device),
        tokens_M=input_ids_BT[:, P:][completion_mask_BN].to(device),
        position_M=position_M.to(device),
        row_M=row_M.to(device),
        packing=pack(prompts, [r.completion_ids for r in rollouts], device) if packed else None,
    )


def completion_text(tokenizer: Any, rollout: Rollout) -> str:
    """The response as text, its stop token and other special tokens removed."""
    ids = rollout.completion_ids[:-1] if rollout.stopped else rollout.completion_ids
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as it reads after the one before, so that joined they read like the text, spaces included."""
    texts = []
    for place, token in enumerate(ids):
        before = tokenizer.decode(list(ids[max(0, place - 1) : place]))
        both = tokenizer.decode(list(ids[max(0, place - 1) : place + 1]))
        # Half of a multi-byte character changes what the token before reads like; then the token stands alone.
        texts.append(both[len(before) :] if both.startswith(before) else tokenizer.decode([token]))
    return texts
