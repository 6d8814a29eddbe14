"""Matrix products of activations and weights on a CPU, by oneDNN where PyTorch would ask MKL.

PyTorch hands float32 products to MKL. On the AMD processors we measured on, a step with 151,936 ids takes 1.24 times as
long with MKL as with oneDNN, which PyTorch brings along for other uses. On an Intel processor the two are level from
64 rows on; 8 to 16 rows of a weight that no cache holds take MKL 1.2 to 1.6 times as long, of a small one half as long.
Everywhere else these are PyTorch's own products.
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
        return Product(weight, bias)(x)
    return _product(x, weight, bias)


Kept = tuple[Tensor, ...]
"""What the gradient of a product needs besides its input."""


@dataclass(frozen=True, slots=True)
class Product:
    """x @ weight.T + bias for `[rows, in]` and `[out, in]`, as a part of larger functions that write their gradient
    down: `forward` makes the value, `backward` the gradients."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, out]`, differentiable once."""
        y: Tensor = _Multiply.apply(x, self, *self.trained)  # type: ignore[no-untyped-call]
        return y

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """What `backward` gives gradients of, in this order."""
        return tuple(t for t in (self.weight, self.bias) if t is not None and t.requires_grad)

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        return linear(x, self.weight, self.bias), ()

    def backward(self, x: Tensor, kept: Kept, gradient: Tensor, *, inputs: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of `x` (None without `inputs`) and those of `trained`."""
        grads = []
        if self.weight.requires_grad:
            grads.append(gradient.T @ x)  # here MKL is as quick
        if self.bias is not None and self.bias.requires_grad:
            grads.append(gradient.sum(0))
        return linear(gradient, self.weight.T) if inputs else None, grads


@dataclass(frozen=True, slots=True)
class LowRank(Product):
    """A frozen product and a trained one of low rank beside it (LoRA): x @ weight.T + bias + scale drop(x) @ A.T @ B.T.

    Its gradient keeps x, and nothing else of that size but which numbers are dropped.
    """

    A_rD: Tensor
    B_Or: Tensor
    scale: float
    dropout: float = 0.0
    """Probability that a number of x is dropped on its way to A."""

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return self.A_rD, self.B_Or

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        stays = torch.rand_like(x) >= self.dropout if self.dropout else None
        low = (_where(stays, x) @ self.A_rD.T).mul_(1 / (1 - self.dropout))
        y = linear(x, self.weight, self.bias).addmm_(low, self.B_Or.T, alpha=self.scale)
        return y, (low,) if stays is None else (low, stays)

    def backward(self, x: Tensor, kept: Kept, gradient: Tensor, *, inputs: bool) -> tuple[Tensor | None, list[Tensor]]:
        low, stays = kept[0], kept[1] if len(kept) > 1 else None
        for_low = (gradient @ self.B_Or).mul_(self.scale / (1 - self.dropout))
        for_x = linear(gradient, self.weight.T) if inputs else None
        if for_x is not None:
            for_x += _where(stays, for_low @ self.A_rD)
        return for_x, [for_low.T @ _where(stays, x), (gradient.T @ low).mul_(self.scale)]

    def folded(self, out: Tensor) -> None:
        """Write weight + scale B A to `out`."""
        torch.addmm(self.weight.detach(), self.B_Or.detach(), self.A_rD.detach(), alpha=self.scale, out=out)


def _where(stays: Tensor | None, x: Tensor) -> Tensor:
    return x if stays is None else torch.where(stays, x, 0.0)


def lays_out(numbers: int) -> bool:
    """Whether `packed` copies a float32 weight with this many elements on a CPU."""
    return LAYS_OUT and numbers >= LARGE


def packed(weight: Tensor) -> Tensor | None:
    """A copy of `weight` laid out for `few`, which goes stale when the weight changes; None where that is no use."""
    if not lays_out(weight.numel()) or weight.device.type != "cpu" or weight.dtype != torch.float32:
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


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, *trained: Tensor) -> Tensor:
        y, kept = product.forward(x)
        ctx.save_for_backward(x, *kept)
        ctx.product = product
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        for_x, grads = ctx.product.backward(x, tuple(kept), gradient, inputs=ctx.needs_input_grad[0])
        return for_x, None, *grads


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
