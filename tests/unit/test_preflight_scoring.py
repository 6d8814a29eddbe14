from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.assemble.pair import Pair
from headstart.checks.scoring import (
    GAPS,
    determinism,
    engine_agreement,
    sampling_logprobs,
    seen_by_teacher,
    self_test,
)
from headstart.models.causal import CausalModel
from headstart.records import Rollout
from headstart.testing import CHAT, Architecture
from preflight_pairs import Side, loaded, speak, write_sides
from support import make_config

OTHER = CHAT.replace("<assistant>", "w1 w2 w3 <assistant>")


@pytest.fixture
def spoken(tmp_path: Path) -> tuple[Pair, list[Rollout]]:
    pair, prompts = loaded(write_sides(tmp_path, Side(), Side(template=OTHER, seed=2)))
    return pair, speak(pair, prompts)


def add_noise(model: CausalModel, scale: float, when: Any = lambda named: True) -> None:
    """A checkpoint whose own code is random."""

    def noisy(module: Any, positional: Any, named: dict[str, Any], output: Any) -> Any:
        if when(named):
            output.last_hidden_state = output.last_hidden_state + scale * torch.randn(output.last_hidden_state.shape)
        return output

    model.backbone.register_forward_hook(noisy, with_kwargs=True)


def by_hand(model: Any, rollouts: list[Rollout], vocabulary: int) -> list[float]:
    """Log-probabilities from one plain forward pass of the whole model for each rollout."""
    found = []
    for r in rollouts:
        with torch.no_grad():
            logits = model(torch.tensor([[*r.prompt.token_ids, *r.completion_ids]])).logits[0, :, :vocabulary]
        rows = logits[len(r.prompt.token_ids) - 1 : -1].double().log_softmax(-1)
        found += [float(rows[place, token]) for place, token in enumerate(r.completion_ids)]
    return found


ARCHITECTURES: tuple[Architecture, ...] = ("llama", "gemma2", "gemma3", "phi")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_paths_give_the_models_own_logprobs(tmp_path: Path, architecture: Architecture) -> None:
    """Rows of different length, so that some end while others go on."""
    pair, prompts = loaded(make_config(tmp_path, architecture=architecture))
    rollouts = [*speak(pair, prompts, 20, 4), *speak(pair, prompts, 3, 2)]
    assert len({len(r.completion_ids) for r in rollouts}) > 1
    expected = torch.tensor(by_hand(pair.student.model, rollouts, pair.vocabulary.size))
    torch.testing.assert_close(pair.student.logprobs(rollouts), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(sampling_logprobs(pair.student, rollouts), expected, atol=1e-4, rtol=0)


def test_a_sound_pair_is_ok(spoken: tuple[Pair, list[Rollout]]) -> None:
    pair, rollouts = spoken
    assert self_test(pair, rollouts).severity == "ok"
    assert self_test(pair, rollouts).figures["largest_nats"] == 0
    assert determinism(pair, rollouts).severity == "ok"
    assert engine_agreement(pair, rollouts).severity == "ok"


def test_the_teacher_is_read_in_its_own_view(spoken: tuple[Pair, list[Rollout]]) -> None:
    pair, rollouts = spoken
    (changed,) = seen_by_teacher(pair, rollouts[:1])
    assert changed.prompt.token_ids == rollouts[0].prompt.teacher_token_ids != rollouts[0].prompt.token_ids


def test_a_random_teacher_blocks_and_is_not_deterministic(spoken: tuple[Pair, list[Rollout]]) -> None:
    pair, rollouts = spoken
    add_noise(pair.teacher, 0.3)
    finding = self_test(pair, rollouts)
    assert finding.severity == "blocking"
    assert finding.figures["largest_nats"] > 1e-3
    finding = determinism(pair, rollouts)
    assert finding.severity == "warning"
    assert finding.figures["repeated_largest"] > GAPS[torch.float32][0]
    assert "float32" in finding.message


def test_a_teacher_that_sees_its_batch_is_not_deterministic(spoken: tuple[Pair, list[Rollout]]) -> None:
    """The same rows alone and in a batch: only the comparison with a batch can tell."""
    pair, rollouts = spoken

    def look_around(module: Any, positional: Any, named: dict[str, Any], output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * (1 + 0.01 * named["input_ids"].numel())
        return output

    pair.teacher.backbone.register_forward_hook(look_around, with_kwargs=True)
    finding = determinism(pair, rollouts)
    assert finding.severity == "warning"
    assert finding.figures["repeated_largest"] == 0
    assert finding.figures["batched_largest"] > GAPS[torch.float32][0]


def test_an_engine_that_scores_otherwise_warns_with_k3(spoken: tuple[Pair, list[Rollout]]) -> None:
    """Only the sampling path (with a cache) is disturbed."""
    pair, rollouts = spoken
    torch.manual_seed(0)
    add_noise(pair.student, 0.5, when=lambda named: named.get("use_cache"))
    finding = engine_agreement(pair, rollouts)
    assert finding.severity == "warning"
    assert finding.figures["mean"] > GAPS[torch.float32][1]
    assert finding.figures["largest"] >= finding.figures["mean"]
    assert finding.figures["k3"] > 0
    assert finding.figures["dtype"] == "float32"


def test_k3_is_the_unbiased_estimate(spoken: tuple[Pair, list[Rollout]], monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart.checks import scoring

    pair, rollouts = spoken
    engine, trainer = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.9])
    monkeypatch.setattr(scoring, "sampling_logprobs", lambda *_: engine)
    monkeypatch.setattr(type(pair.student), "logprobs", lambda *_: trainer)
    figures = engine_agreement(pair, rollouts).figures
    d = [0.5, -0.1]  # engine - trainer
    assert figures["k3"] == pytest.approx(sum(2.718281828459045**-x - 1 + x for x in d) / 2, rel=1e-5)
    assert figures["mean"] == pytest.approx(0.3, rel=1e-5)
    assert figures["largest"] == pytest.approx(0.5, rel=1e-5)


def test_half_precision_is_given_its_rounding(tmp_path: Path) -> None:
    config = write_sides(tmp_path, Side(), Side(seed=2), "student.dtype=bfloat16", "teacher.dtype=bfloat16")
    pair, prompts = loaded(config)
    rollouts = speak(pair, prompts)
    for finding in (engine_agreement(pair, rollouts), determinism(pair, rollouts)):
        assert finding.figures["dtype"] == "bfloat16"
        assert finding.severity == "ok", finding.message
