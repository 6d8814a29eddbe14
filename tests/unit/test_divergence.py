import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.config.schema import (
    DivergenceConfig,
    ForwardKL,
    FullSupport,
    GeneralizedJSD,
    ReverseKL,
    SampledSupport,
    Support,
    TopKSupport,
)
from headstart.errors import VocabularyError
from headstart.losses.divergence import divergence_rows, position_stats
from headstart.losses.events import REMOVED, Events, join

FULL, SAMPLED = FullSupport(), SampledSupport()
BETAS = (0.1, 0.5, 0.8)


def kinds(support: Support) -> list[DivergenceConfig]:
    return [
        ReverseKL(support=support),
        ForwardKL(support=support),
        *(GeneralizedJSD(beta=beta, support=support) for beta in BETAS),
    ]


def name(config: DivergenceConfig) -> str:
    return f"{config.type}{getattr(config, 'beta', '')}-{config.support.type}{getattr(config.support, 'k', '')}"


def draw(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


# --- the independent reference: plain loops over plain floats --------------------------------------------------------


def softmax(logits: list[float]) -> list[float]:
    peak = max(logits)
    mass = [math.exp(x - peak) for x in logits]
    return [m / math.fsum(mass) for m in mass]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def reference(config: DivergenceConfig, student: list[float], teacher: list[float]) -> float:
    p, q = softmax(student), softmax(teacher)
    if config.support.type == "top_k" and config.support.k < len(p):
        best = sorted(range(len(p)), key=lambda v: -p[v])[: config.support.k]
        rest = [v for v in range(len(p)) if v not in best]
        p, q = ([x[v] for v in best] + [math.fsum(x[v] for v in rest)] for x in (p, q))
    if config.type == "reverse_kl":
        return kl(p, q)
    if config.type == "forward_kl":
        return kl(q, p)
    m = [config.beta * b + (1 - config.beta) * a for a, b in zip(p, q, strict=True)]
    return config.beta * kl(q, m) + (1 - config.beta) * kl(p, m)


def reference_gradient(config: DivergenceConfig, student: list[float], teacher: list[float]) -> list[float]:
    """Central differences of the reference value in the student's logits."""
    eps, found = 1e-5, []
    for v in range(len(student)):
        up, down = list(student), list(student)
        up[v] += eps
        down[v] -= eps
        found.append((reference(config, up, teacher) - reference(config, down, teacher)) / (2 * eps))
    return found


def measured(config: DivergenceConfig, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, surrogate and student gradient of each row."""
    student = student.detach().requires_grad_()
    teacher = teacher.detach().requires_grad_()
    found = divergence_rows(config, student, teacher, torch.zeros(len(student), dtype=torch.int64))
    found.surrogate_M.sum().backward()
    assert not found.value_M.requires_grad
    assert teacher.grad is None
    assert student.grad is not None
    return found.value_M, found.surrogate_M.detach(), student.grad


EXACT = [
    config for support in (FULL, TopKSupport(k=1), TopKSupport(k=3), TopKSupport(k=20)) for config in kinds(support)
]


@pytest.mark.parametrize("config", EXACT, ids=name)
def test_value_and_gradient_equal_the_reference(config: DivergenceConfig) -> None:
    student, teacher = draw(0, 4, 7), draw(1, 4, 7)
    value, surrogate, gradient = measured(config, student, teacher)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    assert value.dtype == torch.float64
    assert value.tolist() == pytest.approx([reference(config, s, t) for s, t in rows], rel=1e-12)
    assert torch.equal(value, surrogate)
    expected = torch.tensor([reference_gradient(config, s, t) for s, t in rows], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    low, _, _ = measured(config, student.float(), teacher.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", EXACT, ids=name)
def test_gradcheck(config: DivergenceConfig) -> None:
    student, teacher = draw(2, 3, 6).requires_grad_(), draw(3, 3, 6)
    tokens = torch.zeros(3, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda s: divergence_rows(config, s, teacher, tokens).surrogate_M, (student,))


@pytest.mark.parametrize("config", [*kinds(FULL), *kinds(TopKSupport(k=3)), *kinds(SAMPLED)], ids=name)
def test_zero_where_the_models_agree(config: DivergenceConfig) -> None:
    logits = draw(4, 5, 300).float()
    value, _, gradient = measured(config, logits, logits)
    torch.testing.assert_close(value, torch.zeros(5), rtol=0, atol=2e-7)
    # Forward KL's single-sample gradient is (p - one_hot(y)) q/p: zero only on average.
    if config.support.type != "sampled" or config.type != "forward_kl":
        torch.testing.assert_close(gradient.abs().max(), torch.tensor(0.0), rtol=0, atol=1e-7)


def test_reverse_kl_is_exactly_zero_where_the_models_agree() -> None:
    logits = draw(4, 5, 5000).float()
    for support in (FULL, TopKSupport(k=64)):
        value, _, gradient = measured(ReverseKL(support=support), logits, logits)
        assert not value.any()
        assert not gradient.any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    V=st.integers(2, 200),
    spread=st.sampled_from([0.01, 1.0, 8.0, 60.0]),
    nearness=st.sampled_from([0.0, 1e-3, 1.0]),
    config=st.sampled_from([*kinds(FULL), *kinds(TopKSupport(k=1)), *kinds(TopKSupport(k=8))]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_never_negative_and_always_finite(
    seed: int, V: int, spread: float, nearness: float, config: DivergenceConfig, dtype: torch.dtype
) -> None:
    student = draw(seed, 3, V, scale=spread)
    teacher = student + nearness * draw(seed + 1, 3, V, scale=spread)
    value, surrogate, gradient = measured(config, student.to(dtype), teacher.to(dtype))
    assert value.dtype == torch.float32
    assert (value >= 0).all()
    assert (surrogate > -1e-4).all()
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    if config.type == "jsd":
        bound = -config.beta * math.log(config.beta) - (1 - config.beta) * math.log(1 - config.beta)
        assert (value <= bound + 1e-5).all()


@pytest.mark.parametrize("config", [*kinds(FULL), *kinds(TopKSupport(k=3))], ids=name)
def test_direction(config: DivergenceConfig) -> None:
    student, teacher = draw(5, 3, 9), draw(6, 3, 9)
    there, back = (measured(config, *pair)[0] for pair in ((student, teacher), (teacher, student)))
    if config == GeneralizedJSD(beta=0.5):  # the one symmetric member
        torch.testing.assert_close(there, back)
    else:
        assert ((there - back).abs() > 1e-3).all()


def test_reverse_kl_seeks_modes_and_forward_kl_covers() -> None:
    both = torch.tensor([[2.0, 2.0, -4.0]])
    one, wide = torch.tensor([[4.0, -2.0, -4.0]]), torch.tensor([[1.0, 1.0, 0.5]])
    reverse = [float(measured(ReverseKL(), s, both)[0]) for s in (one, wide)]
    forward = [float(measured(ForwardKL(), s, both)[0]) for s in (one, wide)]
    assert forward[0] > reverse[0]
    assert forward[1] < forward[0]
    # gradient descent on a token only the student likes: reverse KL pushes it down
    assert float(measured(ReverseKL(), wide, both)[2][0, 2]) > 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), V=st.integers(2, 30), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_top_k_grows_to_the_full_value(seed: int, V: int, spread: float) -> None:
    student, teacher = draw(seed, 2, V, scale=spread), draw(seed + 1, 2, V, scale=spread)
    for full in kinds(FULL):
        exact, _, gradient = measured(full, student, teacher)
        before = torch.zeros(2, dtype=torch.float64)
        for k in range(1, V + 2):
            config = full.model_copy(update={"support": TopKSupport(k=k)})
            value, _, found = measured(config, student, teacher)
            assert (value <= exact + 1e-12).all()
            assert (value >= before - 1e-12).all()  # nested supports can only tell more apart
            before = value
            if k >= V - 1:
                torch.testing.assert_close(value, exact)
                torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-10)


def test_the_tail_bucket_survives_float32() -> None:
    """A tail of 1e-10 is invisible to 1 - sum(p) in float32, yet a teacher that doubts it makes it count."""
    student, teacher = torch.zeros(1, 50), torch.zeros(1, 50)
    student[0, 0], teacher[0, 0] = 27.0, -20.0
    config = ForwardKL(support=TopKSupport(k=1))
    expected = reference(config, student[0].double().tolist(), teacher[0].double().tolist())
    assert float(measured(config, student, teacher)[0]) == pytest.approx(expected, rel=1e-5)
    assert expected > 20


@pytest.mark.parametrize("exact", kinds(FULL), ids=name)
def test_sampled_form_is_exact_in_expectation(exact: DivergenceConfig) -> None:
    V = 6
    student, teacher = draw(7, 1, V), draw(8, 1, V)
    value, _, gradient = measured(exact, student, teacher)
    rows = student.repeat(V, 1).requires_grad_()
    config = exact.model_copy(update={"support": SAMPLED})
    found = divergence_rows(config, rows, teacher.repeat(V, 1), torch.arange(V))
    p = student.softmax(-1)[0]
    torch.testing.assert_close((p * found.value_M).sum(), value[0])
    (mean,) = torch.autograd.grad((p * found.surrogate_M).sum(), rows)
    torch.testing.assert_close(mean.sum(0), gradient[0])
    assert not found.value_M.requires_grad
    assert not torch.allclose(mean.sum(0), torch.zeros(V, dtype=torch.float64), atol=1e-3)


def test_sampled_values_by_hand() -> None:
    student = torch.tensor([[0.2, 0.8]]).double().log()
    teacher = torch.tensor([[0.6, 0.4]]).double().log()
    token = torch.tensor([0])
    value = {c.type: float(divergence_rows(c, student, teacher, token).value_M) for c in kinds(SAMPLED)[:3]}
    assert value["reverse_kl"] == pytest.approx(math.log(0.2 / 0.6))  # negative: single values may be
    assert value["forward_kl"] == pytest.approx(3 * math.log(3))
    m = 0.1 * 0.6 + 0.9 * 0.2
    assert value["jsd"] == pytest.approx(0.1 * 3 * math.log(0.6 / m) + 0.9 * math.log(0.2 / m))


ALL = [*kinds(FULL), *kinds(TopKSupport(k=2)), *kinds(TopKSupport(k=6)), *kinds(SAMPLED)]


@pytest.mark.parametrize("removed", [REMOVED, -math.inf])
@pytest.mark.parametrize("config", ALL, ids=name)
def test_removed_ids_contribute_nothing(config: DivergenceConfig, removed: float) -> None:
    student, teacher = draw(9, 3, 5).float(), draw(10, 3, 5).float()
    value, _, gradient = measured(config, student, teacher)
    hole = torch.full((3, 2), removed)
    padded = [torch.cat([x[:, :1], hole, x[:, 1:]], -1) for x in (student, teacher)]
    value_, _, gradient_ = measured(config, *padded)
    torch.testing.assert_close(value_, value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient_[:, [0, 3, 4, 5, 6]], gradient, rtol=1e-5, atol=1e-7)
    assert not gradient_[:, 1:3].any()


@pytest.mark.parametrize("config", ALL, ids=name)
def test_ids_that_neither_probability_reaches_are_no_nan(config: DivergenceConfig) -> None:
    """The student's probability underflows to 0 exactly where the teacher's logit is -inf: 0 * inf counts as 0."""
    student = torch.tensor([[0.0, 1.0, -200.0, 0.5], [0.0, 1.0, -math.inf, 0.5]])
    teacher = torch.tensor([[0.5, 1.0, -math.inf, 0.0], [0.5, 1.0, -300.0, 0.0]])
    value, _, gradient = measured(config, student, teacher)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_an_impossible_token_is_infinite_in_reverse_and_finite_in_the_other_directions() -> None:
    student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -math.inf]])
    assert float(measured(ReverseKL(), student, teacher)[0]) == math.inf
    assert float(measured(ForwardKL(), student, teacher)[0]) == pytest.approx(math.log(1.5))
    mixture = kl([1 / 3] * 3, [5 / 12, 5 / 12, 1 / 6]) / 2 + kl([0.5, 0.5, 0.0], [5 / 12, 5 / 12, 1 / 6]) / 2
    assert float(measured(GeneralizedJSD(), student, teacher)[0]) == pytest.approx(mixture)


def test_different_widths_are_an_error() -> None:
    with pytest.raises(VocabularyError, match=r"\(2, 5\).*\(2, 6\)"):
        divergence_rows(ReverseKL(), torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64))


# --- stop classes ----------------------------------------------------------------------------------------------------


def merged(logits: Tensor, stops: tuple[int, ...]) -> Tensor:
    return join(Events.of_stops(stops, logits.shape[-1]), logits)


@pytest.mark.parametrize("config", kinds(FULL), ids=name)
def test_a_stop_class_sums_probabilities(config: DivergenceConfig) -> None:
    student, teacher, stops = draw(11, 3, 6), draw(12, 3, 6), (4, 1, 2)
    both = [merged(x, stops) for x in (student, teacher)]
    for before, after in zip((student, teacher), both, strict=True):
        p = before.softmax(-1)
        small = torch.stack([p[:, 0], p[:, 3], p[:, [4, 1, 2]].sum(-1), p[:, 5]], -1)
        torch.testing.assert_close(after.softmax(-1), small)
    expected = [reference(config, *(x[i].tolist() for x in both)) for i in range(3)]
    assert measured(config, *both)[0].tolist() == pytest.approx(expected)


def test_gradients_flow_through_the_stop_class() -> None:
    teacher = merged(draw(13, 2, 5), (3, 0))
    tokens = torch.tensor([2, 1])

    def through(student: Tensor) -> Tensor:
        return divergence_rows(ReverseKL(), merged(student, (3, 0)), teacher, tokens).surrogate_M

    assert torch.autograd.gradcheck(through, (draw(14, 2, 5).requires_grad_(),))


def test_moving_mass_inside_the_stop_class_costs_nothing() -> None:
    ends_with_two = torch.tensor([[0.0, 1.0, 5.0, -9.0]])
    ends_with_three = torch.tensor([[0.0, 1.0, -9.0, 5.0]])
    apart = measured(ReverseKL(), ends_with_two, ends_with_three)[0]
    together = measured(ReverseKL(), *(merged(x, (2, 3)) for x in (ends_with_two, ends_with_three)))[0]
    assert float(apart) > 10
    assert float(together) < 1e-6


def test_fewer_than_two_stop_ids_change_nothing() -> None:
    logits = draw(15, 2, 4)
    for stops in ((), (3,), (3, 3)):
        assert merged(logits, stops) is logits
    events = Events.of_stops((2, 3), 4)
    assert events is not None
    assert events.of_tokens(torch.tensor([0, 3, 1, 2, 3])).tolist() == [0, 2, 1, 2, 2]
    before = logits.clone()
    merged(logits, (0, 1))
    assert torch.equal(logits, before)


# --- readings --------------------------------------------------------------------------------------------------------


def test_position_stats() -> None:
    student = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.2, 0.4], [0.2, 0.4, 0.4]]).log()
    stats = position_stats(student, teacher, torch.tensor([2, 0, 1]))
    entropy = [-sum(p * math.log(p) for p in row if p) for row in ((0.1, 0.2, 0.7), (0.5, 0.5), (0.25, 0.25, 0.5))]
    assert stats.student_entropy_M.tolist() == pytest.approx(entropy)
    assert float(stats.teacher_entropy_M[0]) == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.3, 0.2)))
    assert stats.student_logprob_M.exp().tolist() == pytest.approx([0.7, 0.5, 0.25])
    assert stats.teacher_logprob_M.exp().tolist() == pytest.approx([0.2, 0.4, 0.4])
    assert stats.teacher_rank_M.tolist() == [3, 1, 1]  # ties share the best rank
    assert not stats.student_entropy_M.requires_grad


def test_ranks_compare_logits_as_they_are() -> None:
    """1 and 1 + 1e-7 differ as logits; less a normaliser of 12 they would be the same float32."""
    teacher = torch.full((1, 200_000), 1.0)
    teacher[0, 7] = 1.0 + 1.2e-7
    stats = position_stats(torch.zeros(1, 200_000), teacher, torch.tensor([3]))
    assert stats.teacher_rank_M.tolist() == [2]
    assert float(stats.student_entropy_M) == pytest.approx(math.log(200_000))
