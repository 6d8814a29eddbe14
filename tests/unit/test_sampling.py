import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.errors import NonFiniteError
from headstart.records import Sampling
from headstart.rollout import sampling as module
from headstart.rollout.sampling import draw_tokens, sample_tokens
from recorder import Recorder

PLAIN = Sampling(temperature=1.0, top_p=1.0)


def drawn(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """`draw_tokens` as its callers use it: those who have no token yet draw completely."""
    token, has = draw_tokens(logits, uniform, sampling, complete=False)
    whole, all_have = draw_tokens(logits, uniform, sampling, complete=True)
    assert all_have.all()
    assert torch.equal(token[has], whole[has])
    return whole


Draw = Callable[[Tensor, Tensor, Sampling], Tensor]
both_doors = pytest.mark.parametrize("draw", [sample_tokens, drawn], ids=["host", "device"])


def distribution(logits: list[float], sampling: Sampling) -> list[float]:
    """Naive reference: the probabilities after temperature, top-k and top-p."""
    peak = max(logits)
    mass = [math.exp((x - peak) / sampling.temperature) for x in logits]
    if 0 < sampling.top_k < len(logits):
        least = sorted(logits, reverse=True)[sampling.top_k - 1]
        mass = [m if x >= least else 0.0 for m, x in zip(mass, logits, strict=True)]
    if sampling.top_p < 1:
        total, reached, kept = sum(mass), 0.0, set()
        for i in sorted(range(len(mass)), key=lambda i: (-mass[i], i)):
            kept.add(i)
            reached += mass[i]
            if reached >= sampling.top_p * total:
                break
        mass = [m if i in kept else 0.0 for i, m in enumerate(mass)]
    return [m / sum(mass) for m in mass]


def naive(logits: list[float], u: float, sampling: Sampling) -> int:
    reached = 0.0
    for i, probability in enumerate(distribution(logits, sampling)):
        reached += probability
        if reached > u:
            return i
    raise AssertionError("u lies beyond the distribution")


def many(logits: Tensor, sampling: Sampling, draws: int, draw: Draw = sample_tokens) -> Tensor:
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    return draw(logits.expand(draws, -1), uniform, sampling)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    V=st.integers(1, 40),
    spread=st.sampled_from([0.01, 1.0, 5.0, 40.0]),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_p=st.sampled_from([0.0137, 0.51, 0.9501, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 17, 100]),
    candidates=st.sampled_from([1, 4, 1024]),
    block=st.sampled_from([1, 4, 512]),
)
@both_doors
def test_equals_the_naive_reference(
    draw: Draw,
    seed: int,
    V: int,
    spread: float,
    temperature: float,
    top_p: float,
    top_k: int,
    candidates: int,
    block: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, V, generator=generator) * spread
    uniform = torch.rand(5, generator=generator, dtype=torch.float64)
    sampling = Sampling(temperature, top_p, top_k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CANDIDATES", candidates)  # exercise the full sort as well
        patch.setattr(module, "_BLOCK", block)
        found = draw(logits, uniform, sampling)
    assert found.dtype == torch.int64
    assert found.tolist() == [naive(row, float(u), sampling) for row, u in zip(logits.tolist(), uniform, strict=True)]


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(0.7, 0.95), Sampling(1.3, 0.6, 5), Sampling(0.7, 1.0, 3)])
@both_doors
def test_frequencies_fit_the_exact_distribution(draw: Draw, sampling: Sampling) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 1.5
    draws = 20_000
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    counts = torch.bincount(draw(logits.expand(draws, -1), uniform, sampling), minlength=12).double()
    expected = torch.tensor(distribution(logits[0].tolist(), sampling), dtype=torch.float64) * draws
    assert (counts[expected == 0] == 0).all()
    alive = expected > 0
    freedom = int(alive.sum()) - 1
    chi_square = float(((counts - expected)[alive] ** 2 / expected[alive]).sum())
    assert chi_square < freedom + 5 * math.sqrt(2 * max(freedom, 1))


@both_doors
def test_greedy_takes_the_first_of_the_best(draw: Draw) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -torch.inf], [3.0, 1.0, 2.0, 3.0]])
    assert draw(logits, torch.tensor([0.99, 0.5]).double(), Sampling(temperature=0)).tolist() == [1, 0]


@both_doors
def test_ties_at_the_edge(draw: Draw) -> None:
    even = torch.zeros(1, 8)
    assert set(many(even, Sampling(1.0, 0.5), 64, draw).tolist()) == {0, 1, 2, 3}  # smallest set, first ids
    assert set(many(even, Sampling(1.0, 0.51), 64, draw).tolist()) == {0, 1, 2, 3, 4}
    assert set(many(even, Sampling(1.0, 1e-9), 64, draw).tolist()) == {0}  # never empty
    assert set(many(even, Sampling(1.0, 1.0, top_k=3), 64, draw).tolist()) == set(range(8))  # ties with the k-th stay
    step = torch.tensor([[1.0, 5.0, 1.0, 5.0, 1.0]])
    assert set(many(step, Sampling(1.0, 1.0, top_k=2), 64, draw).tolist()) == {1, 3}
    assert set(many(step, Sampling(1.0, 0.98), 4096, draw).tolist()) == {0, 1, 3}


@both_doors
def test_a_uniform_number_on_a_step_of_the_cdf_takes_the_id_above_it(draw: Draw) -> None:
    uniform = torch.tensor([0.0, 0.125, 0.5, 0.875]).double()
    assert draw(torch.zeros(4, 8), uniform, PLAIN).tolist() == [0, 1, 4, 7]
    first_is_dead = torch.tensor([[-torch.inf, 0.0, 1.0]])
    assert draw(first_is_dead, torch.zeros(1).double(), PLAIN).tolist() == [1]


@both_doors
def test_ties_across_the_candidate_edge(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[0.0] * 50 + [3.0]])
    whole = many(logits, Sampling(1.0, 0.8), 2000)
    for candidates in (1, 2, 30, 50):
        monkeypatch.setattr(module, "_CANDIDATES", candidates)
        assert torch.equal(many(logits, Sampling(1.0, 0.8), 2000, draw), whole)
    assert set(whole.tolist()) == {*range(36), 50}  # e^3 + 36 >= 0.8 (e^3 + 50) > e^3 + 35


@both_doors
def test_a_token_of_probability_zero_is_never_drawn(draw: Draw) -> None:
    dead = -torch.inf
    logits = torch.tensor([[dead, 0.0, dead, 1.0, dead], [dead, dead, dead, dead, 0.0], [0.0, dead, dead, dead, dead]])
    logits = torch.cat([logits, torch.tensor([[-5000.0, 0.0, -5000.0, 0.0, -5000.0]])])
    for sampling in (PLAIN, Sampling(0.7, 0.95), Sampling(0.7, 0.999, 4), Sampling(1e-6, 1.0), Sampling(50.0, 1.0)):
        for u in (0.0, 5e-324, 0.5, 1 - 2.0**-53, 1.0):
            tokens = draw(logits, torch.full((4,), u, dtype=torch.float64), sampling)
            assert logits.gather(1, tokens[:, None]).isfinite().all()
            if sampling.temperature < 50:
                assert tokens[3] in (1, 3)


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(), Sampling(0.7, 0.95, 50)])
@both_doors
def test_rows_do_not_know_each_other_at_real_width(draw: Draw, sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 151_936, generator=generator) * torch.tensor([[4.0], [0.02], [2.0], [1.0]])
    uniform = torch.rand(4, generator=generator, dtype=torch.float64)
    together = draw(logits, uniform, sampling)
    assert torch.equal(together, sample_tokens(logits, uniform, sampling))
    alone = [int(draw(logits[i : i + 1], uniform[i : i + 1], sampling)) for i in (3, 1, 0, 2)]
    assert [alone[2], alone[1], alone[3], alone[0]] == together.tolist()


@both_doors
def test_cumulative_mass_is_exact_at_real_width(draw: Draw) -> None:
    """A float32 CDF over 151,936 ids is off by 1e-3 near its end, hundreds of ids of a flat distribution."""
    logits = torch.randn(1, 151_936, generator=torch.Generator().manual_seed(4)) * 0.1
    uniform = torch.linspace(0.001, 0.999, 64, dtype=torch.float64)
    mass = np.exp(logits[0].double().numpy())
    expected = np.searchsorted(
        np.cumsum(mass.astype(np.longdouble)) / mass.astype(np.longdouble).sum(), uniform.numpy()
    )
    assert draw(logits.expand(64, -1), uniform, PLAIN).tolist() == expected.tolist()


def test_lower_precision_logits_are_upcast_and_left_alone() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    before, uniform = logits.clone(), torch.tensor([0.1, 0.5, 0.9]).double()
    assert torch.equal(sample_tokens(logits, uniform, Sampling()), sample_tokens(logits.float(), uniform, Sampling()))
    assert torch.equal(logits, before)
    kept = logits.float()
    sample_tokens(kept, uniform, Sampling(0.7, 0.5, 2))
    assert torch.equal(kept, before.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [PLAIN, Sampling(temperature=0), Sampling()])
def test_non_finite_rows_are_refused(bad: float, sampling: Sampling) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(NonFiniteError, match="row 1"):
        sample_tokens(logits, torch.zeros(3).double(), sampling)
    with pytest.raises(NonFiniteError, match="row 0"):
        sample_tokens(torch.full((1, 4), -math.inf), torch.zeros(1).double(), sampling)


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(temperature=0), Sampling(0.7, 0.95, 3)])
def test_a_draw_on_the_device_marks_rows_that_are_not_finite(sampling: Sampling) -> None:
    logits = torch.zeros(4, 5)
    logits[1, 2], logits[2, 0], logits[3] = math.nan, math.inf, -math.inf
    token, has = draw_tokens(logits, torch.full((4,), 0.5).double(), sampling, complete=True)
    assert has.tolist() == [True, False, False, False]
    assert ((token >= 0) & (token < 5)).all(), "what is fed next must be an id"


def test_a_draw_on_the_device_marks_rows_that_need_more_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CANDIDATES", 2)
    logits = torch.tensor([[0.0, 0, 0, 0], [9, 9, 0, 0], [9, 0, 0, 0]])
    _, has = draw_tokens(logits, torch.full((3,), 0.5).double(), Sampling(1.0, 0.95), complete=False)
    assert has.tolist() == [False, True, True]


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("sampling", [PLAIN, Sampling(temperature=0), Sampling(0.7, 0.95, 3)])
def test_a_draw_on_the_device_never_asks_it_for_a_value(sampling: Sampling, complete: bool) -> None:
    logits, uniform, found = torch.zeros(3, 40), torch.zeros(3).double(), torch.zeros(3, dtype=torch.int64)

    def draw() -> None:
        found.copy_(draw_tokens(logits, uniform, sampling, complete=complete)[0])

    replay = Recorder().capture(draw)
    logits.normal_(generator=torch.Generator().manual_seed(0))
    uniform.fill_(0.6)
    replay()
    assert found.tolist() == sample_tokens(logits, uniform, sampling).tolist()
