"""Reverse KL from a few log-probabilities of the teacher, against plain loops over plain floats and by enumeration."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import log_softmax

from headstart.config import loader
from headstart.config.schema import ReverseKL, SampledSupport, TopKSupport
from headstart.errors import ConfigError
from headstart.losses.candidates import FLOOR, candidate_divergence, distinct
from headstart.losses.chunked import Head, weighted_divergence
from headstart.losses.divergence import divergence_rows
from headstart.losses.functions import reverse_kl
from headstart.records import Divergence


def draw(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def candidates(student: Tensor, k: int, tokens: Tensor) -> Tensor:
    return torch.cat([student.topk(k, dim=-1).indices, tokens[:, None]], dim=-1)


def compare(student: Tensor, teacher: Tensor, ids: Tensor, *, unbiased: bool = False) -> Divergence:
    known = log_softmax(teacher, -1).gather(-1, ids.clamp_min(0))
    return candidate_divergence(student, ids, known, unbiased=unbiased)


def gradient(student: Tensor, found: Divergence) -> Tensor:
    return torch.autograd.grad(found.surrogate_M.sum(), student)[0]


# --- the independent reference ----------------------------------------------------------------------------------------


def softmax(logits: list[float]) -> list[float]:
    mass = [math.exp(x - max(logits)) for x in logits]
    return [m / math.fsum(mass) for m in mass]


def reference(student: list[float], teacher: list[float], support: set[int], token: int | None = None) -> float:
    p, q = softmax(student), softmax(teacher)
    rest = [v for v in range(len(p)) if v not in support]
    value = math.fsum(p[v] * math.log(p[v] / q[v]) for v in support)
    if not rest:
        return value
    gap = math.log(math.fsum(p[v] for v in rest) / math.fsum(q[v] for v in rest))
    value += math.fsum(p[v] for v in rest) * gap
    return value + (math.log(p[token] / q[token]) - gap if token in rest else 0.0)


def slope(student: list[float], teacher: list[float], support: set[int]) -> list[float]:
    eps, found = 1e-5, []
    for v in range(len(student)):
        up, down = list(student), list(student)
        up[v] += eps
        down[v] -= eps
        found.append((reference(up, teacher, support) - reference(down, teacher, support)) / (2 * eps))
    return found


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_bucket_form_equals_the_reference(k: int) -> None:
    student, teacher, tokens = draw(0, 5, 7).requires_grad_(), draw(1, 5, 7), torch.tensor([0, 1, 2, 3, 6])
    ids = candidates(student, k, tokens)
    found = compare(student, teacher, ids)
    rows = list(zip(student.tolist(), teacher.tolist(), [set(row) for row in ids[:, :-1].tolist()], strict=True))
    assert found.value_M.tolist() == pytest.approx([reference(*row) for row in rows], rel=1e-10)
    assert torch.equal(found.value_M, found.surrogate_M.detach())
    expected = torch.tensor([slope(*row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(gradient(student, found), expected, rtol=1e-6, atol=1e-9)
    assert found.tail_M2 is not None
    masses = [[sum(x for v, x in enumerate(softmax(z)) if v not in row[2]) for z in row[:2]] for row in rows]
    torch.testing.assert_close(found.tail_M2, torch.tensor(masses, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 3])
def test_the_unbiased_form_equals_the_reference(k: int) -> None:
    student, teacher = draw(2, 1, 7), draw(3, 1, 7)
    for token in range(7):
        ids = candidates(student, k, torch.tensor([token]))
        found = compare(student, teacher, ids, unbiased=True)
        expected = reference(student[0].tolist(), teacher[0].tolist(), set(ids[0, :-1].tolist()), token)
        assert float(found.value_M) == pytest.approx(expected, rel=1e-10)


# --- exact in expectation: every sampled token, weighted with its probability ----------------------------------------


def expectation(student: Tensor, form: object) -> tuple[Tensor, Tensor]:
    """Mean value and mean gradient over all tokens that one row may have sampled."""
    V = student.shape[-1]
    p = student.softmax(-1)[0]
    value, slope = torch.zeros(1, dtype=torch.float64), torch.zeros_like(student)
    for token in range(V):
        leaf = student.clone().requires_grad_()
        found = form(leaf, torch.tensor([token]))  # type: ignore[operator]
        value += p[token] * found.value_M
        slope += p[token] * gradient(leaf, found)
    return value, slope


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_unbiased_tail_is_exact_in_expectation_by_enumeration(k: int, seed: int) -> None:
    student, teacher = draw(10 + seed, 1, 12), draw(20 + seed, 1, 12)
    leaf = student.clone().requires_grad_()
    exact = divergence_rows(ReverseKL(), leaf, teacher, torch.zeros(1, dtype=torch.int64))
    config = ReverseKL(support=TopKSupport(k=k, tail="unbiased"))
    forms = {
        "candidates": lambda s, y: compare(s, teacher, candidates(s, k, y), unbiased=True),
        "in process": lambda s, y: divergence_rows(config, s, teacher, y),
        "policy gradient": lambda s, y: compare(s, teacher, y[:, None], unbiased=True),
    }
    for form in forms.values():
        value, slope = expectation(student, form)
        torch.testing.assert_close(value, exact.value_M, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(slope, gradient(leaf, exact), rtol=1e-10, atol=1e-14)
        exact = divergence_rows(ReverseKL(), leaf, teacher, torch.zeros(1, dtype=torch.int64))
    bucket, _ = expectation(student, lambda s, y: compare(s, teacher, candidates(s, k, y)))
    assert float(exact.value_M - bucket) > 1e-3  # the bucket alone is not exact


def test_a_support_the_teacher_shortened_stays_exact_in_expectation() -> None:
    student, teacher = draw(30, 1, 9), draw(31, 1, 9)
    lacking = int(student.topk(4).indices[0, 2])

    def form(leaf: Tensor, token: Tensor) -> Divergence:
        ids = candidates(leaf, 4, token)
        ids[:, :-1][ids[:, :-1] == lacking] = -1  # not in the teacher's answer
        return compare(leaf, teacher, ids, unbiased=True)

    value, slope = expectation(student, form)
    leaf = student.clone().requires_grad_()
    exact = divergence_rows(ReverseKL(), leaf, teacher, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(value, exact.value_M, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope, gradient(leaf, exact), rtol=1e-10, atol=1e-14)


def test_less_noise_than_the_policy_gradient() -> None:
    student, teacher = draw(40, 1, 50, scale=1.5), draw(41, 1, 50, scale=1.5)
    p = student.softmax(-1)[0]
    spread = []
    for k in (0, 8):
        gradients = []
        for token in range(50):
            leaf = student.clone().requires_grad_()
            ids = candidates(leaf, k, torch.tensor([token]))
            gradients.append(gradient(leaf, compare(leaf, teacher, ids, unbiased=True))[0])
        all_VV = torch.stack(gradients)
        spread.append(float((p[:, None] * (all_VV - p @ all_VV) ** 2).sum()))
    assert spread[1] < 0.6 * spread[0]


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 29), scale=st.floats(0.1, 6.0))
def test_bounds(seed: int, k: int, scale: float) -> None:
    student, teacher = draw(seed, 3, 30, scale=scale), draw(seed + 1, 3, 30, scale=scale)
    tokens = torch.zeros(3, dtype=torch.int64)
    full = divergence_rows(ReverseKL(), student, teacher, tokens).value_M
    fewer, more = (compare(student, teacher, candidates(student, n, tokens)).value_M for n in (k, k + 1))
    slack = 1e-6  # a tail below the floor
    assert (fewer >= 0).all()
    assert (fewer <= more + slack).all()
    assert (more <= full + slack).all()


def test_a_support_of_the_whole_vocabulary_is_exact() -> None:
    student, teacher, tokens = draw(50, 4, 9).requires_grad_(), draw(51, 4, 9), torch.arange(4)
    exact = divergence_rows(ReverseKL(), student, teacher, tokens)
    for unbiased in (False, True):
        found = compare(student, teacher, candidates(student, 9, tokens), unbiased=unbiased)
        torch.testing.assert_close(found.value_M, exact.value_M, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(found.surrogate_M.sum(), student)[0],
            torch.autograd.grad(exact.surrogate_M.sum(), student, retain_graph=True)[0],
            rtol=1e-10,
            atol=1e-12,
        )


def test_zero_where_the_models_agree() -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        logits = draw(60, 6, 300).to(dtype)
        for k in (0, 8, 299, 300):
            for unbiased in (False, True):
                leaf = logits.clone().requires_grad_()
                found = compare(leaf, logits, candidates(leaf, k, torch.arange(6)), unbiased=unbiased)
                assert float(found.value_M.abs().max()) <= bound
                assert float(gradient(leaf, found).abs().max()) <= bound


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_equals_the_top_k_form_in_process(k: int, unbiased: bool) -> None:
    student, teacher, tokens = draw(70, 16, 500).float(), draw(71, 16, 500).float(), torch.arange(16) * 31
    config = ReverseKL(support=TopKSupport(k=k, tail="unbiased" if unbiased else "bucket"))
    leaf = student.clone().requires_grad_()
    local = divergence_rows(config, leaf, teacher, tokens)
    remote = compare(leaf, teacher, candidates(leaf, k, tokens), unbiased=unbiased)
    torch.testing.assert_close(remote.value_M, local.value_M, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(leaf, remote), gradient(leaf, local), rtol=0, atol=1e-6)
    torch.testing.assert_close(remote.tail_M2, local.tail_M2, rtol=0, atol=1e-6)


def test_one_candidate_is_the_sampled_form() -> None:
    student, teacher, tokens = draw(80, 4, 30).requires_grad_(), draw(81, 4, 30), torch.tensor([3, 1, 4, 1])
    local = divergence_rows(ReverseKL(support=SampledSupport()), student, teacher, tokens)
    remote = compare(student, teacher, tokens[:, None], unbiased=True)
    torch.testing.assert_close(remote.value_M, local.value_M)
    torch.testing.assert_close(gradient(student, remote), gradient(student, local))


def test_gradcheck() -> None:
    student, teacher = draw(90, 3, 8).requires_grad_(), draw(91, 3, 8)
    ids = candidates(student, 3, torch.tensor([0, 5, 7]))
    assert torch.autograd.gradcheck(lambda s: compare(s, teacher, ids).surrogate_M, (student,))


def test_order_repeats_and_gaps_do_not_matter() -> None:
    student, teacher = draw(100, 1, 20), draw(101, 1, 20)
    plain, mixed = torch.tensor([[4, 7, 9, 2]]), torch.tensor([[9, -1, 4, 4, 7, 9, -1, 2]])
    for unbiased in (False, True):
        one, other = (compare(student, teacher, ids, unbiased=unbiased) for ids in (plain, mixed))
        torch.testing.assert_close(one.value_M, other.value_M)
        torch.testing.assert_close(one.tail_M2, other.tail_M2)
    assert distinct(mixed).tolist() == [[True, False, True, False, True, False, False, True]]


def test_a_tail_lost_to_rounding_is_floored_and_says_so() -> None:
    student = torch.tensor([[0.0, -1.0, -3.0, -4.0]]).requires_grad_()
    ids = torch.tensor([[0, 1, 0]])
    too_much = torch.tensor([[0.6, 0.4000003, 0.6]]).log()  # sums to more than 1
    found = candidate_divergence(student, ids, too_much)
    assert found.tail_M2 is not None
    assert float(found.tail_M2[0, 1]) == 0.0
    p = student.detach().double().softmax(-1)[0]
    tail = float(p[2] + p[3])
    expected = float((p[:2] * (p[:2].log() - too_much[0, :2].double())).sum()) + tail * math.log(tail / FLOOR)
    assert float(found.value_M) == pytest.approx(expected, rel=1e-5)
    assert bool(gradient(student, found).isfinite().all())


class _Remote:
    """A teacher of which only the candidates' log-probabilities are known."""

    def __init__(self, teacher: Tensor, ids: Tensor, *, unbiased: bool) -> None:
        self.ids, self.unbiased = ids, unbiased
        self.known = log_softmax(teacher, -1).gather(-1, ids)

    def logits(self, rows: slice | Tensor) -> Tensor:
        raise AssertionError("no [M, V] of this teacher exists")

    def compare(self, student_mV: Tensor, rows: slice, tokens_m: Tensor) -> Divergence:
        return candidate_divergence(student_mV, self.ids[rows], self.known[rows], unbiased=self.unbiased)


class _Local:
    def __init__(self, teacher: Tensor) -> None:
        self.teacher = teacher

    def logits(self, rows: slice | Tensor) -> Tensor:
        return self.teacher[rows]


@pytest.mark.parametrize("unbiased", [False, True])
def test_in_chunks_the_loss_and_its_gradient_are_those_in_process(unbiased: bool) -> None:
    shapes = ((110, 11, 6, 1.0), (111, 40, 6, 0.5), (112, 11, 40, 2.0))
    hidden, weight, teacher = (draw(seed, m, n, scale=scale).float() for seed, m, n, scale in shapes)
    tokens, weights = torch.arange(11), torch.rand(11, generator=torch.Generator().manual_seed(1))
    config = ReverseKL(support=TopKSupport(k=4, tail="unbiased" if unbiased else "bucket"))
    ids = candidates(hidden @ weight.T, 4, tokens)
    found = []
    for source in (_Local(teacher), _Remote(teacher, ids, unbiased=unbiased)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        head = Head(lambda x, w=w: x @ w.T, (w,), w.detach())
        result = weighted_divergence(config, h, head, source, tokens, weights, chunk=3)
        result.loss.backward()
        assert result.tail_M2 is not None
        found.append((result.value_M, result.tail_M2, h.grad, w.grad))
    for local, remote in zip(*found, strict=True):
        torch.testing.assert_close(remote, local, rtol=1e-5, atol=1e-6)


# --- refused where it would be biased ---------------------------------------------------------------------------------


BASE = {
    "student": {"path": "s"},
    "teacher": {"path": "t"},
    "prompts": {"source": "p.jsonl"},
    "rollout": {"temperature": 1.0, "top_p": 1.0},
    "divergence": {"type": "reverse_kl", "support": {"type": "top_k", "k": 8, "tail": "unbiased"}},
}


def test_the_unbiased_tail_is_accepted_for_plain_draws() -> None:
    assert loader.parse(BASE, []).divergence.support == TopKSupport(k=8, tail="unbiased")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.temperature=0.7", "temperature 0.7"),
        ("rollout.top_p=0.95", "top_p 0.95"),
        ("rollout.top_k=20", "top_k 20"),
        ("divergence.type=forward_kl", "reverse_kl only"),
        ("divergence.type=jsd", "reverse_kl only"),
        ("divergence.alignment=strict", "one vocabulary"),
        ("selection.type=top", "biased"),
    ],
)
def test_the_unbiased_tail_is_refused_elsewhere(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"tail bucket") as caught:
        loader.parse(BASE, [override])
    assert words in str(caught.value)


def test_the_plain_function_knows_nothing_of_the_tail() -> None:
    student, teacher = draw(120, 3, 9), draw(121, 3, 9)
    assert float(reverse_kl(student, teacher, top_k=3)) <= float(reverse_kl(student, teacher))
