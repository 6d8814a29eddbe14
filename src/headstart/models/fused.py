"""Norm, rotation and gate of the Llama family, each with its gradient written down.

Between the matrix products a layer does little arithmetic and moves much memory. On a CPU PyTorch composes a root mean
square norm of eight passes and keeps several of their results for the gradient; here it is three passes, and what the
gradient needs is made again from the input. On a GPU PyTorch's own fused norm is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm
from torch.nn.functional import rms_norm, silu

from headstart.losses.products import Product


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


def normed_products(x: Tensor, weight: Tensor, eps: float, products: Sequence[Product]) -> tuple[Tensor, ...]:
    """Products of norm(x), of which the gradient keeps x alone; on a CPU in float32 or float64."""
    trained = [t for product in products for t in product.trained]
    return _NormedProducts.apply(x, weight, eps, products, *trained)  # type: ignore[no-any-return,no-untyped-call]


def gated_product(gate: Tensor, up: Tensor, product: Product) -> Tensor:
    """A product of silu(gate) * up, which the gradient makes again instead of keeping it."""
    return _GatedProduct.apply(gate, up, product, *product.trained)  # type: ignore[no-any-return,no-untyped-call]


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
        return *_norm_backward(gradient, x * inverse, weight, inverse, ctx.needs_input_grad), None


def _norm_backward(
    gradient: Tensor, normed: Tensor, weight: Tensor, inverse: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the weight, from x * inverse; each where it is `needed`."""
    for_weight = (gradient * normed).flatten(0, -2).sum(0) if needed[1] else None
    if not needed[0]:
        return None, for_weight
    for_x = gradient * weight
    along = torch.linalg.vecdot(for_x, normed)[..., None].div_(-normed.shape[-1])
    return for_x.addcmul_(normed, along).mul_(inverse), for_weight


class _NormedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, products: Sequence[Product], *trained: Tensor
    ) -> tuple[Tensor, ...]:
        inverse = _inverse(x, eps)
        h = inverse.mul(x).mul_(weight)
        found, kept = zip(*(product.forward(h) for product in products), strict=True)
        ctx.products, ctx.counts = products, [len(k) for k in kept]
        ctx.save_for_backward(x, weight, inverse, *(t for k in kept for t in k))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, *rest = ctx.saved_tensors
        normed = x * inverse
        h, for_h, found = normed * weight, None, list[Tensor]()
        inputs = any(ctx.needs_input_grad[:2])
        for product, count, gradient in zip(ctx.products, ctx.counts, gradients, strict=True):
            kept, rest = tuple(rest[:count]), rest[count:]
            more, trained = product.backward(h, kept, gradient, inputs=inputs)
            found += trained
            for_h = more if for_h is None else for_h.add_(more)
        if for_h is None:
            return None, None, None, None, *found
        return *_norm_backward(for_h, normed, weight, inverse, ctx.needs_input_grad), None, None, *found


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
        return _gated_backward(gradient, share, gate * share, up)


def _gated_backward(gradient: Tensor, share: Tensor, opened: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, from sigmoid(gate) and silu(gate), which are overwritten."""
    for_gate = share.addcmul_(opened, 1 - share).mul_(up).mul_(gradient)  # d silu(g) / dg = s + g s (1 - s)
    return for_gate, opened.mul_(gradient)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, product: Product, *trained: Tensor) -> Tensor:
        found, kept = product.forward(silu(gate).mul_(up))
        ctx.product = product
        ctx.save_for_backward(gate, up, *kept)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *kept = ctx.saved_tensors
        share = gate.sigmoid()
        opened = gate * share
        for_both, found = ctx.product.backward(opened * up, tuple(kept), gradient, inputs=True)
        return *_gated_backward(for_both, share, opened, up), None, *found
