from collections.abc import Callable
from dataclasses import dataclass, field, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.config.schema import DivergenceConfig, ForwardKL, GeneralizedJSD, ReverseKL, SampledSupport, TopKSupport
from headstart.numerics.chunked import chunked_divergence, default_chunk
from headstart.numerics.divergence import divergence_rows, merge_stop_class, merge_tokens, position_stats

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

    def logits(self, rows: slice) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked.append(rows.stop - rows.start)
        return self.logits_MV[rows]


@dataclass
class Head:
    """A trainable head with a bias and Gemma's soft cap; counts the rows it is asked for."""

    weight_VD: Tensor
    bias_V: Tensor
    asked: list[int] = field(default_factory=list)

    def __call__(self, hidden_mD: Tensor) -> Tensor:
        self.asked.append(len(hidden_mD))
        return 3.0 * torch.tanh((hidden_mD @ self.weight_VD.T + self.bias_V) / 3.0)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight_VD, self.bias_V]


@dataclass
class World:
    hidden: Tensor
    head: Head
    teacher: Teacher
    tokens: Tensor
    weights: Tensor

    def gradients(self, surrogate: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad((self.weights * surrogate).sum(), inputs)


def world(seed: int = 0, rows: int = M, dtype: torch.dtype = torch.float32) -> World:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    hidden = normal(rows, D).requires_grad_()
    head = Head(normal(V, D).requires_grad_(), normal(V).requires_grad_())
    tokens = torch.randint(0, V, (rows,), generator=generator)
    return World(hidden, head, Teacher(2 * normal(rows, V)), tokens, torch.rand(rows, generator=generator, dtype=dtype))


def assert_equals_whole(config: DivergenceConfig, w: World, chunk: int, merge_ids: tuple[int, ...]) -> None:
    """Values, statistics, and the gradients of hidden states and head against the computation without chunks."""
    student, teacher = (merge_stop_class(x, merge_ids) for x in (w.head(w.hidden), w.teacher.logits_MV))
    tokens = merge_tokens(w.tokens, merge_ids)
    whole = divergence_rows(config, student, teacher, tokens)
    stats = position_stats(student, teacher, tokens)
    inputs = [w.hidden, *w.head.parameters]
    expected = w.gradients(whole.surrogate_M, inputs)
    w.head.asked.clear()
    found, found_stats = chunked_divergence(
        config, w.hidden, w.head, w.teacher, w.tokens, chunk=chunk, merge_ids=merge_ids, head_parameters=inputs[1:]
    )
    gradients = w.gradients(found.surrogate_M, inputs)
    torch.testing.assert_close(found.value_M, whole.value_M, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.surrogate_M, whole.surrogate_M, rtol=1e-6, atol=1e-6)
    assert not found.value_M.requires_grad
    for column in fields(stats):
        a, b = getattr(found_stats, column.name), getattr(stats, column.name)
        assert a.dtype == b.dtype
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert b.any()
    assert max(w.head.asked + w.teacher.asked) <= chunk


@pytest.mark.parametrize("merge_ids", [(), (5, 2)])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_chunked_equals_whole(config: DivergenceConfig, merge_ids: tuple[int, ...]) -> None:
    for chunk in (1, 4, M - 1, M, M + 5):
        assert_equals_whole(config, world(), chunk, merge_ids)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40), chunk=st.integers(1, 45), config=st.sampled_from(CONFIGS))
def test_chunked_equals_whole_for_any_sizes(seed: int, rows: int, chunk: int, config: DivergenceConfig) -> None:
    assert_equals_whole(config, world(seed, rows, torch.float64), chunk, ())


def test_no_more_than_a_chunk_of_logits_ever_exists() -> None:
    """What autograd keeps is measured, not only what the heads are asked for."""
    w = world(rows=64)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found, _ = chunked_divergence(ReverseKL(), w.hidden, w.head, w.teacher, w.tokens, chunk=8)
        assert max(kept, default=0) <= w.hidden.numel()  # between forward and backward: no logits at all
        assert w.head.asked == [8] * 8
        found.surrogate_M.sum().backward()
    assert max(kept) <= max(8 * V, w.hidden.numel()) < 64 * V
    assert w.head.asked == w.teacher.asked == [8] * 16


def test_a_small_batch_is_computed_once() -> None:
    w = world()
    found, _ = chunked_divergence(ReverseKL(), w.hidden, w.head, w.teacher, w.tokens, chunk=M)
    found.surrogate_M.sum().backward()
    assert w.head.asked == w.teacher.asked == [M]


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_no_tokens_give_zero_gradients(config: DivergenceConfig) -> None:
    w = world(rows=0)
    found, stats = chunked_divergence(
        config, w.hidden, w.head, w.teacher, w.tokens, chunk=4, merge_ids=(1, 2), head_parameters=w.head.parameters
    )
    assert found.value_M.shape == stats.teacher_rank_M.shape == (0,)
    found.surrogate_M.sum().backward()
    assert w.hidden.grad is not None
    for parameter in w.head.parameters:
        assert parameter.grad is not None
        assert not parameter.grad.any()


def frozen(head: Head) -> Callable[[Tensor], Tensor]:
    weight, bias = head.weight_VD.detach(), head.bias_V.detach()
    return lambda hidden: hidden @ weight.T + bias


def test_a_frozen_head_gets_no_gradient_and_evaluation_none_at_all() -> None:
    w = world()
    frozen_parameters = [p.detach() for p in w.head.parameters]
    arguments = (frozen(w.head), w.teacher, w.tokens)
    found, _ = chunked_divergence(ReverseKL(), w.hidden, *arguments, chunk=5, head_parameters=frozen_parameters)
    found.surrogate_M.sum().backward()
    assert w.hidden.grad is not None
    assert w.head.weight_VD.grad is None
    with torch.no_grad():
        silent, _ = chunked_divergence(ReverseKL(), w.hidden, *arguments, chunk=5)
    assert not silent.surrogate_M.requires_grad
    torch.testing.assert_close(silent.value_M, found.value_M)


def test_float64_passes_gradcheck_through_chunks() -> None:
    w = world(rows=5)
    weight, hidden = w.head.weight_VD.detach().double().requires_grad_(), w.hidden.detach().double().requires_grad_()
    teacher = Teacher(w.teacher.logits_MV.double())

    def surrogate(hidden_MD: Tensor, weight_VD: Tensor) -> Tensor:
        found, _ = chunked_divergence(
            GeneralizedJSD(beta=0.3),
            hidden_MD,
            lambda h: h @ weight_VD.T,
            teacher,
            w.tokens,
            chunk=2,
            merge_ids=(3, 4),
            head_parameters=[weight_VD],
        )
        return found.surrogate_M

    assert torch.autograd.gradcheck(surrogate, (hidden, weight))


def test_bfloat16_heads_sum_their_chunks_in_float32() -> None:
    w = world(rows=256)
    weight = w.head.weight_VD.detach().bfloat16().requires_grad_()
    hidden = w.hidden.detach().bfloat16().requires_grad_()

    def gradient(chunk: int) -> Tensor:
        found, _ = chunked_divergence(
            ReverseKL(), hidden, lambda h: (h @ weight.T).float(), w.teacher, w.tokens, chunk=chunk,
            head_parameters=[weight],
        )  # fmt: skip
        return w.gradients(found.surrogate_M, [weight])[0].float()

    whole, parts = gradient(256), gradient(1)
    assert (parts - whole).norm() < 0.004 * whole.norm()  # 0.0012; 0.0134 when chunks are added in bfloat16


def test_a_head_computed_from_other_tensors() -> None:
    """A tied or adapted head may be the result of an operation rather than a leaf."""
    w = world()
    scale = torch.tensor(0.5, requires_grad=True)

    def gradient(chunk: int) -> tuple[Tensor, ...]:
        weight = w.head.weight_VD * scale
        found, _ = chunked_divergence(
            ReverseKL(), w.hidden, lambda h: h @ weight.T, w.teacher, w.tokens, chunk=chunk, head_parameters=[weight]
        )
        return w.gradients(found.surrogate_M, [w.hidden, scale])

    for a, b in zip(gradient(4), gradient(M), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_default_chunk_fits_the_budget() -> None:
    assert default_chunk(151_936) == 63
    assert default_chunk(64) * 64 * 4 * 7 <= 256 * 2**20
    assert default_chunk(151_936, budget_bytes=1) == 16
