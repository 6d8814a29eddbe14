"""Training with a teacher that has another tokenizer: what must not change, and what must be the same-tokenizer run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quick
from headstart.config.schema import Config
from headstart.diagnosis.positions import read_tokens
from headstart.distillation.run import distill
from headstart.errors import ConfigError
from headstart.losses.selection import EVERY_TOKEN
from headstart.records import Rollout
from headstart.testing import WORDS, random_model, word_tokenizer, write_checkpoint
from headstart.train.metrics import Clock
from headstart.train.parts import Parts
from headstart.train.step import backward, sample_rollouts, train_step
from support import make_config, make_parts

CROSS = ("student.path=tiny:student", "teacher.path=tiny:teacher-cross", "prompts.source=tiny", "horizon.tokens=24")
KINDS = ("coarse", "strict", "byte", "other", "chunk", "sorted")


def cross_config(folder: Path, *overrides: str) -> Config:
    return make_config(folder, *CROSS, *overrides)


def gradient(parts: Parts, rollouts: list[Rollout]) -> torch.Tensor:
    parts.optimizer.zero_grad(set_to_none=True)
    backward(parts, rollouts, 0, Clock(parts.runtime))
    return torch.cat([p.grad.flatten().clone() for p in parts.student.trainable().values() if p.grad is not None])


def losses(run: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{k: line[k] for k in ("loss", "grad_norm", "share_scored", "tokens")} for line in lines if "loss" in line]


def test_ids_in_another_order_give_the_same_trajectory_to_the_bit(tmp_path: Path) -> None:
    """The teacher under a tokenizer whose words have other ids, its embeddings and head permuted alike."""
    config = make_config(tmp_path)
    own = random_model("llama", 46, hidden=48, seed=2)
    other = random_model("llama", 46, hidden=48, seed=2)
    mine, theirs = word_tokenizer().get_vocab(), word_tokenizer(WORDS[::-1]).get_vocab()
    order = [i for _, i in sorted((theirs[word], i) for word, i in mine.items())]
    assert order != list(range(46))
    other.get_input_embeddings().weight.data.copy_(own.get_input_embeddings().weight.data[order])
    write_checkpoint(tmp_path / "permuted", other, word_tokenizer(WORDS[::-1]))
    found = []
    for name, path in (("plain", tmp_path / "teacher"), ("permuted", tmp_path / "permuted")):
        parts = make_parts(tmp_path / f"run-{name}", make_config(tmp_path, f"teacher.path={path}"))
        reports = [train_step(parts, step, 0)[0].metrics for step in range(3)]
        weights = torch.cat([p.detach().flatten() for p in parts.student.trainable().values()])
        found.append(([(m["loss"], m["grad_norm"], m["teacher_entropy"]) for m in reports], weights))
    assert config.divergence.alignment is None
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_never_change_the_gradient(tmp_path: Path, kind: str) -> None:
    parts = make_parts(tmp_path / "run", cross_config(tmp_path, f"divergence.alignment={kind}"))
    rollouts = sample_rollouts(parts, 0, 24)
    whole = gradient(parts, rollouts)
    assert whole.abs().max() > 1e-4
    for size in (1, 4):
        training = parts.config.training.model_copy(update={"micro_batch": size})
        split = gradient(replace(parts, config=parts.config.model_copy(update={"training": training})), rollouts)
        tolerance = 1e-4 if kind == "chunk" else 2e-6  # the odds of a span that is nearly sure magnify rounding
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=tolerance * float(whole.abs().max()))


@pytest.mark.parametrize("kind", ["coarse", "byte"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_every_divergence_and_lora_train(tmp_path: Path, divergence: str, kind: str) -> None:
    overrides = (f"divergence={{type: {divergence}, alignment: {kind}}}", "tuning={type: lora, r: 4, dropout: 0.0}")
    parts = make_parts(tmp_path / "run", cross_config(tmp_path, *overrides))
    metrics = train_step(parts, 0, 0)[0].metrics
    assert metrics["divergence"] > 0
    assert 0.3 < metrics["share_scored"] < 1
    assert metrics["rollouts_dropped"] == 0
    assert metrics["tokens_trained"] == round(metrics["share_scored"] * metrics["tokens"])


@pytest.mark.parametrize(
    "selection", ["{type: random, tokens: 5}", "{type: top, tokens: 5}", "{type: format, classes: [number]}"]
)
def test_tokens_are_selected_among_those_that_are_scored(tmp_path: Path, selection: str) -> None:
    parts = make_parts(tmp_path / "run", cross_config(tmp_path, f"selection={selection}", "horizon.tokens=60"))
    report, readings = train_step(parts, 0, 0)
    chosen = sum(parts.selector.counts([r for micro in readings for r in micro.rollouts]))
    assert report.metrics["tokens_trained"] == chosen
    assert 0 < chosen < report.metrics["share_scored"] * report.metrics["tokens"]
    assert parts.selector is not EVERY_TOKEN


@pytest.mark.parametrize(
    "horizon",
    [
        "{type: scheduled, tokens: 8, max_tokens: 40}",
        "{type: mixed, tokens: 8, max_tokens: 40, weighted: true}",
        "{type: custom, path: 'examples.horizons.loss_side:SoftWeights', arguments: {max_tokens: 40}}",
        "{type: overlap, tokens: 16, min_tokens: 4, max_tokens: 40}",
        "{type: damage, tokens: 16, grid: [8, 16], min_tokens: 4, max_tokens: 40}",
    ],
)
def test_every_kind_of_horizon_runs(tmp_path: Path, horizon: str) -> None:
    overrides = [f"horizon={horizon}", "probes={every: 2, prompts: 4}", "training.steps=2"]
    overrides += ["training.denominator=sum"] if "weighted" in horizon else []
    config = make_config(tmp_path, *CROSS[:3], *overrides)
    result = distill(config, out=tmp_path / "run")
    assert result.progress.step == 2


def test_a_resumed_run_is_the_straight_one(tmp_path: Path) -> None:
    config = cross_config(tmp_path, "checkpoint.keep_last=9")
    distill(config, out=tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/model")
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"resumed/checkpoints/step_{step:06d}")
    distill(resume=tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    one, two = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("straight", "resumed"))
    assert one == two


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    config = cross_config(tmp_path)
    distill(config, out=tmp_path / "one")
    done = quick.ranks(2, "distill", tmp_path / "one/config.yaml", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_nothing_to_score_trains_nothing_with_a_warning(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "run", cross_config(tmp_path))
    rollouts = [replace(r, completion_ids=(2, 2, 2)) for r in sample_rollouts(parts, 0, 3)]  # <unk> has no bytes
    aligned = parts.teacher.align(rollouts)
    assert [list(r.rows) for r in aligned] == [[]] * len(rollouts)
    with pytest.warns(UserWarning, match="so this step trains nothing: headstart preflight"):
        assert gradient(parts, rollouts).abs().max() == 0


def test_controls_have_no_divergence_to_read(tmp_path: Path) -> None:
    from headstart.assemble.pair import open_pair

    pair = open_pair(cross_config(tmp_path, "divergence.alignment=chunk"))
    with pytest.raises(ConfigError, match="chunk is a control for training"):
        read_tokens(pair, [])
