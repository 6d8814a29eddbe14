"""Products by oneDNN are PyTorch's products: values, gradients, packed weights, and what is done without it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from headstart.losses import products
from headstart.models.causal import CausalModel
from headstart.testing import random_model


@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 5, 64, 65, 130]), width=st.integers(1, 40), out=st.integers(1, 40), bias=st.booleans(),
    transposed=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_values_and_gradients(rows: int, width: int, out: int, bias: bool, transposed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, b = torch.randn(rows, width), torch.randn(out) if bias else None
    weight = torch.randn(width, out).T if transposed else torch.randn(out, width)
    inputs = [t.detach().requires_grad_() for t in (x, weight, b) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found, expected = products.linear(*inputs), F.linear(*exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(rows, out)
    for a, c in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, exact, upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(products.linear(*inputs).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not products._ONEDNN, reason="this PyTorch has no oneDNN on this processor")
def test_a_packed_weight_gives_the_same_and_goes_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(7, 30), torch.randn(50, 30)
    monkeypatch.setattr(products, "LAYS_OUT", True)
    assert products.packed(weight) is None, "a small weight is quicker as it is"
    monkeypatch.setattr(products, "LARGE", 50 * 30)
    laid_out = products.packed(weight)
    assert laid_out is not None
    torch.testing.assert_close(products.few(x, laid_out), x @ weight.T, rtol=1e-4, atol=1e-5)
    before = products.few(x, laid_out)
    weight.zero_()
    assert torch.equal(products.few(x, laid_out), before)


@pytest.mark.parametrize("change", ["float64", "bfloat16", "three dimensions", "no oneDNN"])
def test_elsewhere_it_is_pytorch_s_own_product(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(products, "_product", never)
    x, weight = torch.randn(100, 8), torch.randn(9, 8)
    if change == "no oneDNN":
        monkeypatch.setattr(products, "_ONEDNN", False)
        assert products.packed(weight) is None
    elif change == "three dimensions":
        x = x.view(2, 50, 8)
    else:
        x, weight = x.to(getattr(torch, change)), weight.to(getattr(torch, change))
        assert products.packed(weight) is None
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))


def test_a_packed_head_is_read_while_entered_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LAYS_OUT", products._ONEDNN)
    monkeypatch.setattr(products, "LARGE", 1)
    model = CausalModel(random_model("qwen2", 46), 40, 0)
    hidden = torch.randn(3, 32)
    with torch.no_grad():
        plain = model.head(hidden)
        with model.copied_weights():
            torch.testing.assert_close(model.head(hidden), plain, rtol=1e-4, atol=1e-4)
        model.model.get_output_embeddings().weight.zero_()
        assert not model.head(hidden).any()
