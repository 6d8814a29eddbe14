"""Runs on prompts with images, from a YAML to a model that transformers loads; killed and resumed; and what is wrong
with such runs, before they start."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

import quick
from headstart.checks.run import run_preflight
from headstart.config import loader
from headstart.diagnosis.run import diagnose
from headstart.distillation.run import distill
from headstart.errors import RunFolderError
from headstart.evaluation.run import evaluate
from headstart.testing import random_model, write_checkpoint
from small_image_models import WORDS, image_tokenizer, png, reading_tokenizer, save_image_model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two architectures with tokenizers of their own, a second model of the first, and questions about images of
    different size and one without."""
    folder = tmp_path_factory.mktemp("world")
    for name, family, seed in (("qwen", "qwen2_5_vl", 1), ("other", "qwen2_5_vl", 2), ("idefics", "idefics3", 3)):
        save_image_model(folder / name, family, seed, WORDS[::-1] if family == "idefics3" else WORDS)
    rows: list[dict[str, Any]] = [{"question": "what is two", "image": None, "answer": "two"}]
    for n in range(5):
        (folder / f"{n}.png").write_bytes(png(20 + 8 * n, 30, n))
        rows.append({"question": f"what is in the grid {'left ' * n}", "image": f"{n}.png", "answer": "red"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(world: Path, student: str, teacher: str, **more: Any) -> dict[str, Any]:
    columns = {"column": "question", "image_column": "image"}
    task = {"type": "jsonl", "path": str(world / "rows.jsonl"), **columns}
    return {
        "student": {"path": str(world / student)},
        "teacher": {"path": str(world / teacher)},
        "prompts": {"source": str(world / "rows.jsonl"), "answer_column": "answer", **columns},
        "tuning": {"type": "full"},
        "optimizer": {"lr": 1e-3},
        "horizon": {"type": "fixed", "tokens": 5},
        "rollout": {"samples_per_prompt": 2},
        "training": {"steps": 6, "prompts_per_step": 3},
        "checkpoint": {"every": 2},
        "evaluation": {"task": task, "max_tokens": 6, "samples": 1},
        **more,
    }


def config_of(world: Path, student: str, teacher: str, *overrides: tuple[str, Any]) -> Any:
    return loader.parse(settings(world, student, teacher), list(overrides))


@pytest.mark.parametrize(
    ("student", "teacher", "tuning"),
    [
        ("qwen", "other", {"type": "full"}),
        ("qwen", "idefics", {"type": "lora", "r": 2, "gradient_checkpointing": True}),
        ("idefics", "qwen", {"type": "full"}),
    ],
)
def test_a_run_from_a_yaml_to_a_model_that_transformers_loads(
    world: Path, tmp_path: Path, student: str, teacher: str, tuning: dict[str, Any]
) -> None:
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(settings(world, student, teacher, tuning=tuning)))
    distill(loader.load(file), out=run)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == [1, 2, 3, 4, 5, 6]
    assert "image-text-to-text" in (run / "model" / "README.md").read_text()
    model = hf.AutoModelForImageTextToText.from_pretrained(run / "model")
    start = hf.AutoModelForImageTextToText.from_pretrained(world / student)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    assert any("vision" in name or "visual" in name for name in moved), "the image encoder is trained as well"
    tokenizer = reading_tokenizer(run / "model")
    assert tokenizer.chat_template == image_tokenizer("qwen2_5_vl" if student == "qwen" else "idefics3").chat_template
    own = config_of(world, student, teacher, ("student.path", str(run / "model")))
    evaluate(own, out=tmp_path / "evaluated")
    last, again = run / "eval" / "step_000006.jsonl", tmp_path / "evaluated" / "rows.jsonl"
    texts = [[json.loads(line)["response"] for line in path.read_text().splitlines()] for path in (last, again)]
    assert texts[0] == texts[1]


def test_the_students_own_start_teaches_with_images_and_a_context(world: Path, tmp_path: Path) -> None:
    own = settings(world, "qwen", "qwen", tuning={"type": "lora", "r": 2, "dropout": 0.0}, evaluation=None)
    own["prompts"]["teacher_view"] = {"context_column": "answer"}
    config = loader.parse(own)
    assert config.teacher_is_start
    run = distill(config, out=tmp_path / "run").path
    losses = [s["loss"] for s in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in s]
    assert len(losses) == 6
    assert losses[0] > 1e-3, "the context moves the teacher"


def test_killed_and_resumed_bit_for_bit(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings(world, "qwen", "idefics")))
    straight, run = tmp_path / "straight", tmp_path / "run"
    distill(loader.load(file), out=straight)
    process = subprocess.Popen(quick.command("distill", file, "--out", run), stderr=subprocess.PIPE)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        time.sleep(0.01)
    quick.kill(process)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model").exists()
    distill(resume=run)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, straight))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_must_have_the_same_images(world: Path, tmp_path: Path) -> None:
    own = tmp_path / "world"
    shutil.copytree(world, own)
    run = distill(config_of(own, "qwen", "other"), out=tmp_path / "run").path
    shutil.rmtree(run / "model")
    (own / "2.png").write_bytes(png(36, 30, 99))
    with pytest.raises(RunFolderError, match=r"prompts/images: .5 images, sha256 [0-9a-f]+. -> .5 images"):
        distill(resume=run)


def test_a_diagnosis_goes_on_from_prefixes_after_images(world: Path, tmp_path: Path) -> None:
    asked = {"problems": 4, "max_tokens": 6, "grid": [2, 4]}
    diagnose(loader.parse(settings(world, "qwen", "idefics", diagnosis=asked)), out=tmp_path / "run")
    curve = json.loads((tmp_path / "run" / "diagnose" / "decay.json").read_text())
    assert {0, 2, 4} <= {point["prefix_tokens"] for point in curve["points"]}
    assert json.loads((tmp_path / "run" / "diagnose" / "positions.json").read_text())["tokens"] > 0


def test_preflight_of_a_sound_pair(world: Path) -> None:
    preflight = run_preflight(config_of(world, "qwen", "other"))
    assert not preflight.not_made
    assert not [f for f in preflight.findings if f.severity == "blocking"], preflight.findings
    found = {f.check: f for f in preflight.findings}
    for check in ("self-test", "engine log-probs", "gradients", "teacher determinism"):
        assert found[check].severity == "ok", found[check]


@pytest.fixture
def broken(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


def blocking(config: Any) -> str:
    found = [f for f in run_preflight(config).findings if f.severity == "blocking"]
    assert len(found) == 1, found
    return f"{found[0].message}; {found[0].remedy}"


def test_preflight_finds_a_missing_processor(broken: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        (broken / "other" / name).unlink(missing_ok=True)
    assert "there is no processor that turns images into pixel values" in blocking(config_of(broken, "qwen", "other"))


def test_preflight_finds_a_model_that_takes_no_images(broken: Path) -> None:
    tokenizer = image_tokenizer("qwen2_5_vl")
    write_checkpoint(broken / "blind", random_model("llama", len(tokenizer)), tokenizer)
    assert "a llama model takes no images, but prompts hold some" in blocking(config_of(broken, "qwen", "blind"))


def test_preflight_finds_a_missing_column_and_a_missing_file(broken: Path) -> None:
    config = settings(broken, "qwen", "other")
    config["prompts"]["image_column"] = "picture"
    assert "has no column 'picture'" in blocking(loader.parse(config))
    (broken / "3.png").unlink()
    assert "row 5: the image '3.png' cannot be read (No such file" in blocking(config_of(broken, "qwen", "other"))


def test_preflight_finds_an_image_that_is_none(broken: Path) -> None:
    (broken / "3.png").write_text("not found")
    assert "the image '3.png' is none that can be read" in blocking(config_of(broken, "qwen", "other"))


def test_preflight_finds_images_that_no_setting_names(broken: Path) -> None:
    turn = {"role": "user", "content": [{"type": "image", "path": "1.png"}, {"type": "text", "text": "what"}]}
    (broken / "turns.jsonl").write_text(json.dumps({"prompt": [turn]}) + "\n")
    config = settings(broken, "qwen", "other", evaluation=None)
    config["prompts"] = {"source": str(broken / "turns.jsonl")}
    found = run_preflight(loader.parse(config)).findings
    assert any(f.severity == "blocking" and "set prompts.images=files" in f"{f.message}; {f.remedy}" for f in found)
    config["prompts"]["images"] = "files"
    assert not [f for f in run_preflight(loader.parse(config)).findings if f.severity == "blocking"]


def test_the_visual_world_of_the_repository_trains_from_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    assert sum(file.stat().st_size for file in Path("recipes/grid").rglob("*")) <= 2.5e6
    esr, full = (loader.load(f"recipes/grid/{name}.yaml") for name in ("esr", "full"))
    assert (esr.horizon.longest, full.horizon.longest) == (16, 200)
    assert esr.sees
    run = distill(loader.load("recipes/grid/esr.yaml", ["training.steps=2", "evaluation=null"]), out=tmp_path / "run")
    assert run.progress.generated_tokens == 2 * 8 * 16
