"""Norm, rotation, gate and the products around them: values and gradients of a plain float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.losses.products import LowRank, Product
from headstart.models.fused import gated, gated_product, norm, normed_products, rotated, signed

Function = Callable[..., Tensor]


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_rotation(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs (i, i + d/2) as complex numbers, turned by the angle."""
    real, imaginary = x.chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.exp(1j * angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def plain_gate(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def our_rotation(x: Tensor, angle: Tensor) -> Tensor:
    both = torch.cat([angle, angle], dim=-1)
    return rotated(x, both.cos(), signed(both.sin()))


def our_products(x: Tensor, weight: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    return torch.cat(normed_products(x, weight, 1e-6, [Product(first, None), Product(second, bias)]), dim=-1)


def plain_products(x: Tensor, weight: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    h = plain_norm(x, weight)
    return torch.cat([h @ first.T, h @ second.T + bias], dim=-1)


def our_low_rank(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, *, dropout: float = 0.0) -> Tensor:
    torch.manual_seed(1)
    return LowRank(weight, None, A, B, 1.5, dropout)(x)


def plain_low_rank(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, *, dropout: float = 0.0) -> Tensor:
    torch.manual_seed(1)
    stays = torch.rand_like(x) >= dropout if dropout else torch.ones_like(x)
    return x @ weight.T + 1.5 * (x * stays / (1 - dropout)) @ A.T @ B.T


def low_rank_inputs(n: int, d: int) -> list[Tensor]:
    return [torch.randn(n, d), torch.randn(2, d), torch.randn(5, 2), torch.randn(5, d)]


CASES: dict[str, tuple[Function, Function, Callable[[int, int], list[Tensor]], int]] = {
    "norm": (lambda x, w: norm(x, w, 1e-6), plain_norm, lambda n, d: [torch.randn(n, 3, 2 * d), torch.randn(2 * d)], 2),
    "rotation": (our_rotation, plain_rotation, lambda n, d: [torch.randn(n, 3, 2 * d), torch.rand(n, 1, d)], 1),
    "products": (
        our_products,
        plain_products,
        lambda n, d: [torch.randn(n, d), torch.randn(d), torch.randn(4, d), torch.randn(3, d), torch.randn(3)],
        5,
    ),
    "frozen products": (
        our_products,
        plain_products,
        lambda n, d: [torch.randn(n, d), torch.randn(d), torch.randn(4, d), torch.randn(3, d), torch.randn(3)],
        1,
    ),
    "low rank": (our_low_rank, plain_low_rank, low_rank_inputs, 3),
    "low rank, dropout": (
        partial(our_low_rank, dropout=0.4),
        partial(plain_low_rank, dropout=0.4),
        low_rank_inputs,
        3,
    ),
    "gated product": (
        lambda gate, up, weight: gated_product(gate, up, Product(weight, None)),
        lambda gate, up, weight: plain_gate(gate, up) @ weight.T,
        lambda n, d: [3 * torch.randn(n, d), torch.randn(n, d), torch.randn(4, d)],
        3,
    ),
    "gate": (gated, plain_gate, lambda n, d: [3 * torch.randn(n, d), torch.randn(n, d)], 2),
}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), width=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_values_and_gradients_are_the_references(name: str, rows: int, width: int, seed: int) -> None:
    ours, plain, make, trained = CASES[name]
    torch.manual_seed(seed)
    inputs = [x.double() for x in make(rows, width)]
    for x in inputs[:trained]:
        x.requires_grad_()
    found, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), expected, rtol=1e-10, atol=1e-10)  # the path without a gradient
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, inputs[:trained], upstream) for y in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_weight_that_is_not_trained_gets_no_gradient() -> None:
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6)
    norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_inputs_are_left_as_they_are() -> None:
    for ours, _, make, _ in CASES.values():
        inputs = make(3, 4)
        before = [x.clone() for x in inputs]
        ours(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
