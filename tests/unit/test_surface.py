"""The public surface, name by name, and what each of its promises costs in lines."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

import headstart as hs
from headstart.testing import random_model, word_tokenizer

NAMES = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "Evaluator",
    "HeadstartError",
    "HorizonPolicy",
    "Interrupted",
    "LogitSource",
    "MemoryBudgetError",
    "ModelError",
    "NonFiniteError",
    "OnProgress",
    "Pair",
    "Problem",
    "Prompt",
    "Rollout",
    "RolloutEngine",
    "RunFolderError",
    "Sampling",
    "SandboxError",
    "ServerError",
    "Task",
    "Teacher",
    "TemplateError",
    "TokenFactors",
    "Tracker",
    "Verdict",
    "VocabularyError",
    "__version__",
    "chunked_divergence",
    "compare",
    "diagnose",
    "distill",
    "evaluate",
    "explain",
    "forward_kl",
    "jsd",
    "load_config",
    "pilot",
    "preflight",
    "report",
    "reverse_kl",
]


def test_the_names_are_these() -> None:
    assert hs.__all__ == NAMES
    assert sorted(dir(hs)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_is_no_module(name: str) -> None:
    value = getattr(hs, name)
    assert not isinstance(value, type(sys))
    assert name == "__version__" or value.__doc__


def test_a_verb_is_a_verb_after_every_room_was_imported() -> None:
    code = (
        "import headstart, headstart.diagnosis.run, headstart.checks.run, headstart.study.pilot, "
        "headstart.reports.contents, headstart.explanation.run, headstart.evaluation.run\n"
        "names = 'distill diagnose preflight pilot evaluate explain compare report'.split()\n"
        "assert all(callable(getattr(headstart, name)) for name in names)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_loads_no_torch() -> None:
    code = "import sys, headstart; headstart.ConfigError; assert not {'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        hs.distil  # noqa: B018


# --- divergences on tensors ------------------------------------------------------------------------------------------


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7), (2, 3, 4, 7)])
def test_reverse_kl_of_any_shape(shape: tuple[int, ...]) -> None:
    student, teacher = logits(*shape), logits(*shape).flip(-1)
    each = kl_div(log_softmax(teacher, -1), log_softmax(student, -1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(hs.reverse_kl(student, teacher, reduction="none"), each)
    torch.testing.assert_close(hs.reverse_kl(student, teacher), each.mean())
    forward = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(hs.forward_kl(student, teacher, reduction="sum"), forward.sum())


def test_only_masked_positions_count_and_only_the_student_gets_a_gradient() -> None:
    student, teacher = logits(2, 5, 7).requires_grad_(), logits(2, 5, 7).flip(-1).requires_grad_()
    labels = torch.tensor([[-100, 3, 3, -100, 1], [-100, -100, 2, 2, 2]])
    mask = labels != -100
    hs.reverse_kl(student, teacher, mask=mask).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert (student.grad.abs().sum(-1) > 0).equal(mask)
    by_hand = student.detach().requires_grad_()
    p, q = log_softmax(by_hand, -1), log_softmax(teacher.detach(), -1)
    ((p.exp() * (p - q)).sum(-1)[mask].mean()).backward()
    torch.testing.assert_close(student.grad, by_hand.grad)
    assert float(hs.reverse_kl(student, teacher, mask=torch.zeros_like(mask))) == 0.0


def test_jsd_is_symmetric_at_one_half_and_bounded_and_top_k_is_a_lower_bound() -> None:
    student, teacher = 3 * logits(6, 9), 3 * logits(6, 9).flip(-1)
    torch.testing.assert_close(hs.jsd(student, teacher), hs.jsd(teacher, student))
    assert 0 < float(hs.jsd(student, teacher)) < 0.6932
    some, all_ = hs.reverse_kl(student, teacher, top_k=3), hs.reverse_kl(student, teacher)
    assert float(some) <= float(all_)
    torch.testing.assert_close(hs.reverse_kl(student, teacher, top_k=8), all_)


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_the_chunked_divergence_is_the_whole_one_with_its_gradients(chunk: int | None) -> None:
    h, teacher_h = logits(2, 5, 4).float(), logits(10, 6).view(2, 5, 6).float()
    head, teacher_head = logits(7, 4).float(), logits(7, 6).float()
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for whole in (False, True):
        a, b = h.clone().requires_grad_(), head.clone().requires_grad_()
        if whole:
            loss = (weights * hs.reverse_kl(a @ b.T, teacher_h @ teacher_head.T, reduction="none")).sum()
        else:
            loss = hs.chunked_divergence(a, b, teacher_h, teacher_head, weights, chunk=chunk)
        loss.backward()
        found.append((loss.detach(), a.grad, b.grad))
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused_with_the_remedy() -> None:
    with pytest.raises(hs.VocabularyError, match=r"cut both to the ids.*len\(tokenizer\)"):
        hs.reverse_kl(logits(3, 7), logits(3, 8))
    with pytest.raises(hs.VocabularyError, match="the mask is"):
        hs.reverse_kl(logits(3, 7), logits(3, 7), mask=torch.ones(7))
    with pytest.raises(hs.VocabularyError, match="head has 7 rows"):
        hs.chunked_divergence(logits(3, 4), logits(7, 4), logits(3, 4), logits(8, 4))
    with pytest.raises(hs.VocabularyError, match="3 student positions and 2 teacher positions"):
        hs.chunked_divergence(logits(3, 4), logits(7, 4), logits(2, 4), logits(7, 4))


# --- models in memory ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> hs.Pair:
    tokenizer = word_tokenizer()
    student, teacher = (random_model("llama", len(tokenizer), seed=seed) for seed in (1, 2))
    return hs.Pair(student, teacher, tokenizer)


def test_a_pair_in_memory_samples_from_strings(pair: hs.Pair) -> None:
    rollouts = pair.sample(["w1 w2 w3", "w4"], max_tokens=5, samples=2)
    assert len(rollouts) == 4
    assert all(1 <= len(r.completion_ids) <= 5 for r in rollouts)
    assert isinstance(pair.text(rollouts[0]), str)
    again = pair.sample(["w1 w2 w3", "w4"], max_tokens=5, samples=2)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in rollouts]
    assert pair.sample(["w1 w2 w3"], max_tokens=5, who="teacher")[0].completion_ids


def test_a_diagnosis_of_models_in_memory(pair: hs.Pair) -> None:
    problems = [hs.Problem(id=str(i), text=f"w{i} w{i + 1}") for i in range(6)]
    pair.config = hs.Config.model_validate(
        {
            **pair.config.model_dump(exclude={"prompts", "diagnosis"}),
            "prompts": {"source": "in memory", "chat": False},
            "diagnosis": {"grid": [1, 2], "max_tokens": 6, "problems": 6},
        }
    )
    advice = hs.diagnose(pair, problems, grade=lambda problem, response: "w1" in response)
    assert advice.tokens > 0
    assert str(advice) == advice.recommendation.sentence
    assert advice.to_json()["decay"]["prompts"] == 6
    with pytest.raises(hs.DataError, match="list of prompts is empty"):
        hs.diagnose(pair, [])
