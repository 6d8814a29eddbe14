"""Matrix products of activations and weights on a CPU, by oneDNN where PyTorch would ask MKL.

PyTorch hands float32 products to MKL. On the AMD processors we measured on, a step with 151,936 ids takes 1.24 times as
long with MKL as with oneDNN, which PyTorch brings along for other uses. On an Intel processor the two are level from
64 rows on; 8 to 16 rows of a weight that no cache holds take MKL 1.2 to 1.6 times as long, of a small one half as long
(`python -m bench.products`). Everywhere else these are PyTorch's own products.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FEW = 64
"""Rows up to which a product is limited by reading its weight."""
ONE = 4
"""Rows below which MKL reads a weight of any size as fast."""
LARGE = 2**19
"""Numbers of a weight from which few rows are quicker by oneDNN. Below, its calls cost more than they save."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for `[rows, in]` and `[out, in]`, differentiable once."""
    if (len(x) <= FEW and (len(x) < ONE or weight.numel() < LARGE)) or not _suits(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    return _product(x, weight, bias)


@dataclass(frozen=True, slots=True)
class LowRank:
    """A frozen product with a trained one of low rank beside it (LoRA): x @ (weight + scale B A).T + bias."""

    weight: Tensor
    """`[out, in]`, without gradient."""
    bias: Tensor | None
    A_rD: Tensor
    B_Or: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, out]` for `[rows, in]`, differentiable once in `x`, A and B; nothing as large as x is kept but x."""
        found: Tensor = _LowRank.apply(x, self.A_rD, self.B_Or, self)  # type: ignore[no-untyped-call]
        return found

    def folded(self, out: Tensor) -> None:
        """Write weight + scale B A to `out`."""
        torch.addmm(self.weight.detach(), self.B_Or.detach(), self.A_rD.detach(), alpha=self.scale, out=out)


def packed(weight: Tensor) -> Tensor | None:
    """A copy of `weight` laid out for `few`, which goes stale when the weight changes; None where that is no use."""
    if not LAYS_OUT or weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < LARGE:
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


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A_rD: Tensor, B_Or: Tensor, of: LowRank) -> Tensor:
        low = x @ A_rD.T
        ctx.save_for_backward(x, low, A_rD, B_Or, of.weight)
        ctx.scale = of.scale
        return linear(x, of.weight, of.bias).addmm_(low, B_Or.T, alpha=of.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, A_rD, B_Or, weight = ctx.saved_tensors
        for_low = (gradient @ B_Or).mul_(ctx.scale)
        for_x = linear(gradient, weight.T).addmm_(for_low, A_rD) if ctx.needs_input_grad[0] else None
        return for_x, for_low.T @ x, (gradient.T @ low).mul_(ctx.scale), None


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


def _amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text(errors="replace")[:4096]


_ONEDNN = _works()
LAYS_OUT = _ONEDNN and _amd()
"""Whether a copy of a weight, laid out for oneDNN, is multiplied with faster than the weight itself. On AMD the head of
16 x 151,936 x 256 took MKL 44 ms and a copy 19; on Intel a copy of all weights saved 1 to 4% of the rollout."""
