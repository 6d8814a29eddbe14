"""Models and prompts that are in memory: every verb, and the same numbers as from folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import headstart as hs
from headstart.config.loader import load, parse
from headstart.config.schema import ModelConfig
from headstart.explanation.answers import open_speakers
from headstart.models.load import load_model, load_tokenizer

PROMPTS = {"source": "tiny", "limit": 8}
SECTIONS: dict[str, Any] = {
    "training": {"steps": 3, "prompts_per_step": 4},
    "horizon": {"tokens": 8},
    "checkpoint": {"every": 1, "keep_last": 3},
}
EVALUATION = {"task": {"type": "tiny"}, "limit": 3, "samples": 1, "max_tokens": 6}


def student() -> Any:
    return load_model(ModelConfig(path="tiny:student"), torch.device("cpu"))


def tiny_pair(**settings: Any) -> hs.Pair:
    teacher = load_model(ModelConfig(path="tiny:teacher"), torch.device("cpu"))
    return hs.Pair(student(), teacher, load_tokenizer(ModelConfig(path="tiny:student")), config=settings)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "model" / "model.safetensors"))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_pair_in_memory_trains_as_from_folders_and_resumes(tmp_path: Path, tuning: str) -> None:
    asked: dict[str, Any] = {**SECTIONS, "tuning": {"type": tuning, "gradient_checkpointing": True}}
    folders = {"student": {"path": "tiny:student"}, "teacher": {"path": "tiny:teacher"}}
    hs.distill(parse({**folders, "prompts": PROMPTS, **asked}), out=tmp_path / "folders")
    pair = tiny_pair()
    model, start = pair.student.model, {name: w.clone() for name, w in pair.student.model.state_dict().items()}
    pair.teacher.model.requires_grad_(False)
    result = hs.distill(pair, PROMPTS, out=tmp_path / "memory", **asked)
    assert same(weights(tmp_path / "folders"), weights(tmp_path / "memory"))
    # Trained in place, plain again, and as trainable as before.
    assert result.model is model is pair.student.model
    written, now = weights(tmp_path / "memory"), model.state_dict()
    assert same(written, {name: now[name] for name in written}), "the head is tied, and not written"
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in pair.teacher.model.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert now.keys() == start.keys()
    assert len(pair.sample(["w1"], max_tokens=3)) == 1
    assert load(tmp_path / "memory" / "config.yaml").student.path.endswith("student, in memory")
    assert [speaker.name for speaker in open_speakers(str(tmp_path / "memory"), (), teacher=False)[1]] == ["after"]

    for path in (tmp_path / "memory" / "model", tmp_path / "memory" / "checkpoints" / "step_000003"):
        shutil.rmtree(path)
    with pytest.raises(hs.ModelError, match="was a model passed in from Python"):
        hs.distill(resume=tmp_path / "memory")
    trained = {name: w.clone() for name, w in model.state_dict().items()}
    if tuning == "lora":  # its checkpoint holds the adapter alone, so the weights below it must be those of the start
        with pytest.raises(hs.RunFolderError, match="student/weights in memory"):
            hs.distill(pair, resume=tmp_path / "memory")
        assert same(trained, model.state_dict()), "a refused run leaves the models as they were"
        pair = tiny_pair()
    again = hs.distill(pair, resume=tmp_path / "memory")
    assert again.progress.step == 3
    assert same(weights(tmp_path / "folders"), weights(tmp_path / "memory"))


def test_a_run_that_fails_leaves_the_student_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair()
    before = {name: w.clone() for name, w in pair.student.model.state_dict().items()}
    monkeypatch.setattr("headstart.train.loop.train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hs.distill(pair, PROMPTS, out=tmp_path / "run", **SECTIONS)
    assert same(before, pair.student.model.state_dict())
    assert all(p.requires_grad for p in pair.student.model.parameters())


def test_prompts_from_python_are_those_that_a_resumed_run_needs(tmp_path: Path) -> None:
    config = parse(
        {"student": {"path": "tiny:student"}, "teacher": {"path": "tiny:teacher"}, "prompts": PROMPTS, **SECTIONS}
    )
    asked: list[Any] = ["w1 w2", [{"role": "user", "content": "w3"}], hs.Problem(id="x", text="w4"), {"prompt": "w5"}]
    hs.distill(config, asked, out=tmp_path / "run", training={"steps": 1})
    record = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert record["config"]["prompts"]["source"] == "in memory"
    assert record["config"]["training"]["steps"] == 1
    assert record["parts"]["prompts/problems"].startswith("4 problems, sha256")
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(hs.RunFolderError, match="prompts/problems"):
        hs.distill(resume=tmp_path / "run", prompts=[*asked[:3], "w6"])
    with pytest.raises(hs.DataError, match="pass the same again, as prompts="):
        hs.distill(resume=tmp_path / "run")
    assert hs.distill(resume=tmp_path / "run", prompts=asked).progress.step == 1
    with pytest.raises(hs.ConfigError, match="settings of a resumed run are overrides"):
        hs.distill(resume=tmp_path / "run", training={"steps": 9})


def test_the_other_verbs_take_a_pair(tmp_path: Path) -> None:
    pair = tiny_pair(horizon={"tokens": 8}, evaluation=EVALUATION, tuning={"type": "full"})
    found = hs.preflight(pair, PROMPTS, quick=True)
    assert found.exit_code == 0
    assert all(p.requires_grad for p in pair.teacher.model.parameters())

    alone = hs.evaluate(pair, out=tmp_path / "evaluation")
    folder = parse({"student": {"path": "tiny:student"}, "teacher": {"path": "tiny:teacher"}, "prompts": PROMPTS})
    same_one = hs.evaluate(folder, out=tmp_path / "same", evaluation=EVALUATION)
    assert alone["accuracy"] == same_one["accuracy"]
    before = (tmp_path / "evaluation").read_text() if (tmp_path / "evaluation").is_file() else alone
    assert before

    advice = hs.diagnose(pair, ["w1 w2", "w3", "w4"], grade=lambda problem, response: "w1" in response,
                         diagnosis={"grid": [1, 2], "max_tokens": 6})  # fmt: skip
    assert advice.to_json()["decay"]["prompts"] == 3

    hs.distill(pair, PROMPTS, out=tmp_path / "run", training={"steps": 1, "prompts_per_step": 4})
    with pytest.raises(hs.RunFolderError, match="the student/weights in memory are not those the run started from"):
        hs.explain(tmp_path / "run", pair, only=["cascade"])
    readings = hs.explain(tmp_path / "run", tiny_pair(), only=["cascade"])
    assert "cascade" in readings.to_json()


def test_what_cannot_be_done_with_models_in_memory_is_said(tmp_path: Path) -> None:
    pair = tiny_pair()
    once = student()
    itself = hs.Pair(once, once, pair.tokenizer)
    with pytest.raises(hs.ConfigError, match="same object, and training would change both"):
        hs.distill(itself, PROMPTS, out=tmp_path / "run")
    with pytest.raises(hs.ConfigError, match="models in memory are on cpu, the run on cuda"):
        hs.distill(pair, PROMPTS, out=tmp_path / "run", training={"device": "cuda"})
    with pytest.raises(hs.ConfigError, match=r"student: the models of a Pair are in memory"):
        hs.distill(pair, PROMPTS, out=tmp_path / "run", student={"path": "x"})
    with pytest.raises(hs.ConfigError, match=r"training\.stepz: unknown key"):
        hs.distill(pair, PROMPTS, out=tmp_path / "run", training={"stepz": 1})
    with pytest.raises(hs.DataError, match="passed in from Python"):
        hs.distill(pair, out=tmp_path / "run")
    with pytest.raises(hs.ConfigError, match="sharding divides models while they are loaded"):
        hs.distill(pair, PROMPTS, out=tmp_path / "run", sharding={"type": "fsdp"})
    pair.student.model.is_quantized = True
    with pytest.raises(hs.ModelError, match="student is quantized"):
        hs.distill(pair, PROMPTS, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(hs.ModelError, match="whole on one device; found cpu, meta"):
        hs.Pair(once, student().to("meta"), pair.tokenizer)
