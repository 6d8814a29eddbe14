"""The divergence from several teachers against plain loops over plain floats, and what must hold of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.config.schema import DivergenceConfig, ForwardKL, GeneralizedJSD, ReverseKL, TopKSupport
from headstart.errors import ConfigError
from headstart.losses import chunked
from headstart.losses.chunked import Head
from headstart.losses.readings import overlap_and_margin
from headstart.losses.several import (
    MixtureScores,
    SeveralScores,
    Share,
    read_divergence,
    read_rows,
    weighted_divergence,
)

M, D, V = 11, 5, 7
KINDS: list[DivergenceConfig] = [
    ReverseKL(),
    ForwardKL(),
    GeneralizedJSD(beta=0.3),
    ReverseKL(support=TopKSupport(k=3)),
]


@dataclass
class Scores:
    logits_MV: Tensor

    def logits(self, rows: slice | Tensor) -> Tensor:
        return self.logits_MV[rows].clone()


def draw(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world(seed: int = 0) -> tuple[Tensor, Tensor, Head, Tensor, Tensor]:
    """Hidden states and a head with gradients, tokens, weights."""
    hidden_MD, weight_VD = draw(seed, M, D).requires_grad_(), draw(seed + 1, V, D).requires_grad_()
    head = Head(lambda h_mD: h_mD @ weight_VD.T, (weight_VD,), weight_VD)
    tokens_M = torch.randint(V, (M,), generator=torch.Generator().manual_seed(seed))
    return hidden_MD, weight_VD, head, tokens_M, draw(seed + 2, M).abs()


def share(rows: list[int], weights: float | list[float], head: Head, logits_mV: Tensor) -> Share:
    given = torch.tensor(weights if isinstance(weights, list) else [weights] * len(rows), dtype=torch.float64)
    return Share(torch.tensor(rows, dtype=torch.int64), given, head, Scores(logits_mV))


def softmax(row: list[float]) -> list[float]:
    mass = [math.exp(x - max(row)) for x in row]
    return [m / math.fsum(mass) for m in mass]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def test_losses_are_the_weighted_sum_of_the_divergences() -> None:
    hidden_MD, weight_VD, head, tokens_M, weights_M = world()
    weights, logits = [0.2, 0.5, 0.3], [draw(10 + k, M, V) for k in range(3)]
    every = list(range(M))
    scores = SeveralScores([share(every, w, head, q) for w, q in zip(weights, logits, strict=True)])
    found = weighted_divergence(ReverseKL(), hidden_MD, head, scores, tokens_M, weights_M, chunk=4)
    student = (hidden_MD @ weight_VD.T).tolist()
    for m in range(M):
        own = [kl(softmax(student[m]), softmax(q[m].tolist())) for q in logits]
        assert float(found.value_M[m]) == pytest.approx(math.fsum(w * d for w, d in zip(weights, own, strict=True)))
        entropies = [-math.fsum(p * math.log(p) for p in softmax(q[m].tolist())) for q in logits]
        mean = math.fsum(w * h for w, h in zip(weights, entropies, strict=True))
        assert float(found.stats.teacher_entropy_M[m]) == pytest.approx(mean)
    assert float(found.loss.detach()) == pytest.approx(float((weights_M * found.value_M).sum()))


def test_a_mixture_is_the_weighted_sum_of_the_distributions() -> None:
    weights, logits = [1.0, 3.0], [draw(20, M, V), draw(21, M, V)]
    found = MixtureScores([Scores(q) for q in logits], weights).logits(slice(0, M)).softmax(-1)
    for m in range(M):
        a, b = (softmax(q[m].tolist()) for q in logits)
        assert found[m].tolist() == pytest.approx([0.25 * x + 0.75 * y for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.type}-{c.support.type}")
def test_routing_gives_every_row_its_own_teacher_s_value_and_gradient(config: DivergenceConfig) -> None:
    """Beside one call whose teacher has, in every row, the logits of the one that the row names."""
    first, second = draw(30, M, V), draw(31, M, V)
    names = [m % 3 == 0 for m in range(M)]
    rows = [[m for m in range(M) if names[m]], [m for m in range(M) if not names[m]]]
    results = []
    for several in (True, False):
        hidden_MD, weight_VD, head, tokens_M, weights_M = world(3)
        scores: SeveralScores | Scores = SeveralScores(
            [share(rows[0], 1.0, head, first[rows[0]]), share(rows[1], 1.0, head, second[rows[1]])]
        )
        if not several:
            scores = Scores(torch.where(torch.tensor(names)[:, None], first, second))
        found = weighted_divergence(config, hidden_MD, head, scores, tokens_M, weights_M, chunk=3)
        gradients = torch.autograd.grad(found.loss, [hidden_MD, weight_VD])
        results.append((found.loss.detach(), found.value_M, *gradients, found.stats.teacher_rank_M))
        if found.tail_M2 is not None:
            results[-1] = (*results[-1], found.tail_M2)
    assert len(results[0]) == len(results[1])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_one_teacher_of_weight_one_is_that_teacher_bit_for_bit() -> None:
    logits_MV = draw(40, M, V).float()
    every = list(range(M))
    for make in (
        lambda head: SeveralScores([share(every, 1.0, head, logits_MV)]),
        lambda head: MixtureScores([Scores(logits_MV)], [0.7]),
    ):
        results = []
        for several in (True, False):
            hidden_MD, weight_VD, head, tokens_M, weights_M = world(5)
            scores = make(head) if several else Scores(logits_MV)
            found = weighted_divergence(ReverseKL(), hidden_MD, head, scores, tokens_M, weights_M, chunk=4)
            gradients = torch.autograd.grad(found.loss, [hidden_MD, weight_VD])
            read = read_divergence(ReverseKL(), hidden_MD, head, scores, tokens_M, chunk=4)
            rows = read_rows(overlap_and_margin, hidden_MD, head, scores, chunk=4)
            results.append([found.loss.detach(), found.value_M, *gradients, read[0], read[1].teacher_logprob_M, rows])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@given(st.integers(0, 1000), st.lists(st.floats(0.05, 5.0), min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_what_must_hold_of_any_weights(seed: int, weights: list[float]) -> None:
    hidden_MD, _, head, tokens_M, weights_M = world(seed)
    shares, total = [draw(seed + 50 + k, M, V) for k in range(len(weights))], sum(weights)
    every = list(range(M))

    def value(scores: object) -> Tensor:
        found = weighted_divergence(ReverseKL(), hidden_MD, head, scores, tokens_M, weights_M, chunk=5)  # type: ignore[arg-type]
        return found.value_M

    losses = SeveralScores([share(every, w / total, head, q) for w, q in zip(weights, shares, strict=True)])
    distributions = MixtureScores([Scores(q) for q in shares], weights)
    # Jensen: the divergence from the mixture is never above the mean of the divergences.
    assert bool((value(distributions) <= value(losses) + 1e-9).all())
    assert bool((value(distributions) >= 0).all())
    # Identical teachers are one.
    same = [shares[0]] * len(weights)
    alone = value(Scores(shares[0]))
    for scores in (
        SeveralScores([share(every, w / total, head, q) for w, q in zip(weights, same, strict=True)]),
        MixtureScores([Scores(q) for q in same], weights),
    ):
        torch.testing.assert_close(value(scores), alone, rtol=1e-9, atol=1e-9)
    # Their order does not matter, nor the scale of their weights.
    turned = MixtureScores([Scores(q) for q in shares[::-1]], [7 * w for w in weights[::-1]])
    torch.testing.assert_close(value(turned), value(distributions), rtol=1e-9, atol=1e-9)


def test_a_row_that_one_of_two_can_score_is_judged_by_it_alone() -> None:
    hidden_MD, _, head, tokens_M, weights_M = world(7)
    first, second = draw(60, M, V), draw(61, M, V)
    some = [m for m in range(M) if m % 2]
    halves = [0.25 if m % 2 else 1.0 for m in range(M)]
    scores = SeveralScores([share(list(range(M)), halves, head, first), share(some, 0.75, head, second[some])])
    value_M = weighted_divergence(ReverseKL(), hidden_MD, head, scores, tokens_M, weights_M, chunk=4).value_M
    one, other = (
        chunked.weighted_divergence(ReverseKL(), hidden_MD, head, Scores(q), tokens_M, weights_M, chunk=4).value_M
        for q in (first, second)
    )
    mixed = 0.25 * one + 0.75 * other
    torch.testing.assert_close(value_M, torch.where(torch.arange(M) % 2 == 1, mixed, one))


def test_several_teachers_have_no_common_logits() -> None:
    with pytest.raises(ConfigError, match="no common distribution"):
        SeveralScores([]).logits(slice(0, 1))
