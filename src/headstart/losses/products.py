"""Matrix products of activations and weights on a CPU, by oneDNN where PyTorch would ask MKL.

PyTorch hands float32 products to MKL. On the AMD processors we measured on, a step with 151,936 ids takes 1.24 times as
long with MKL as with oneDNN, which PyTorch brings along for other uses: the head of 16 rows takes MKL 44 ms, and
oneDNN, whose weight may be laid out for it beforehand, 19. Everywhere else these are PyTorch's own products.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FEW = 64
"""Rows up to which MKL is as quick: oneDNN's calls cost more."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for `[rows, in]` and `[out, in]`, differentiable once."""
    if len(x) <= FEW or not _suits(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    return _product(x, weight, bias)


def packed(weight: Tensor) -> Tensor | None:
    """A copy of `weight` laid out for `few`, which goes stale when the weight changes; None where that is no use."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not _ONEDNN:
        return None
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)
    return laid_out


def few(x: Tensor, laid_out: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without gradients with a weight that `packed` laid out."""
    return _product(x, laid_out, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    same = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return _ONEDNN and same and x.dim() == 2 and type(weight) in (Tensor, torch.nn.Parameter)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            linear(gradient, weight.T) if for_x else None,
            gradient.T @ x if for_weight else None,  # here MKL is as quick
            gradient.sum(0) if for_bias else None,
        )


def _works() -> bool:
    """The operators are PyTorch's own, for its compiler, and may go: then MKL does as before."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        x, weight = torch.ones(2, 3), torch.ones(4, 3)
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        return bool((_product(x, laid_out) == 3).all() and (_product(x, weight) == 3).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


_ONEDNN = _works()
