"""Attention in two parts is one softmax over prompt and completion, in value and gradient."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.models.apart import SharedPrompts, attend_apart
from headstart.models.packed import Attend, pack
from headstart.records import Packing

SCALE = 0.7
Lengths = list[tuple[int, int]]
"""Of a prompt and of its completion, for each rollout."""


def packed(lengths: Lengths) -> Packing:
    """Prompts of one length are one prompt, and one begins those whose lengths are larger by an even number."""
    prompts, completions = ([(p % 2, *range(p - 1)) for p, _ in lengths], [tuple(range(c)) for _, c in lengths])
    return pack(prompts, completions, torch.device("cpu"))


def heads(packing: Packing, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of the completions, keys and values of the prompts."""
    draws, (L, P) = torch.Generator().manual_seed(0), (len(packing.ids_L), len(packing.prompts.ids_L))
    shapes = [(L, 2 * groups, 4), *[(L, 2, 4)] * 2, *[(P, 2, 4)] * 2]
    return [(2 * torch.randn(s, generator=draws)).to(dtype).requires_grad_() for s in shapes]


def one_softmax(packing: Packing, lengths: Lengths, x: list[Tensor]) -> Tensor:
    """Token by token, in the order of the packing."""
    q, k, v, prompt_k, prompt_v = x
    prompts = packing.prompts
    found, first = [], 0
    for (_, completion), u in zip(lengths, packing.prompt_B.tolist(), strict=True):
        prompt = prompts.place_UP[u][prompts.real_UP[u]]
        for n in range(first, first + completion - 1):
            keys, values = (
                torch.cat([a[prompt], b[first : n + 1]]).repeat_interleave(q.shape[1] // 2, dim=1)
                for a, b in ((prompt_k, k), (prompt_v, v))
            )
            share_TH = (torch.einsum("hd,thd->th", q[n], keys) * SCALE).softmax(dim=0)
            found.append(torch.einsum("th,thd->hd", share_TH, values))
        first += completion - 1
    return torch.stack(found)


def gradients(y: Tensor, x: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return list(torch.autograd.grad(y, x, upstream, allow_unused=True, materialize_grads=True))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=7).filter(
        lambda rows: any(completion > 1 for _, completion in rows)
    ),
    groups=st.integers(1, 3),
)
def test_two_parts_are_one_softmax(lengths: Lengths, groups: int) -> None:
    packing = packed(lengths)
    x = heads(packing, groups, torch.float64)
    found = attend_apart(*x[:3], (x[3], x[4]), packing, SCALE)
    expected = one_softmax(packing, lengths, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(found, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_rounding_is_that_of_one_masked_softmax() -> None:
    packing = packed([(90, 200)] * 3 + [(40, 120)] * 2)
    exact, plain, apart = (heads(packing, 2, dtype) for dtype in (torch.float64, torch.float32, torch.float32))
    attend = Attend(SCALE)
    results = [
        attend.completions(*exact[:3], (exact[3], exact[4]), packing),  # short enough for a mask
        attend.completions(*plain[:3], (plain[3], plain[4]), packing),
        attend_apart(*apart[:3], (apart[3], apart[4]), packing, SCALE),
    ]
    wanted, masked, parted = ([y, *gradients(y, x)] for y, x in zip(results, (exact, plain, apart), strict=True))
    for a, b, c in zip(wanted, masked, parted, strict=True):
        assert (c.double() - a).norm() <= 1.5 * (b.double() - a).norm()


def test_a_long_context_has_no_mask_and_a_sliding_window_has_one() -> None:
    packing = packed([(500, 40), (3, 9)])
    x = heads(packing, 2, torch.float64)
    whole = Attend(SCALE).completions(*x[:3], (x[3], x[4]), packing)
    assert not packing.masks
    wide = Attend(SCALE, window=538).completions(*x[:3], (x[3], x[4]), packing)
    assert {mask.dtype for mask in packing.masks.values()} == {torch.float64}
    # 500 + 39 places: the last token alone does not see the first one.
    torch.testing.assert_close(wide[:38], whole[:38], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(wide[39:], whole[39:], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(wide[38], whole[38], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True),
    rows=st.lists(st.integers(0, 3), min_size=2, max_size=8),
    own=st.integers(1, 4),
)
def test_rows_that_share_their_prompts_see_them(lengths: list[int], rows: list[int], own: int) -> None:
    draws, P = torch.Generator().manual_seed(0), max(lengths)
    prompt_B = [row % len(lengths) for row in rows]
    layers = [tuple(torch.randn(len(lengths), 2, P, 4, generator=draws).double() for _ in range(2))]
    real_UP = torch.arange(P) >= P - torch.tensor(lengths)[:, None]
    q_BKgd, keys, values = (torch.randn(len(rows), 2, n, 4, generator=draws).double() for n in (3, own, own))
    shared = SharedPrompts.of(layers, real_UP, prompt_B)  # type: ignore[arg-type]
    for kept in (list(range(len(rows))), list(range(0, len(rows), 2))):
        some = shared.keep(kept)
        assert len(some.real_UP) == len({prompt_B[row] for row in kept})
        whole_k, whole_v = some.spread(0, keys[kept], values[kept])
        scores = q_BKgd[kept] @ whole_k.mT * SCALE
        unreal = ~torch.cat([real_UP[[prompt_B[row] for row in kept]], torch.ones(len(kept), own).bool()], dim=1)
        expected = scores.masked_fill(unreal[:, None, None], -torch.inf).softmax(-1) @ whole_v
        found = some.attend(0, q_BKgd[kept], keys[kept], values[kept], SCALE)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
