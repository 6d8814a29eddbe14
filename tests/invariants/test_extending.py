"""A finished run that is extended ends bit for bit like one that was planned that long, killed or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headstart.config import loader
from headstart.distillation import extending
from headstart.distillation.run import distill
from headstart.errors import CheckpointError, ConfigError, RunFolderError
from headstart.reports.run import read_run
from headstart.train import loop
from support import make_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`short` has 3 steps, `long` has 5 with a restart after the third."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "task.jsonl").write_text('{"prompt": "w1", "answer": "w1"}\n')
    task = f"evaluation={{task: {{type: jsonl, path: {folder / 'task.jsonl'}}}, samples: 1, max_tokens: 4}}"
    tuning = "tuning={type: lora, r: 4, alpha: 8, dropout: 0.1, targets: [q_proj]}"
    common = (task, tuning, "checkpoint.keep_last=9", "training.prompts_per_step=3", "schedule.warmup=0.5")
    distill(make_config(folder, *common, "training.steps=3"), out=folder / "short")
    distill(make_config(folder, *common, "training.steps=5", "schedule.restarts=[3]"), out=folder / "long")
    return folder


@pytest.fixture
def short(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "short", tmp_path / "run"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def timeless(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


def test_an_extended_run_equals_one_planned_so_also_when_it_is_killed(
    runs: Path, short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = loop.train_step

    def killed(parts: Any, step: int, tokens: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return train_step(parts, step, tokens)

    monkeypatch.setattr(loop, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(resume=short, overrides=["training.steps=+2"])
    assert "steps 4 to 5 are a leg of their own: warm-up over 1 of them to 0.001 again, then cosine to zero" in (
        " ".join(capsys.readouterr().out.split())
    )
    assert not (short / "model").exists()
    assert same(short / "model-step-3", runs / "short" / "model")
    monkeypatch.setattr(loop, "train_step", train_step)

    result = distill(resume=short)
    assert result.progress.step == 5
    assert same(short / "model", runs / "long" / "model")
    assert timeless(short) == timeless(runs / "long")
    assert loader.load(short / "config.yaml").legs == (3, 5)
    assert json.loads((short / "inputs.json").read_text())["changes"][0]["changed"]["training.steps"] == [3, 5]
    read = read_run(short)
    assert ([point.step for point in read.points], read.problems) == ([0, 3, 5], [])


def test_a_kill_while_the_folder_is_rewritten_loses_nothing(
    runs: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extending, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(resume=short, overrides=["training.steps=+2"])
    distill(resume=short)
    assert same(short / "model", runs / "short" / "model")
    distill(resume=short, overrides=["training.steps=5"])
    assert same(short / "model", runs / "long" / "model")


@pytest.mark.parametrize(
    ("overrides", "unfinished", "error", "words"),
    [
        (["training.steps=2"], False, ConfigError, "is of 3 steps and can only be extended"),
        (["training.steps=+2"], True, ConfigError, "still on its way to step 3"),
        (["output.dtype=bfloat16"], False, ConfigError, "complete, so output.dtype=bfloat16 would change nothing"),
        (["training.steps=+2", "optimizer.lr=0.5"], False, RunFolderError, "optimizer.lr: 0.001 -> 0.5"),
        (["training.steps=+2", "horizon.token=5"], False, ConfigError, "horizon.token"),
    ],
)
def test_what_does_not_extend_a_run_is_refused_and_changes_nothing(
    short: Path, overrides: Sequence[str], unfinished: bool, error: type[Exception], words: str
) -> None:
    if unfinished:
        shutil.rmtree(short / "model")
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}
    with pytest.raises(error) as raised:
        distill(resume=short, overrides=overrides)
    assert words in str(raised.value)
    assert {path: path.read_bytes() for path in short.rglob("*") if path.is_file()} == before


def test_an_extension_needs_a_checkpoint_and_overrides_a_run(short: Path, tmp_path: Path) -> None:
    shutil.rmtree(short / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint to extend the run from"):
        distill(resume=short, overrides=["training.steps=+2"])
    with pytest.raises(ConfigError, match="go with resume"):
        distill(make_config(tmp_path), overrides=["training.steps=9"])
    with pytest.raises(ConfigError, match="must rise and lie below"):
        make_config(tmp_path, "schedule.restarts=[2, 4]")
