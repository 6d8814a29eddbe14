"""Attention of completions in two parts: what rollouts of a prompt share, and what each has of its own.

A token sees its prompt and what came before it in its completion. As one softmax that takes a mask of [B, N, P + N]
numbers in each layer's memory, a copy of the prompt for each of its completions, and twice the arithmetic, because a
kernel with a mask skips nothing. As two softmaxes it takes none of this: a prompt is read once for all its completions,
and their own part is causal. The two are one softmax again by the logarithm l of the sum over exponentials in each:
o = o_own + w (o_prompt - o_own), w = sigmoid(l_prompt - l_own). And a kernel's backward pass makes its probabilities
again as exp(scores - l): given the l and o of the whole, it yields its part's share of the gradient.

PyTorch's kernel for the CPU hands l out; elsewhere, and for a sliding window, one masked softmax it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headstart.records import Packing, Run

Kept = tuple[Tensor, Tensor]
"""Keys and values."""


def attend_apart(
    q_LHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, prompts_LKd: Kept, packing: Packing, scale: float | None
) -> Tensor:
    """Attention of the completions of `packing`, `[L, H, d]`, with what they see of themselves and of their prompts."""
    return _Apart.apply(q_LHd, k_LKd, v_LKd, *prompts_LKd, packing, scale)  # type: ignore[no-any-return,no-untyped-call]


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        prompt_k, prompt_v, packing, scale = rest
        parts = [_FORWARD(*(_pieces(x, run) for x in (q, k, v)), 0.0, True, scale=scale) for run in packing.runs]
        o_LHd, lse_LH = (_joined(x) for x in zip(*parts, strict=True))
        for tokens, prompt in packing.follows:
            kept = (_pieces(x, prompt) for x in (prompt_k, prompt_v))
            o, lse = _FORWARD(_pieces(q, tokens), *kept, 0.0, False, scale=scale)
            own_o, own_lse, lse = o_LHd[tokens.places], lse_LH[tokens.places], flat(lse)
            own_o.lerp_(flat(o), (lse - own_lse).sigmoid_()[..., None].to(o.dtype))
            own_lse.copy_(torch.logaddexp(own_lse, lse))
        ctx.save_for_backward(q, k, v, prompt_k, prompt_v, o_LHd, lse_LH)
        ctx.packing, ctx.scale = packing, scale
        return o_LHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prompt_k, prompt_v, *whole = ctx.saved_tensors
        gradient, scale = gradient.contiguous(), ctx.scale
        parts = [
            _BACKWARD(*(_pieces(x, run) for x in (gradient, q, k, v, *whole)), 0.0, True, scale=scale)
            for run in ctx.packing.runs
        ]
        for_q, for_k, for_v = (_joined(x) for x in zip(*parts, strict=True))
        for_prompts = torch.zeros_like(prompt_k), torch.zeros_like(prompt_v)
        for tokens, prompt in ctx.packing.follows:
            kept = (_pieces(x, prompt) for x in (prompt_k, prompt_v))
            outer, queries, *known = (_pieces(x, tokens) for x in (gradient, q, *whole))
            found = _BACKWARD(outer, queries, *kept, *known, 0.0, False, scale=scale)
            for_q[tokens.places].add_(flat(found[0]))
            for mine, more in zip(for_prompts, found[1:], strict=True):
                mine[prompt.places].add_(flat(more))
        return for_q, for_k, for_v, *for_prompts, None, None


def _pieces(x: Tensor, run: Run) -> Tensor:
    """`[pieces, heads, width, ...]` of `[L, heads, ...]`; nothing is copied."""
    return x[run.places].view(-1, run.width, *x.shape[1:]).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    """`[L, heads, ...]` of `[pieces, heads, width, ...]`."""
    return x.transpose(1, 2).flatten(0, 1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return flat(parts[0]) if len(parts) == 1 else torch.cat([flat(part) for part in parts])


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Prompts of rows that are being decoded, read once for all rows of a prompt; the rows keep their own tokens only.

    `layers` are each layer's keys and values `[U, K, P, d]`, right-aligned, as `real_UP` says; `prompt_B` is the prompt
    of each row, `row_C` the rows by prompt, C = U times the most rows of a prompt (filled up with row 0), and `place_B`
    where each row stands among these.
    """

    layers: Sequence[Kept]
    real_UP: Tensor
    mask_U11P: Tensor | None
    prompt_B: tuple[int, ...]
    row_C: Tensor
    place_B: Tensor

    @classmethod
    def of(cls, layers: Sequence[Kept], real_UP: Tensor, prompt_B: Sequence[int]) -> SharedPrompts:
        rows_U: list[list[int]] = [[] for _ in real_UP]
        for row, prompt in enumerate(prompt_B):
            rows_U[prompt].append(row)
        most, place_B = max(map(len, rows_U)), torch.empty(len(prompt_B), dtype=torch.int64)
        for u, rows in enumerate(rows_U):
            place_B[rows] = torch.arange(len(rows)) + u * most
        row_C = torch.tensor([row for rows in rows_U for row in rows + [0] * (most - len(rows))])
        hidden = torch.zeros(real_UP.shape, dtype=layers[0][0].dtype).masked_fill_(~real_UP, -torch.inf)
        mask_U11P = None if bool(real_UP.all()) else hidden[:, None, None]
        layers = [(k.contiguous(), v.contiguous()) for k, v in layers]
        return cls(layers, real_UP, mask_U11P, tuple(prompt_B), row_C, place_B)

    def attend(self, layer: int, q_BKgd: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention `[B, K, g, d]` of each row's last token; `keys` and `values` are the rows' own."""
        (_, K, g, d), U = q_BKgd.shape, len(self.real_UP)
        own_o: Tensor
        own_o, own_lse = _FORWARD(q_BKgd, keys, values, 0.0, False, scale=scale)
        # Queries of all rows of a prompt and of all heads of a group as if they were those of one sequence.
        q_UKCd = q_BKgd.index_select(0, self.row_C).view(U, -1, K, g, d).transpose(1, 2).reshape(U, K, -1, d)
        o, lse = _FORWARD(q_UKCd, *self.layers[layer], 0.0, False, attn_mask=self.mask_U11P, scale=scale)
        o, lse = (
            x.view(U, K, -1, g, *x.shape[3:]).transpose(1, 2).flatten(0, 1).index_select(0, self.place_B)
            for x in (o, lse)
        )
        own_o.lerp_(o, (lse - own_lse).sigmoid_()[..., None].to(o.dtype))
        return own_o

    def keep(self, rows: Sequence[int]) -> SharedPrompts:
        """For these rows alone, without prompts that none of them continues."""
        prompts = sorted({self.prompt_B[row] for row in rows})
        layers, real_UP = self.layers, self.real_UP
        if len(prompts) < len(real_UP):
            layers, real_UP = [(k[prompts], v[prompts]) for k, v in layers], real_UP[prompts]
        return SharedPrompts.of(layers, real_UP, [prompts.index(self.prompt_B[row]) for row in rows])

    def spread(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Keys and values `[B, K, P + N, d]` of the rows whose own ones are these."""
        rows = list(self.prompt_B)
        return tuple(torch.cat([x[rows], own], 2) for x, own in zip(self.layers[layer], (keys, values), strict=True))


def _kernels() -> tuple[Any, Any]:
    """PyTorch's own operators, for its autograd, which may go; (None, None) then, and where they compute otherwise."""
    try:
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, kv = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)
        o, lse = forward(q, kv, kv, 0.0, True, scale=0.25)
        expected = 1 + torch.arange(1, 4).log().expand(1, 2, 3)
        for_v = backward(q, q, kv, kv, o, lse, 0.0, True, scale=0.25)[2]
        right = torch.allclose(o, q) and torch.allclose(lse, expected) and torch.allclose(for_v.sum(), q.sum())
    except (AttributeError, RuntimeError, TypeError):
        right = False
    return (forward, backward) if right else (None, None)


_FORWARD, _BACKWARD = _kernels()


def may_part(x: Tensor) -> bool:
    """Whether attention of tensors like this can be parted."""
    return parts_on(x.device.type)


def parts_on(device: str) -> bool:
    return _FORWARD is not None and device == "cpu"
