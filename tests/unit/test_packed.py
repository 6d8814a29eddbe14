"""Scoring without padding equals scoring with it: hidden states and gradients, for every architecture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.models import packed as packed_module
from headstart.models.causal import CausalModel
from headstart.models.packed import ATTENTION, hosts, pack
from headstart.records import Prompt, Rollout
from headstart.testing import ARCHITECTURES, Architecture, random_model

V = 46
Pieces = list[tuple[tuple[int, ...], tuple[int, ...]]]
LONG = tuple(range(4, 22))  # longer than Gemma's window of 8
MIXED: Pieces = [(LONG, (7, 8, 9)), ((6, 7), (9,)), (LONG, tuple(range(10, 40))), ((6, 7, 8), (9, 9)), ((6, 7), (5, 4))]
"""(6, 7) begins another prompt."""


def model(architecture: Architecture = "llama") -> CausalModel:
    return CausalModel(random_model(architecture, V).double(), V, 0)


def rollouts(pieces: Pieces) -> list[Rollout]:
    return [Rollout(Prompt(i, str(i), p, p), 0, c, False) for i, (p, c) in enumerate(pieces)]


def both(m: CausalModel, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Hidden states with padding and without; the packed attention stays switched on for both."""
    batch = m.batch(rollouts(pieces), "student")
    packed = m.completion_hidden(batch)
    m.packs = False
    padded = m.completion_hidden(batch)
    m.packs = True
    return padded, packed


@pytest.mark.parametrize("apart", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "gemma2"])
def test_hidden_states_and_gradients_equal_the_padded_ones(
    architecture: Architecture, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if apart:
        monkeypatch.setattr(packed_module, "APART", 0)
    m = model(architecture)
    assert m.use_packing()
    padded, packed = both(m, MIXED)
    assert packed.shape == (sum(len(c) for _, c in MIXED), 32)
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(padded.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = list(m.backbone.parameters())
    gradients = [torch.autograd.grad((x * upstream).sum(), parameters) for x in (padded, packed)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # norms and rotations are float32 inside
        assert a.any()


piece = st.tuples(
    st.lists(st.integers(2, V - 1), min_size=1, max_size=9).map(tuple),
    st.lists(st.integers(2, V - 1), min_size=1, max_size=12).map(tuple),
)


@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(piece, min_size=1, max_size=6))
def test_any_mixture_of_lengths(pieces: Pieces) -> None:
    m = model("gemma3")
    assert m.use_packing()
    padded, packed = both(m, pieces)
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)


def test_a_prompt_is_encoded_once_and_the_last_token_not_at_all() -> None:
    packing = pack([(6, 7), LONG, LONG], [(6,), (1, 2, 3), (4, 5)], torch.device("cpu"))
    assert packing.prompts.tokens == (LONG, (6, 7))
    assert packing.prompts.ids_L.tolist() == [*LONG, 6, 7]
    assert packing.prompts.position_L.tolist() == [*range(18), 0, 1]
    assert packing.prompts.last_U.tolist() == [17, 19]
    assert packing.ids_L.tolist() == [1, 2, 4]
    assert packing.position_L.tolist() == [18, 19, 18]
    assert packing.predicts_M.tolist() == [1, 0, 2, 3, 0, 4]
    assert packing.prompt_B.tolist() == [1, 0, 0]


def test_a_prompt_that_begins_another_has_no_tokens_of_its_own() -> None:
    prompts = pack([(6, 7), (6, 7, 8, 9), (5,), (6, 7, 8), (6, 8)], [(1,)] * 5, torch.device("cpu")).prompts
    assert prompts.tokens == ((6, 7, 8, 9), (6, 8), (5,), (6, 7, 8), (6, 7))
    assert prompts.ids_L.tolist() == [6, 7, 8, 9, 6, 8, 5]
    assert prompts.starts == (0, 4, 6, 0, 0)
    assert prompts.last_U.tolist() == [3, 5, 6, 2, 1]
    read = prompts.ids_L[prompts.place_UP]
    assert [tuple(row[real].tolist()) for row, real in zip(read, prompts.real_UP, strict=True)] == [*prompts.tokens]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12))
def test_each_prompt_lies_in_the_longest_that_begins_with_it(prompts: list[tuple[int, ...]]) -> None:
    found = hosts(prompts)
    assert [*found] == [*dict.fromkeys(prompts)]
    for prompt, host in found.items():
        assert host[: len(prompt)] == prompt
        assert found[host] == host
        beyond = [p for p in prompts if p[: len(host)] == host]
        assert set(beyond) == {host}, "no prompt begins with the host and is longer"


def test_a_horizon_of_one_token_has_no_rows() -> None:
    m = model()
    assert m.use_packing()
    padded, packed = both(m, [((5, 6, 7), (8,)), ((9, 10), (1,))])
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    """It runs the layers again in the backward pass, when nothing but what was handed to them is left."""
    m = model()
    assert m.use_packing()
    parameters = list(m.backbone.parameters())
    m.model.train()
    plain = torch.autograd.grad(m.completion_hidden(m.batch(rollouts(MIXED), "student")).square().sum(), parameters)
    m.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = torch.autograd.grad(m.completion_hidden(m.batch(rollouts(MIXED), "student")).square().sum(), parameters)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_an_architecture_that_needs_another_attention_goes_on_with_padding() -> None:
    m = model("gemma2")
    m.model.set_attn_implementation("eager")  # newer transformers choose it themselves, for its soft cap
    assert not m.use_packing()
    assert m.batch(rollouts(MIXED), "student").packing is None
    assert m.model.config._attn_implementation == "eager"


def test_a_model_that_packs_wrongly_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    rotary = m.backbone.rotary_emb.forward
    monkeypatch.setattr(
        m.backbone.rotary_emb, "forward", lambda x, position_ids: rotary(x, position_ids * (len(position_ids) > 1))
    )
    assert not m.use_packing()
    assert m.model.config._attn_implementation == "sdpa" != ATTENTION
