"""Every bad input ends in one clear message, the right exit code, no traceback, and nothing lost or left behind."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.cli.main import main
from headstart.config.render import resolved
from headstart.distillation.run import distill
from headstart.tasks import reading
from headstart.testing import random_model, write_checkpoint
from small_tokenizers import piece_tokenizer
from support import beside_progress, make_config, make_parts


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class World:
    """A good pair, prompts and `run.yaml`; every test breaks one thing in its own copy of it."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "run.yaml"

    def broken(self, name: str, change: Callable[[Path], object]) -> Path:
        """A changed copy of the student."""
        copy = self.folder / name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / "student", copy)
        change(copy)
        return copy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "run.yaml").write_text(resolved(make_config(folder)))
    return World(folder)


Fails = Callable[..., str]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run `headstart` in this process; its one error message. An unexpected exception would come through."""

    def run(*arguments: object, code: int = 1, left: Path | None = None) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["headstart", "distill", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        error = beside_progress(capsys.readouterr().err)
        assert stop.value.code == code, error
        assert error.startswith("error: "), error
        assert error.count("error: ") == 1
        assert "Traceback" not in error
        assert left is None or not left.exists(), "a failed start must leave no run folder"
        return error

    return run


# --- prompts ---------------------------------------------------------------------------------------------------------

PROMPT_FILES: list[tuple[str, str | bytes | None, Sequence[str], str]] = [
    ("empty", "", [], "is empty"),
    ("blank lines", "\n\n", [], "is empty"),
    ("missing", None, [], "does not exist"),
    ("malformed", '{"prompt": "w1"}\n{"prompt": oops}\n', [], "line 2: not valid JSON"),
    ("not an object", '{"prompt": "w1"}\n["w1"]\n', [], "line 2: expected a JSON object"),
    ("column", '{"promt": "w1"}\n', [], "did you mean 'promt'"),
    ("empty prompt", '{"prompt": "w1"}\n{"prompt": " "}\n', [], "row 2: the prompt is an empty string"),
    ("not text", b'{"prompt": "\xff"}\n', [], "not UTF-8"),
    ("surrogate", '{"prompt": "w1"}\n{"prompt": "\\ud83d"}\n', [], "row 2: the text holds a lone surrogate"),
    ("nested", '{"prompt": "w1"}\n{"prompt": ' + "[" * 100_000, [], "line 2: not valid JSON (nested too deeply)"),
    (
        "image",
        '{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}',
        [],
        "row 1: the content has",
    ),
    ("speaker", '{"prompt": [{"from": 5, "value": "w1"}]}', [], "row 1, message 1: role and content must be strings"),
    ("list text", """{"prompt": "[{'role': 'user', 'content': 'w1'}]"}""", [], "row 1: the prompt looks like messages"),
    ("all too long", '{"prompt": "w1 w2 w3"}\n', ["prompts.max_tokens=3"], "none is left"),
    ("refused", '{"prompt": "w1 w2 w3"}\n{"prompt": "w1"}\n', ["prompts={max_tokens: 5, overlong: refuse}"], "1 of 2"),
]


@pytest.mark.parametrize(
    ("content", "overrides", "message"), [p[1:] for p in PROMPT_FILES], ids=[p[0] for p in PROMPT_FILES]
)
def test_prompts(
    world: World, fails: Fails, tmp_path: Path, content: str | bytes | None, overrides: list[str], message: str
) -> None:
    path, out = tmp_path / "questions.jsonl", tmp_path / "run"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = fails(world.recipe, "--out", out, *overrides, f"prompts.source={path}", left=out)
    assert message in error
    assert message == "1 of 2" or message == "none is left" or str(path) in error


def test_compressed_prompts(world: World, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 2**22)
    path, out = tmp_path / "questions.jsonl.gz", tmp_path / "run"
    whole, bomb = gzip.compress(b'{"prompt": "w1"}\n'), gzip.compress(b"\n" * 2**20) * 8
    for content, message in ((whole[:-9], "cannot be read"), (bomb, "unfolds to more than")):
        path.write_bytes(content)
        assert message in fails(world.recipe, f"prompts.source={path}", "--out", out, left=out)


# --- models ----------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor], str], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights, "model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


MODELS: list[tuple[str, Callable[[Path], object], str]] = [
    ("truncated", cut, "A safetensors file is damaged"),
    ("garbage", lambda f: (f / "model.safetensors").write_bytes(b"x" * 999), "A safetensors file is damaged"),
    ("pickle", to_pickle, "Only safetensors are read"),
    ("no config", lambda f: (f / "config.json").unlink(), "holds no config.json"),
    ("bad config", lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    ("unknown", lambda f: (f / "config.json").write_text('{"model_type": "zork"}'), "model type `zork`"),
    ("no tokenizer", without_tokenizer, "the tokenizer cannot be loaded"),
    ("missing weight", lambda f: edit_weights(f, lambda w, k: w.pop(k)), "1 weights are missing"),
    ("other shape", lambda f: edit_weights(f, lambda w, k: w.update({k: w[k][:7].clone()})), "has shape (7, "),
    ("nan", lambda f: edit_weights(f, lambda w, k: w[k][0].fill_(float("nan"))), "are not finite"),
    ("no template", lambda f: (f / "chat_template.jinja").unlink(), "no chat template; set prompts.chat=false"),
]


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(("change", "message"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_checkpoints(world: World, fails: Fails, tmp_path: Path, who: str, change: Any, message: str) -> None:
    path = world.broken("broken", change)
    error = fails(world.recipe, "--out", tmp_path / "run", f"{who}.path={path}", left=tmp_path / "run")
    assert message in error
    assert str(path) in error or who in error
    assert error.count("\n") == 1, "one line"


@pytest.mark.parametrize("path", ["nowhere/at/all", "./student-7", "prompts.jsonl", "tests/nothing", "tiny:giant"])
def test_no_checkpoint_there(world: World, fails: Fails, tmp_path: Path, path: str) -> None:
    """Nothing of this looks like a hub name, so the hub is not asked (which would take a minute without network)."""
    start = time.perf_counter()
    error = fails(world.recipe, "--out", tmp_path / "run", f"student.path={path}", left=tmp_path / "run")
    assert repr(path) in error
    assert time.perf_counter() - start < 5


def test_a_tokenizer_without_exact_bytes(world: World, fails: Fails, tmp_path: Path) -> None:
    teacher = write_checkpoint(tmp_path / "teacher", random_model("llama", 46), piece_tokenizer())
    error = fails(world.recipe, "--out", tmp_path / "run", f"teacher.path={teacher}", left=tmp_path / "run")
    assert "a WordPiece tokenizer" in error
    assert "cannot be compared with another tokenizer's" in error


# --- settings that only the models or the machine can refuse ---------------------------------------------------------

SETTINGS: list[tuple[str, int, str]] = [
    ("tuning={type: lora, targets: [query]}", 1, "fits no layer of the student; its linear layers: down_proj, gate"),
    ("student.adapter=./no-adapter", 1, "no adapter folder at './no-adapter'"),
    ("horizon={type: custom, path: 'no_such_package:Horizon'}", 2, "horizon.path: 'no_such_package:Horizon'"),
    ("horizon={type: custom, path: 'headstart.horizon.fixed:Nothing'}", 2, "cannot be imported"),
    ("horizon={type: custom, path: 'headstart.horizon.fixed:FixedHorizon'}", 2, "does not take these arguments"),
    ("horizon={type: custom, path: 'json:dumps', arguments: {obj: 1}}", 2, "has no tokens, observe, state_dict"),
    ("evaluation={task: {type: jsonl, path: no-task.jsonl}}", 1, "no-task.jsonl does not exist"),
    ("evaluation={task: {type: custom, path: 'json:JSONDecoder'}}", 2, "has no problems, grade, prefix_state"),
    ("horizon.tokens=504", 2, "the student's context is 512 tokens, but its longest prompt of 9 tokens"),
    ("horizon={type: full, max_tokens: 504}", 2, "the teacher's context is 512 tokens"),
    ("prompts.teacher_view={template_kwargs: {enable_thinking: false}}", 1, "does not use 'enable_thinking'"),
]


@pytest.mark.parametrize(("override", "code", "message"), SETTINGS)
def test_settings(world: World, fails: Fails, tmp_path: Path, override: str, code: int, message: str) -> None:
    out = tmp_path / "run"
    assert message in fails(world.recipe, "--out", out, override, code=code, left=out)


def test_context_bounds_are_exact_and_hold_for_evaluation(world: World, fails: Fails, tmp_path: Path) -> None:
    """The longest prompt has 9 tokens; 9 + 503 is the whole context of 512."""
    make_parts(tmp_path / "fits", make_config(world.folder, "horizon.tokens=503"))
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "w1 w2", "answer": "w3"}\n')
    evaluation = f"evaluation={{task: {{type: jsonl, path: {task}}}, max_tokens: 508}}"
    error = fails(world.recipe, "--out", tmp_path / "run", evaluation, code=2, left=tmp_path / "run")
    assert "its longest evaluation prompt of 5 tokens and evaluation.max_tokens = 508 make 513" in error


def test_adapters(world: World, fails: Fails, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    error = fails(world.recipe, "--out", tmp_path / "run", f"student.adapter={adapter}", left=tmp_path / "run")
    assert "no adapter_model.safetensors; only safetensors are read" in error
    distill(make_config(world.folder, "tuning={type: lora, r: 2}", "output.format=adapter"), out=tmp_path / "good")
    good = tmp_path / "good" / "model"
    teacher = f"teacher.adapter={good}"  # made for the narrower student
    assert "cannot be loaded onto this model" in fails(world.recipe, "--out", tmp_path / "run", teacher)
    (good / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert "cannot be loaded onto this model" in fails(world.recipe, "--out", tmp_path / "x", f"student.adapter={good}")
    error = fails(world.recipe, f"student.adapter={good}", "tuning.type=lora", "output.format=adapter", code=2)
    assert "output.format: adapter" in error


def test_missing_extras(world: World, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "run"
    for override, extra in (("tracking.tensorboard=true", "tensorboard"), ("tracking.wandb=project", "wandb")):
        error = fails(world.recipe, "--out", out, override, code=2, left=out)
        assert f"{sys.executable} -m pip install {extra}" in error


def test_wandb_that_does_not_start(world: World, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    error = fails(world.recipe, "--out", tmp_path / "run", "tracking.wandb=p", code=2, left=tmp_path / "run")
    assert "no API key configured" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu(world: World, fails: Fails, tmp_path: Path) -> None:
    error = fails(world.recipe, "--out", tmp_path / "run", "training.device=cuda", code=2, left=tmp_path / "run")
    assert "no CUDA device" in error


# --- run folders -----------------------------------------------------------------------------------------------------


def test_unwritable_output_is_refused_before_anything_is_loaded(world: World, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "deep" / "run", tmp_path / "file"):
        assert "--out" in fails(world.recipe, "--out", out, "student.path=./nothing")
    assert (tmp_path / "file").read_text() == "x"
    # Nobody, not even root, makes folders there.
    assert "cannot be written" in fails(world.recipe, "--out", "/proc/headstart/run")


def test_run_folders(world: World, fails: Fails, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert "is not empty (it holds thesis.txt)" in fails(world.recipe, "--out", foreign)
    assert files_in(foreign) == {"thesis.txt": b"years of work"}
    assert "is not a run folder" in fails("--resume", foreign)
    assert "no such folder" in fails("--resume", tmp_path / "nothing")
    assert "leave out all but key=value" in fails("--resume", foreign, "run.yaml", code=2)

    run = tmp_path / "run"
    distill(make_config(world.folder, "training.steps=1"), out=run)
    before = files_in(run)
    assert f"Continue it with --resume {run}" in fails(world.recipe, "--out", run)
    assert "goes with --resume" in fails(world.recipe, "--allow-changed", "training.steps", code=2)
    assert files_in(run) == before


def test_resuming_with_another_configuration(world: World, fails: Fails, tmp_path: Path) -> None:
    run = tmp_path / "run"
    distill(make_config(world.folder, "training.steps=2"), out=run)
    shutil.rmtree(run / "model")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(resolved(make_config(world.folder, "training.steps=2", "tuning.type=lora")))
    assert 'tuning.type: "full" -> "lora"' in fails("--resume", run)
    assert "holds other weights than config.yaml trains now" in fails("--resume", run, "--allow-changed", "tuning")
    (run / "config.yaml").write_text(config)
    assert distill(resume=run).progress.step == 2


def test_a_failed_resume_lets_go_of_the_folder(world: World, fails: Fails, tmp_path: Path) -> None:
    run = tmp_path / "run"
    student = world.broken("moved", lambda folder: None)
    distill(make_config(world.folder, "training.steps=2", f"student.path={student}"), out=run)
    shutil.rmtree(run / "model")
    student.rename(student.with_name("away"))
    before = files_in(run)
    assert "no model folder" in fails("--resume", run)
    assert files_in(run) == before
    student.with_name("away").rename(student)
    assert distill(resume=run).progress.step == 2


def test_an_absurd_learning_rate(world: World, fails: Fails, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "Lower optimizer.lr" in fails(world.recipe, "--out", run, "optimizer.lr=1e30", "checkpoint.every=1")
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [f"step_{step:06d}" for step in lines] == sorted(p.name for p in (run / "checkpoints").iterdir())
