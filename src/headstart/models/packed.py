"""Scoring rollouts without padding, each prompt encoded once for all its completions.

In a short window prompts are half of all tokens and nothing is long-tailed: padding prompts to the longest and encoding
a prompt again for each of its rollouts is most of what a forward pass can save. All tokens go through the model as one
row, so every linear layer sees real tokens only; attention alone knows who may look at whom. It replaces the model's
scaled-dot-product attention under a name of its own, and does what that did whenever no packing is handed to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headstart.models.apart import Kept, attend_apart, flat, may_part
from headstart.records import PackedPrompts, Packing, Run

ATTENTION = "headstart_packed"
"""The name under which transformers finds `packed_attention`."""
APART = 512
"""Tokens of prompt and completion from which attention in two parts is faster. At 200 it takes 1.2 times as long, at
1,100 two thirds (one core, forward and backward)."""


def pack_prompts(prompts: Sequence[tuple[int, ...]], device: torch.device) -> PackedPrompts:
    """Equal prompts are one, and one with which another begins lies in that; the longest comes first."""
    host = hosts(prompts)
    unique = tuple(sorted(host, key=lambda prompt: (host[prompt] != prompt, -len(prompt))))
    own = [prompt for prompt in unique if host[prompt] == prompt]
    start = dict(zip(own, accumulate(map(len, own), initial=0), strict=False))
    starts = tuple(start[host[prompt]] for prompt in unique)
    length_U, start_U = torch.tensor([len(prompt) for prompt in unique]), torch.tensor(starts)
    place_UP, real_UP, back_L = _places(length_U, start_U, len(own))
    return PackedPrompts(
        unique,
        starts,
        torch.tensor([token for prompt in own for token in prompt]).to(device),
        torch.cat([torch.arange(len(prompt)) for prompt in own]).to(device),
        place_UP.to(device),
        real_UP.to(device),
        back_L if back_L is None else back_L.to(device),
        (start_U + length_U - 1).to(device),
        _runs([len(prompt) for prompt in own]),
    )


def hosts(prompts: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each different prompt, in order, the longest one that begins with it: itself where no other does."""
    host = {prompt: prompt for prompt in prompts}
    ordered = sorted(host)  # so that what a prompt begins comes right behind it
    for before, after in reversed([*pairwise(ordered)]):
        if after[: len(before)] == before:
            host[before] = host[after]
    return host


def pack(prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]], device: torch.device) -> Packing:
    """`completions[b]` follows `prompts[b]`."""
    packed = pack_prompts(prompts, device)
    number = {prompt: u for u, prompt in enumerate(packed.tokens)}
    prompt_B = torch.tensor([number[prompt] for prompt in prompts])
    pieces = [completion[:-1] for completion in completions]
    length_B, offset_B = (torch.tensor([len(piece) for piece in row]) for row in (pieces, prompts))
    place_BN, real_BN, back_L = _places(length_B, length_B.cumsum(0) - length_B)
    steps_BN = torch.arange(place_BN.shape[1]).expand_as(place_BN)
    predicts_BN = torch.cat([prompt_B[:, None], len(number) + place_BN], dim=1)
    return Packing(
        packed,
        torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64).to(device),
        (offset_B[:, None] + steps_BN)[real_BN].to(device),
        place_BN.to(device),
        back_L if back_L is None else back_L.to(device),
        prompt_B.to(device),
        predicts_BN[torch.cat([torch.ones(len(pieces), 1, dtype=torch.bool), real_BN], dim=1)].to(device),
        _runs(length_B.tolist()),
        _follows(packed, prompt_B.tolist(), length_B.tolist()),
    )


def _runs(lengths: Sequence[int]) -> tuple[Run, ...]:
    """Pieces of these lengths, one after the other; neighbours of one length are one run."""
    runs, end = [], 0
    for width, group in groupby(lengths):
        start, end = end, end + width * len(list(group))
        runs.append(Run(slice(start, end), width))
    return tuple(run for run in runs if run.width)


def _follows(packed: PackedPrompts, prompt_B: Sequence[int], lengths: Sequence[int]) -> Any:
    """`Packing.follows`; neighbours that continue one prompt are one run."""
    follows, end = [], 0
    for u, group in groupby(zip(prompt_B, lengths, strict=True), key=lambda pair: pair[0]):
        start, end = end, end + sum(length for _, length in group)
        first, width = packed.starts[u], len(packed.tokens[u])
        follows.append((Run(slice(start, end), end - start), Run(slice(first, first + width), width)))
    return tuple(pair for pair in follows if pair[0].width)


def _places(length: Tensor, start: Tensor, own: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Places of pieces `[pieces, width]` that begin at `start`, 0 where a piece is shorter; which of them are real; and
    where each token stands in the first `own` of them (all by default), None where these are all places."""
    width = torch.arange(int(length.max()))
    real = width[None] < length[:, None]
    places = (start[:, None] + width[None]) * real
    return places, real, None if bool(real.all()) else real[:own].flatten().nonzero().flatten()


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
        kept = k_LKd[:start], v_LKd[:start]
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
        if mask_PP is None and q_LHd.device.type == "cpu":
            # One call for each length: a call costs little here, and padding to the longest may cost much.
            sizes = [run.places.stop - run.places.start for run in prompts.runs]
            parts = zip(*(torch.split(x, sizes) for x in (q_LHd, k_LKd, v_LKd)), strict=True)
            outputs = []
            for run, part in zip(prompts.runs, parts, strict=True):
                q, k, v = (x.view(-1, run.width, *x.shape[1:]).transpose(1, 2) for x in part)
                outputs.append(flat(self._attend(q, k, v, None)))
            return torch.cat(outputs)
        k_UKPd, v_UKPd = padded(k_LKd, prompts), padded(v_LKd, prompts)
        return _flat(self._attend(padded(q_LHd, prompts), k_UKPd, v_UKPd, mask_PP), prompts.back_L)

    def completions(self, q_LHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, prompts_LKd: Kept, packing: Packing) -> Tensor:
        """`prompts_LKd` are the keys and the values of the prompts."""
        T = packing.prompts.place_UP.shape[1] + packing.place_BN.shape[1]
        window = 0 if self.window is None or self.window >= T else self.window
        if T > APART and not window and not self.dropout and may_part(q_LHd) and q_LHd.shape[-1] == v_LKd.shape[-1]:
            return attend_apart(q_LHd, k_LKd, v_LKd, prompts_LKd, packing, self.scale)
        k_BKTd, v_BKTd = (
            torch.cat([padded(before, packing.prompts)[packing.prompt_B], padded(x, packing)], dim=2)
            for before, x in zip(prompts_LKd, (k_LKd, v_LKd), strict=True)
        )
        mask_B1NT = _mask(packing, window, q_LHd.dtype)
        return _flat(self._attend(padded(q_LHd, packing), k_BKTd, v_BKTd, mask_B1NT), packing.back_L)

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
    return flat(x) if back_L is None else flat(x).index_select(0, back_L)


def _mask(packing: Packing, window: int, dtype: torch.dtype) -> Tensor:
    """What a completion's tokens see: all of their prompt, and what came before in the completion, but no further back
    than the window, if there is one. As numbers to add, made once for all layers: attention would make them of a bool
    mask in each, and keep them for its backward pass."""
    if (window, dtype) not in packing.masks:
        with torch.inference_mode(False):
            real_BP, row_N = packing.prompts.real_UP[packing.prompt_B], torch.arange(packing.place_BN.shape[1])
            row_N = row_N.to(real_BP.device)
            (B, P), N = real_BP.shape, len(row_N)
            prompt_BNP, own_NN = real_BP[:, None].expand(B, N, P), row_N <= row_N[:, None]
            if window:
                first_BN = real_BP.sum(dim=1)[:, None] + row_N - window  # the last place out of sight
                prompt_BNP = prompt_BNP & (torch.arange(P, device=row_N.device) > first_BN[..., None])
                own_NN = own_NN & (row_N > row_N[:, None] - window)
            seen_BNT = torch.cat([prompt_BNP, own_NN.expand(B, N, N)], dim=-1)
            mask_BNT = torch.zeros_like(seen_BNT, dtype=dtype).masked_fill_(~seen_BNT, -torch.inf)
        packing.masks[window, dtype] = mask_BNT[:, None]
    return packing.masks[window, dtype]


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
