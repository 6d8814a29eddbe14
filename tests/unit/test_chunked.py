"""The weighted divergence against the whole computation, for every divergence, chunk size, head and merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.config.schema import DivergenceConfig, ForwardKL, GeneralizedJSD, ReverseKL, SampledSupport, TopKSupport
from headstart.losses import chunked
from headstart.losses.chunked import Head, WeightedDivergence, default_chunk, read_divergence, weighted_divergence
from headstart.losses.divergence import divergence_rows, position_stats
from headstart.losses.events import Events, join

M, D, V = 23, 6, 17
CONFIGS: list[DivergenceConfig] = [
    kind(support=support)
    for kind in (ReverseKL, ForwardKL, GeneralizedJSD)
    for support in ({"type": "full"}, TopKSupport(k=4), SampledSupport())
]


def name(config: DivergenceConfig) -> str:
    return f"{config.type}-{config.support.type}"


@dataclass
class Teacher:
    """Counts the rows it is asked for."""

    logits_MV: Tensor
    asked: list[int] = field(default_factory=list)
    events: Events | None = None

    def logits(self, rows: slice) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked.append(rows.stop - rows.start)
        return join(self.events, self.logits_MV[rows])


@dataclass
class World:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher: Teacher
    tokens: Tensor
    weights: Tensor
    asked: list[int] = field(default_factory=list)
    events: Events | None = None

    def head(self, kind: str) -> Head:
        """`bare` is one projection; `capped` has a bias and Gemma's soft cap."""

        def logits(hidden_mD: Tensor) -> Tensor:
            self.asked.append(len(hidden_mD))
            plain = hidden_mD @ self.weight.T
            return plain if kind == "bare" else 3.0 * torch.tanh((plain + self.bias) / 3.0)

        return Head(logits, self.parameters(kind), self.weight if kind == "bare" else None, self.events)

    def parameters(self, kind: str) -> list[Tensor]:
        return [self.weight] if kind == "bare" else [self.weight, self.bias]

    def scored(self, config: DivergenceConfig, kind: str, chunk: int, merge: tuple[int, ...]) -> WeightedDivergence:
        self.joined(merge)
        arguments = (self.hidden, self.head(kind), self.teacher, self.tokens, self.weights)
        return weighted_divergence(config, *arguments, chunk=chunk)

    def joined(self, merge: tuple[int, ...]) -> None:
        """Student and teacher with the ids in `merge` as one event."""
        self.events = self.teacher.events = Events.of_stops(merge, V)


def world(seed: int = 0, rows: int = M, dtype: torch.dtype = torch.float32) -> World:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return World(
        hidden=normal(rows, D).requires_grad_(),
        weight=normal(V, D).requires_grad_(),
        bias=normal(V).requires_grad_(),
        teacher=Teacher(2 * normal(rows, V)),
        tokens=torch.randint(0, V, (rows,), generator=generator),
        weights=torch.rand(rows, generator=generator, dtype=dtype),
    )


def assert_equals_whole(
    config: DivergenceConfig, w: World, kind: str, chunk: int, merge: tuple[int, ...], tolerance: float
) -> None:
    """Loss, values, statistics, and the gradients of hidden states and head against the computation without chunks."""
    inputs = [w.hidden, *w.parameters(kind)]
    kept = w.teacher.logits_MV.clone()
    w.joined(merge)
    student, teacher = (join(w.events, x) for x in (w.head(kind).logits(w.hidden), w.teacher.logits_MV))
    tokens = w.head(kind).of_tokens(w.tokens)
    whole, stats = divergence_rows(config, student, teacher, tokens), position_stats(student, teacher, tokens)
    loss = (w.weights * whole.surrogate_M).sum()
    expected = torch.autograd.grad(loss, inputs)
    w.asked.clear()
    found = w.scored(config, kind, chunk, merge)
    gradients = torch.autograd.grad(3.0 * found.loss, inputs)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found.loss, loss, **close)
    torch.testing.assert_close(found.value_M, whole.value_M, **close)
    assert not found.value_M.requires_grad
    for column in fields(stats):
        a, b = getattr(found.stats, column.name), getattr(stats, column.name)
        assert a.dtype == b.dtype
        assert not a.requires_grad
        torch.testing.assert_close(a, b, **close)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, 3.0 * b, rtol=10 * tolerance, atol=10 * tolerance)
        assert b.any()
    assert max(w.asked + w.teacher.asked) <= chunk
    assert torch.equal(w.teacher.logits_MV, kept)  # what the teacher handed out is still its own


@pytest.mark.parametrize("kind", ["bare", "capped"])
@pytest.mark.parametrize("merge", [(), (5, 2)])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_chunks_equal_the_whole(config: DivergenceConfig, merge: tuple[int, ...], kind: str) -> None:
    for chunk in (1, 4, M - 1, M, M + 5):
        assert_equals_whole(config, world(), kind, chunk, merge, 2e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40), chunk=st.integers(1, 45), config=st.sampled_from(CONFIGS))
def test_chunks_equal_the_whole_in_float64(seed: int, rows: int, chunk: int, config: DivergenceConfig) -> None:
    assert_equals_whole(config, world(seed, rows, torch.float64), "bare", chunk, (), 1e-11)


def test_blocks_inside_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CACHE_ELEMENTS", 3 * V)  # three rows a block
    assert_equals_whole(ReverseKL(), world(), "bare", M, (), 2e-6)


def test_no_more_than_a_chunk_of_logits_ever_exists_and_each_is_made_once() -> None:
    """What autograd keeps is measured, not only what the heads are asked for."""
    w = world(rows=64)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = w.scored(ReverseKL(), "bare", 8, ())
        assert max(kept, default=0) <= max(w.hidden.numel(), w.weight.numel())
        found.loss.backward()
    assert w.asked == w.teacher.asked == [8] * 8


def test_a_removed_id_and_an_impossible_token() -> None:
    """0 ln 0 = 0 on both sides; a token that only the student can say is infinitely far."""
    w = world(rows=2)
    w.teacher.logits_MV[0, 3] = -torch.inf
    logits = torch.randn(2, V)
    logits[:, 3] = -torch.inf
    head = Head(lambda hidden: logits + 0 * hidden.sum(-1, keepdim=True), [])
    found = weighted_divergence(ReverseKL(), w.hidden, head, w.teacher, torch.tensor([0, 1]), torch.ones(2), chunk=2)
    expected = divergence_rows(ReverseKL(), logits, w.teacher.logits_MV, torch.tensor([0, 1]))
    torch.testing.assert_close(found.value_M, expected.value_M)
    assert found.value_M.isfinite().all()
    assert found.stats.student_entropy_M.isfinite().all()
    w.teacher.logits_MV[:, 5] = -torch.inf
    impossible = weighted_divergence(
        ReverseKL(), w.hidden, head, w.teacher, torch.tensor([0, 1]), torch.ones(2), chunk=2
    )
    assert impossible.value_M.tolist() == [torch.inf] * 2


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_no_tokens_give_zero_gradients(config: DivergenceConfig) -> None:
    w = world(rows=0)
    found = w.scored(config, "capped", 4, (1, 2))
    assert found.value_M.shape == found.stats.teacher_rank_M.shape == (0,)
    found.loss.backward()
    assert w.hidden.grad is not None
    for parameter in (w.weight, w.bias):
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_a_frozen_head_gets_no_gradient_and_evaluation_none_at_all() -> None:
    w = world()
    weight = w.weight.detach()
    head = Head(lambda h: h @ weight.T, [weight], weight)
    arguments = (head, w.teacher, w.tokens, w.weights)
    found = weighted_divergence(ReverseKL(), w.hidden, *arguments, chunk=5)
    found.loss.backward()
    assert w.hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        silent = weighted_divergence(ReverseKL(), w.hidden, *arguments, chunk=5)
    assert not silent.loss.requires_grad
    torch.testing.assert_close(silent.value_M, found.value_M)


@pytest.mark.parametrize("config", [ReverseKL(), GeneralizedJSD(beta=0.3)], ids=name)
def test_float64_passes_gradcheck(config: DivergenceConfig) -> None:
    w = world(rows=5)
    weight, hidden = w.weight.detach().double().requires_grad_(), w.hidden.detach().double().requires_grad_()
    teacher, weights = Teacher(w.teacher.logits_MV.double()), w.weights.double()

    def loss(hidden_MD: Tensor, weight_VD: Tensor) -> Tensor:
        head = Head(lambda h: h @ weight_VD.T, [weight_VD], weight_VD)
        return weighted_divergence(config, hidden_MD, head, teacher, w.tokens, weights, chunk=2).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_bfloat16_heads_sum_their_chunks_in_float32() -> None:
    w = world(rows=256)
    weight = w.weight.detach().bfloat16().requires_grad_()
    hidden = w.hidden.detach().bfloat16().requires_grad_()

    def gradient(chunk: int, bare: bool) -> Tensor:
        head = Head(lambda h: (h @ weight.T).float(), [weight], weight if bare else None)
        found = weighted_divergence(ReverseKL(), hidden, head, w.teacher, w.tokens, w.weights, chunk=chunk)
        return torch.autograd.grad(found.loss, [weight])[0].float()

    whole = gradient(256, bare=False)
    for bare in (True, False):
        assert (gradient(1, bare) - whole).norm() < 0.006 * whole.norm()  # 0.0134 when chunks are added in bfloat16


def test_a_head_cut_to_the_shared_vocabulary_trains_its_real_rows_only() -> None:
    w = world()
    padded = torch.cat([w.weight.detach(), torch.ones(4, D)]).requires_grad_()
    cut = padded[:V]
    head = Head(lambda h: h @ cut.T, [padded], cut)
    weighted_divergence(ReverseKL(), w.hidden, head, w.teacher, w.tokens, w.weights, chunk=4).loss.backward()
    expected = torch.autograd.grad(w.scored(ReverseKL(), "bare", M, ()).loss, [w.weight])[0]
    assert padded.grad is not None
    torch.testing.assert_close(padded.grad[:V], expected)
    assert not padded.grad[V:].any()


def test_a_head_computed_from_other_tensors() -> None:
    """An adapted head may be the result of an operation rather than a leaf."""
    w = world()
    scale = torch.tensor(0.5, requires_grad=True)

    def gradient(chunk: int) -> tuple[Tensor, ...]:
        weight = w.weight * scale
        head: Callable[[Tensor], Tensor] = lambda h: h @ weight.T  # noqa: E731
        found = weighted_divergence(
            ReverseKL(), w.hidden, Head(head, [weight], weight), w.teacher, w.tokens, w.weights, chunk=chunk
        )
        return torch.autograd.grad(found.loss, [w.hidden, scale])

    for a, b in zip(gradient(4), gradient(M), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merge", [(), (5, 2)])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_reading_alone_gives_the_same_values(config: DivergenceConfig, merge: tuple[int, ...]) -> None:
    w = world()
    found = w.scored(config, "capped", 5, merge)
    arguments = (w.hidden, w.head("capped"), w.teacher, w.tokens)
    value_M, stats = read_divergence(config, *arguments, chunk=4)
    torch.testing.assert_close(value_M, found.value_M, rtol=2e-6, atol=2e-6)
    for column in fields(stats):
        torch.testing.assert_close(getattr(stats, column.name), getattr(found.stats, column.name), rtol=2e-6, atol=2e-6)


def test_default_chunk_fits_the_budget() -> None:
    assert default_chunk(151_936) == 147
    assert default_chunk(64) == 512
    assert default_chunk(151_936, budget_bytes=1) == 16
