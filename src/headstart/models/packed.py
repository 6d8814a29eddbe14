"""Scoring rollouts without padding, each prompt encoded once for all its completions.

In a short window prompts are half of all tokens and nothing is long-tailed: padding prompts to the longest and encoding
a prompt again for each of its rollouts is most of what a forward pass can save. All tokens go through the model as one
row, so every linear layer sees real tokens only; attention alone knows who may look at whom. It replaces the model's
scaled-dot-product attention under a name of its own, and does what that did whenever no packing is handed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headstart.records import PackedPrompts, Packing

ATTENTION = "headstart_packed"
"""The name under which transformers finds `packed_attention`."""


def pack_prompts(prompts: Sequence[tuple[int, ...]], device: torch.device) -> PackedPrompts:
    """Equal prompts are one; the longest comes first."""
    unique = tuple(sorted(dict.fromkeys(prompts), key=len, reverse=True))
    length = torch.tensor([len(prompt) for prompt in unique])
    place_UP, real_UP, back_L = _places(length)
    return PackedPrompts(
        unique,
        torch.tensor([token for prompt in unique for token in prompt]).to(device),
        torch.cat([torch.arange(n) for n in length.tolist()]).to(device),
        place_UP.to(device),
        real_UP.to(device),
        back_L if back_L is None else back_L.to(device),
        (length.cumsum(0) - 1).to(device),
    )


def pack(prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]], device: torch.device) -> Packing:
    """`completions[b]` follows `prompts[b]`."""
    packed = pack_prompts(prompts, device)
    number = {prompt: u for u, prompt in enumerate(packed.tokens)}
    prompt_B = torch.tensor([number[prompt] for prompt in prompts])
    pieces = [completion[:-1] for completion in completions]
    length_B, offset_B = (torch.tensor([len(piece) for piece in row]) for row in (pieces, prompts))
    place_BN, real_BN, back_L = _places(length_B)
    steps_BN = torch.arange(place_BN.shape[1]).expand_as(place_BN)
    seen_BNT, distance_BNT = _sight(packed.real_UP.cpu()[prompt_B], offset_B, place_BN.shape[1])
    predicts_BN = torch.cat([prompt_B[:, None], len(number) + place_BN], dim=1)
    tensors = (
        torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64),
        (offset_B[:, None] + steps_BN)[real_BN],
        place_BN,
        back_L,
        prompt_B,
        seen_BNT,
        distance_BNT,
        predicts_BN[torch.cat([torch.ones(len(pieces), 1, dtype=torch.bool), real_BN], dim=1)],
    )
    return Packing(packed, *(x if x is None else x.to(device) for x in tensors))  # type: ignore[arg-type]


def _places(length: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Places of pieces `[pieces, width]`, 0 where a piece is shorter; which of them are real; and where each token
    stands among them, None where they are all."""
    width = torch.arange(int(length.max()))
    real = width[None] < length[:, None]
    places = ((length.cumsum(0) - length)[:, None] + width[None]) * real
    return places, real, None if bool(real.all()) else real.flatten().nonzero().flatten()


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
    q_LHd, k_LKd, v_LKd = (x[0].transpose(0, 1) for x in (query, key, value))
    prompts, start = packing.prompts, len(packing.prompts.ids_L)
    own = Attend(scaling, dropout, sliding_window)
    outputs = [own.prompts(q_LHd[:start], k_LKd[:start], v_LKd[:start], prompts)]
    if len(packing.ids_L):
        kept = (padded(k_LKd[:start], prompts), padded(v_LKd[:start], prompts))
        outputs.append(own.completions(q_LHd[start:], k_LKd[start:], v_LKd[start:], kept, packing))
    return torch.cat(outputs)[None], None


@dataclass(frozen=True, slots=True)
class Attend:
    """Attention of one layer for tokens without padding: `[L, heads, d]` in and out. `window` counts tokens."""

    scale: float | None
    dropout: float = 0.0
    window: int | None = None

    def prompts(self, q_LHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, prompts: PackedPrompts) -> Tensor:
        P = prompts.place_UP.shape[1]
        mask_PP = None if self.window is None or self.window >= P else _band(P, self.window, q_LHd.device)
        k_UKPd, v_UKPd = padded(k_LKd, prompts), padded(v_LKd, prompts)
        return _flat(self._attend(padded(q_LHd, prompts), k_UKPd, v_UKPd, mask_PP), prompts.back_L)

    def completions(
        self, q_LHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, prompt_UKPd: tuple[Tensor, Tensor], packing: Packing
    ) -> Tensor:
        """`prompt_UKPd` are the keys and the values of the prompts."""
        seen_BNT = packing.seen_BNT
        if self.window is not None and seen_BNT.shape[-1] > self.window:
            seen_BNT = seen_BNT & (packing.distance_BNT < self.window)
        k_BKTd, v_BKTd = (
            torch.cat([prompt[packing.prompt_B], padded(x, packing)], dim=2)
            for prompt, x in zip(prompt_UKPd, (k_LKd, v_LKd), strict=True)
        )
        return _flat(self._attend(padded(q_LHd, packing), k_BKTd, v_BKTd, seen_BNT[:, None]), packing.back_L)

    def last(self, q_UHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, prompts: PackedPrompts) -> Tensor:
        """Attention of every prompt's last token alone."""
        k_UKPd, v_UKPd = padded(k_LKd, prompts), padded(v_LKd, prompts)
        return self._attend(q_UHd[:, :, None], k_UKPd, v_UKPd, prompts.real_UP[:, None, None])[:, :, 0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` None is causal."""
        # A kernel for grouped heads with a mask exists on the CPU; elsewhere keys and values are repeated, as usual.
        grouped = q.device.type == "cpu"
        groups = 1 if grouped else q.shape[1] // k.shape[1]
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        return attend(q, k, v, mask, self.dropout, mask is None, scale=self.scale, enable_gqa=grouped)


def padded(x_LHd: Tensor, packed: PackedPrompts | Packing) -> Tensor:
    """`[pieces, heads, width, head_dim]`, each piece's tokens padded on the right with some other token."""
    places = packed.place_UP if isinstance(packed, PackedPrompts) else packed.place_BN
    if packed.back_L is not None:
        x_LHd = x_LHd.index_select(0, places.flatten())
    return x_LHd.reshape(*places.shape, *x_LHd.shape[1:]).transpose(1, 2)


def _flat(x: Tensor, back_L: Tensor | None) -> Tensor:
    """`[L, heads, head_dim]` of the tokens that `padded` had spread."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if back_L is None else flat.index_select(0, back_L)


def _band(P: int, window: int, device: torch.device) -> Tensor:
    """Causal, and no further back than the window."""
    distance = torch.arange(P, device=device)[:, None] - torch.arange(P, device=device)[None]
    return (distance >= 0) & (distance < window)


def packed_hidden(backbone: Any, packing: Packing) -> Tensor:
    """Final hidden states `[M, D]` at the places that predict each completion token."""
    # Four dimensions: transformers takes it for a finished mask and builds none of its own, which would be [L, L].
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.ids_L.device)
    prompts = packing.prompts
    output = backbone(
        input_ids=torch.cat([prompts.ids_L, packing.ids_L])[None],
        position_ids=torch.cat([prompts.position_L, packing.position_L])[None],
        attention_mask=mask,
        use_cache=False,
        packing=packing,
    )
    hidden_LD: Tensor = output.last_hidden_state[0]
    last_UD, own_LD = hidden_LD[prompts.last_U], hidden_LD[len(prompts.ids_L) :]
    return torch.cat([last_UD, own_LD]).index_select(0, packing.predicts_M)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
