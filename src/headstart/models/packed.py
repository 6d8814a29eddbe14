"""Scoring rollouts without padding, each prompt encoded once for all its completions.

In a short window prompts are half of all tokens and nothing is long-tailed: padding prompts to the longest and encoding
a prompt again for each of its rollouts is most of what a forward pass can save. All tokens go through the model as one
row, so every linear layer sees real tokens only; attention alone knows who may look at whom. It replaces the model's
scaled-dot-product attention under a name of its own, and does what that did whenever no packing is handed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headstart.records import Packing

ATTENTION = "headstart_packed"
"""The name under which transformers finds `packed_attention`."""


def pack(prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]], device: torch.device) -> Packing:
    """`completions[b]` follows `prompts[b]`; equal prompts are one."""
    unique = list(dict.fromkeys(prompts))
    number = {prompt: u for u, prompt in enumerate(unique)}
    prompt_B = torch.tensor([number[prompt] for prompt in prompts])
    pieces = [*unique, *(completion[:-1] for completion in completions)]
    offsets = [len(prompt) for prompt in prompts]
    length = torch.tensor([len(piece) for piece in pieces])
    start = length.cumsum(0) - length
    U, B, P, N = len(unique), len(prompts), int(length[: len(unique)].max()), int(length[len(unique) :].max())
    prompt_UP, prompt_real_UP = _places(start[:U], length[:U], P)
    row_BN, row_real_BN = _places(start[U:], length[U:], N)
    first = torch.tensor([0] * U + offsets)
    position_L = torch.cat([torch.arange(n) + f for n, f in zip(length.tolist(), first.tolist(), strict=True)])
    seen_BNT, distance_BNT = _sight(prompt_real_UP[prompt_B], length[:U][prompt_B], N)
    back_L = torch.empty(int(length.sum()), dtype=torch.int64)
    flat_UP, flat_BN = torch.arange(U * P).view(U, P), torch.arange(U * P, U * P + B * N).view(B, N)
    back_L[prompt_UP[prompt_real_UP]] = flat_UP[prompt_real_UP]
    back_L[row_BN[row_real_BN]] = flat_BN[row_real_BN]
    last_B = (start + length - 1)[:U][prompt_B]
    predicts_M = torch.cat([torch.cat([last_B[b : b + 1], row_BN[b, : length[U + b]]]) for b in range(B)])
    tensors = (
        torch.tensor([token for piece in pieces for token in piece])[None],
        position_L[None],
        prompt_UP,
        row_BN,
        prompt_B,
        seen_BNT,
        distance_BNT,
        back_L,
        predicts_M,
    )
    return Packing(*(tensor.to(device) for tensor in tensors))


def _places(start: Tensor, length: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Places of pieces `[pieces, width]`, 0 where a piece is shorter, and which of them are real."""
    real = torch.arange(width)[None] < length[:, None]
    return (start[:, None] + torch.arange(width)[None]) * real, real


def _sight(prompt_real_BP: Tensor, prompt_length_B: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """What a completion's tokens see: all of their prompt, and what came before in the completion. And from how far."""
    B, P = prompt_real_BP.shape
    row_N = torch.arange(N)
    own_BNN = (row_N[None, :] <= row_N[:, None]).expand(B, N, N)
    seen_BNT = torch.cat([prompt_real_BP[:, None].expand(B, N, P), own_BNN], dim=-1)
    position_BT = torch.cat([torch.arange(P).expand(B, P), prompt_length_B[:, None] + row_N], dim=-1)
    return seen_BNT, (prompt_length_B[:, None] + row_N)[:, :, None] - position_BT[:, None]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, `[1, heads, L, head_dim]` in, `[1, L, heads, head_dim]` out."""
    if packing is None:
        arguments = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)  # type: ignore[no-any-return]
    # A kernel for grouped heads with a mask exists on the CPU; elsewhere keys and values are repeated, as usual.
    grouped = query.device.type == "cpu"
    groups = 1 if grouped else query.shape[1] // key.shape[1]
    q_LHd, k_LHd, v_LHd = (x[0].transpose(0, 1) for x in (query, key, value))
    places_UP, places_BN = packing.prompt_UP, packing.row_BN
    k_UHPd, v_UHPd = (repeat_kv(_at(x, places_UP), groups) for x in (k_LHd, v_LHd))
    P = places_UP.shape[1]
    mask_PP = None if sliding_window is None or sliding_window >= P else _band(P, sliding_window, query.device)
    prompts_UHPd = attend(
        _at(q_LHd, places_UP), k_UHPd, v_UHPd, mask_PP, dropout, mask_PP is None, scale=scaling, enable_gqa=grouped
    )
    outputs = [prompts_UHPd]
    if places_BN.numel():
        seen_BNT = packing.seen_BNT
        if sliding_window is not None and seen_BNT.shape[-1] > sliding_window:
            seen_BNT = seen_BNT & (packing.distance_BNT < sliding_window)
        k_BHTd, v_BHTd = (
            torch.cat([prompt[packing.prompt_B], repeat_kv(_at(x, places_BN), groups)], dim=2)
            for prompt, x in ((k_UHPd, k_LHd), (v_UHPd, v_LHd))
        )
        outputs.append(
            attend(_at(q_LHd, places_BN), k_BHTd, v_BHTd, seen_BNT[:, None], dropout, scale=scaling, enable_gqa=grouped)
        )
    flat = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])
    return flat.index_select(0, packing.back_L)[None], None


def _at(x_LHd: Tensor, places: Tensor) -> Tensor:
    """`[pieces, heads, width, head_dim]` of the tokens at `places` [pieces, width]."""
    return x_LHd.index_select(0, places.flatten()).view(*places.shape, *x_LHd.shape[1:]).transpose(1, 2)


def _band(P: int, window: int, device: torch.device) -> Tensor:
    """Causal, and no further back than the window."""
    distance = torch.arange(P, device=device)[:, None] - torch.arange(P, device=device)[None]
    return (distance >= 0) & (distance < window)


def packed_hidden(backbone: Any, packing: Packing) -> Tensor:
    """Final hidden states `[M, D]` at the places that predict each completion token."""
    # Four dimensions: transformers takes it for a finished mask and builds none of its own, which would be [L, L].
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.ids_1L.device)
    output = backbone(
        input_ids=packing.ids_1L,
        position_ids=packing.position_ids_1L,
        attention_mask=mask,
        use_cache=False,
        packing=packing,
    )
    hidden_LD: Tensor = output.last_hidden_state[0]
    return hidden_LD.index_select(0, packing.predicts_M)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
