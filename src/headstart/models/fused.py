"""Norm, rotation and gate of the Llama family, each with its gradient written down.

Between the matrix products a layer does little arithmetic and moves much memory. On a CPU PyTorch composes a root mean
square norm of eight passes and keeps several of their results for the gradient; here it is three passes, and what the
gradient needs is made again from the input. On a GPU PyTorch's own fused norm is used.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm
from torch.nn.functional import rms_norm, silu


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if x.device.type != "cpu" or x.dtype in (torch.bfloat16, torch.float16):
        return rms_norm(x, (x.shape[-1],), weight, eps)
    if weight is None:
        return _inverse(x, eps).mul(x)
    if torch.is_grad_enabled():
        return _Norm.apply(x, weight, eps)  # type: ignore[no-any-return,no-untyped-call]
    # The same arithmetic: a prompt's pass must not depend on whether it will be trained.
    return _inverse(x, eps).mul(x).mul_(weight)


def rotated(x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    """Rotary embedding of `[..., heads, d]`: the two halves of a head trade places, the first with the other sign,
    which is in `signed` (the sine)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotated.apply(x, cos, signed)  # type: ignore[no-any-return,no-untyped-call]
    return _turn(x, cos, signed)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if torch.is_grad_enabled() and gate.requires_grad:
        return _Gated.apply(gate, up)  # type: ignore[no-any-return,no-untyped-call]
    return silu(gate).mul_(up)


def signed(sin: Tensor) -> Tensor:
    """The sine as `rotated` wants it: negative in the first half."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps)."""
    length: Tensor = vector_norm(x, 2, -1, True)
    return torch.addcmul(_number(eps, x.dtype), length, length, value=1 / x.shape[-1]).rsqrt_()


@cache
def _number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def _turn(x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    turned: Tensor = x.roll(x.shape[-1] // 2, -1)
    turned.mul_(signed).addcmul_(x, cos)
    return turned


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return inverse.mul(x).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = (gradient * normed).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, for_weight, None
        for_x = gradient * weight
        along = torch.linalg.vecdot(for_x, normed)[..., None].div_(-x.shape[-1])
        return for_x.addcmul_(normed, along).mul_(inverse), for_weight, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed)
        return _turn(x, cos, signed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, signed = ctx.saved_tensors
        # Turning back is turning by the opposite angle; the sine, once rolled, has it.
        return _turn(gradient, cos, signed.roll(signed.shape[-1] // 2, -1)), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        share = gate.sigmoid()
        opened = gate * share
        for_up = gradient * opened
        # d silu(g) / dg = s + g s (1 - s)
        for_gate = share.addcmul_(opened, 1 - share).mul_(up).mul_(gradient)
        return for_gate, for_up
