"""Trajectories that must be equal: however the work is cut, ordered or padded, the gradient is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headstart.losses.chunked import read_divergence
from headstart.ranks.runtime import Runtime
from headstart.records import Rollout, Sampling
from headstart.train.loop import run
from headstart.train.metrics import Clock
from headstart.train.parts import Parts
from headstart.train.step import backward, sample_rollouts, train_step
from support import make_config, make_parts


def gradient(parts: Parts, rollouts: list[Rollout]) -> torch.Tensor:
    """The flat gradient of the global loss over `rollouts`."""
    parts.optimizer.zero_grad(set_to_none=True)
    backward(parts, rollouts, 0, Clock(parts.runtime))
    return torch.cat([p.grad.flatten().clone() for p in parts.student.trainable().values() if p.grad is not None])


def with_config(parts: Parts, **training: object) -> Parts:
    config = parts.config.model_copy(update={"training": parts.config.training.model_copy(update=training)})
    return replace(parts, config=config)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return make_parts(tmp_path / "run", make_config(tmp_path))


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert a.abs().max() > 1e-3  # a zero gradient would make every comparison true
    torch.testing.assert_close(a, b, rtol=1e-4, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("denominator", ["trajectory", "token", "sum"])
@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_micro_batch_never_changes_the_gradient(parts: Parts, denominator: str, micro_batch: int) -> None:
    rollouts = sample_rollouts(parts, 0, 6)
    assert len({len(r.completion_ids) for r in rollouts}) > 1, "the rollouts must differ in length to test anything"
    whole = gradient(with_config(parts, denominator=denominator), rollouts)
    split = gradient(with_config(parts, denominator=denominator, micro_batch=micro_batch), rollouts)
    assert_close(split, whole)


def test_a_memory_budget_never_changes_the_trajectory(tmp_path: Path) -> None:
    """Four steps with micro-batches of one to three rollouts, and with all 18 at once."""
    found = []
    for name, gib in (("whole", "auto"), ("tiny", 0.0001)):
        overrides = (f"training.memory_budget_gib={gib}", "rollout.samples_per_prompt=3")
        parts = make_parts(tmp_path / name, make_config(tmp_path, *overrides))
        start = torch.cat([p.detach().flatten() for p in parts.student.trainable().values()])
        steps = [train_step(parts, step, 0) for step in range(4)]
        assert (max(len(readings) for _, readings in steps) > 6) == (name == "tiny")
        metrics = [[report.metrics[key] for key in ("loss", "grad_norm", "tokens")] for report, _ in steps]
        found.append((metrics, torch.cat([p.detach().flatten() for p in parts.student.trainable().values()])))
    (whole, weights), (tiny, tiny_weights) = found
    assert tiny == [pytest.approx(step, rel=1e-4) for step in whole]
    # AdamW moves a weight by about the learning rate however small its gradient is, so one of them proves nothing.
    assert (tiny_weights - weights).norm() <= 1e-3 * (weights - start).norm()


def test_denominators_differ(parts: Parts) -> None:
    rollouts = sample_rollouts(parts, 0, 6)
    kinds = [gradient(with_config(parts, denominator=d), rollouts) for d in ("trajectory", "token", "sum")]
    assert all((kinds[i] - kinds[j]).abs().max() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_logit_chunk_never_changes_the_gradient(parts: Parts) -> None:
    rollouts = sample_rollouts(parts, 0, 6)
    assert_close(gradient(with_config(parts, logit_chunk=4), rollouts), gradient(parts, rollouts))


def test_order_inside_a_batch(parts: Parts) -> None:
    rollouts = sample_rollouts(parts, 0, 6)
    assert_close(gradient(parts, rollouts[::-1]), gradient(parts, rollouts))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3"])
def test_padding(tmp_path: Path, architecture: str) -> None:
    """A rollout alone gives the divergences it gives beside longer ones, in both models' views."""
    parts = make_parts(tmp_path / "run", make_config(tmp_path, architecture=architecture))  # type: ignore[arg-type]
    rollouts = sample_rollouts(parts, 0, 12)
    together = divergences(parts, rollouts)
    alone = [divergences(parts, [r])[0] for r in rollouts]
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def divergences(parts: Parts, rollouts: list[Rollout]) -> list[torch.Tensor]:
    batch = parts.student.batch(rollouts, "student")
    value_M, _ = read_divergence(
        parts.config.divergence,
        parts.student.completion_hidden(batch),
        parts.student.trained_head(),
        parts.teacher.score(rollouts),
        batch.tokens_M,
        chunk=64,
    )
    return list(value_M.split([len(r.completion_ids) for r in rollouts]))


def test_rollouts_do_not_depend_on_batch_composition(parts: Parts) -> None:
    def sample(prompts: list, **kwargs: object) -> dict[tuple[int, int], tuple[int, ...]]:
        rollouts = parts.engine.generate(
            prompts, samples=2, max_tokens=12, sampling=Sampling(0.9, 0.9, 0), key=(0, "rollout", 3), **kwargs
        )
        return {(r.prompt.index, r.sample_index): r.completion_ids for r in rollouts}

    prompts = list(parts.prompts[:9])
    together = sample(prompts)
    assert len(set(together.values())) > 9, "samples must differ from each other"
    assert sample(prompts[::-1]) == together
    assert sample(prompts, batch_size=4) == together
    assert {k: v for p in prompts for k, v in sample([p]).items()} == together


def test_a_shorter_horizon_cuts_the_same_rollouts(parts: Parts) -> None:
    long, short = sample_rollouts(parts, 0, 24), sample_rollouts(parts, 0, 6)
    assert [r.completion_ids[:6] for r in long] == [r.completion_ids for r in short]
    for a, b in zip(divergences(parts, long), divergences(parts, short), strict=True):
        torch.testing.assert_close(a[: len(b)], b, rtol=1e-5, atol=1e-5)


def test_a_horizon_nobody_reaches_equals_full_rollouts(tmp_path: Path) -> None:
    weights = []
    for name, horizon in (("fixed", "{type: fixed, tokens: 400}"), ("full", "{type: full, max_tokens: 400}")):
        config = make_config(tmp_path, f"horizon={horizon}", "training.steps=2")
        parts = make_parts(tmp_path / name, config)
        run(parts)
        weights.append(torch.cat([p.detach().flatten() for p in parts.student.trainable().values()]))
    assert torch.equal(weights[0], weights[1])


def test_the_stop_position_is_supervised_and_the_horizon_is_no_error(parts: Parts) -> None:
    rollouts = sample_rollouts(parts, 0, 6)
    stopped = [r for r in rollouts if r.stopped]
    reached = [r for r in rollouts if not r.stopped]
    assert stopped, "the random student must stop sometimes"
    assert reached, "and sometimes not"
    assert all(r.completion_ids[-1] in parts.vocabulary.stop_ids for r in stopped)
    assert all(len(r.completion_ids) == 6 for r in reached)
    assert not any(set(r.completion_ids) & set(parts.vocabulary.stop_ids) for r in reached), "no stop token is forced"
    # Without its last position (the stop) a stopped rollout gives another gradient: the stop is in the loss.
    one = next(r for r in stopped if len(r.completion_ids) > 1)
    assert (
        gradient(parts, [one]) - gradient(parts, [replace(one, completion_ids=one.completion_ids[:-1])])
    ).norm() > 1e-3
    assert gradient(parts, reached).norm() > 1e-3
    report, _ = train_step(parts, 0, 0)
    assert report.metrics["share_reached_horizon"] == pytest.approx(len(reached) / len(rollouts))


def test_student_equal_to_teacher_has_zero_loss(tmp_path: Path) -> None:
    config = make_config(tmp_path, f"teacher.path={tmp_path / 'student'}")
    parts = make_parts(tmp_path / "run", config)
    report, _ = train_step(parts, 0, 0)
    assert report.metrics["loss"] == pytest.approx(0.0, abs=1e-6)
    assert report.metrics["grad_norm"] == pytest.approx(0.0, abs=1e-4)


def test_padded_heads_train_and_equal_the_cut_heads(tmp_path: Path) -> None:
    """A teacher whose head is padded to 80 rows gives the loss of the same teacher cut to the 46 real ids."""
    from headstart.testing import random_model, word_tokenizer, write_checkpoint

    config = make_config(tmp_path)
    tokenizer = word_tokenizer()
    padded = random_model("llama", 80, hidden=48, seed=2)
    write_checkpoint(tmp_path / "padded", padded, tokenizer)
    padded.resize_token_embeddings(len(tokenizer))
    write_checkpoint(tmp_path / "cut", padded, tokenizer)
    losses = []
    for name in ("padded", "cut"):
        teacher = config.teacher.model_copy(update={"path": str(tmp_path / name)})
        parts = make_parts(tmp_path / f"run-{name}", config.model_copy(update={"teacher": teacher}))
        assert parts.vocabulary.size == len(tokenizer)
        losses.append([train_step(parts, step, 0)[0].metrics["loss"] for step in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_different_stop_ids_are_one_class(tmp_path: Path) -> None:
    """A teacher that stops with another token agrees about stopping once both ids are one class."""
    config = make_config(tmp_path, eos_id=7)
    parts = make_parts(tmp_path / "run", config)
    assert set(parts.vocabulary.stop_ids) >= {1, 7}
    assert set(parts.vocabulary.merge_ids) == set(parts.vocabulary.stop_ids)
    same = make_parts(tmp_path / "same", config.model_copy(update={"teacher": config.student}))
    assert same.vocabulary.merge_ids == ()
    rollouts = parts.engine.generate(
        parts.prompts, samples=4, max_tokens=20, sampling=Sampling(1.0, 1.0, 0), key=(0, "rollout", 0)
    )
    assert {r.completion_ids[-1] for r in rollouts if r.stopped} == {1, 7}


def test_a_rank_without_tokens_contributes_a_zero_gradient(parts: Parts) -> None:
    empty = replace(parts, runtime=Runtime(5, 1, torch.device("cpu")))
    parts.optimizer.zero_grad(set_to_none=True)
    assert backward(empty, [], 0, Clock(empty.runtime)) == []


@pytest.mark.parametrize("tuning", ["type: full", "type: lora, r: 4, dropout: 0.0"])
def test_gradient_checkpointing_never_changes_the_gradient(tmp_path: Path, tuning: str) -> None:
    gradients = []
    for flag in ("false", "true"):
        config = make_config(tmp_path, f"tuning={{{tuning}, gradient_checkpointing: {flag}}}")
        parts = make_parts(tmp_path / flag, config)
        for name, parameter in parts.student.trainable().items():
            if "lora_B" in name:  # zero at the start, which would leave lora_A without a gradient
                torch.nn.init.constant_(parameter, 0.01)
        parts.student.model.train()
        assert parts.student.backbone.is_gradient_checkpointing == (flag == "true")
        gradients.append(gradient(parts, sample_rollouts(parts, 0, 6)))
    assert_close(gradients[1], gradients[0])


def test_a_prompt_that_comes_twice_in_a_step_gives_two_rollouts(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "run", make_config(tmp_path, "prompts.limit=2", "training.prompts_per_step=6"))
    rollouts = sample_rollouts(parts, 0, 6)
    assert len({r.prompt.problem_id for r in rollouts}) == 2
    assert len({r.completion_ids for r in rollouts}) == 6
