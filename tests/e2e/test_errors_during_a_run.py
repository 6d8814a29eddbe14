"""What goes wrong while a run goes on: nothing that was reached is lost, and --resume goes on from there."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quick
from headstart.config.render import resolved
from headstart.distillation.run import distill
from headstart.errors import CheckpointError, NonFiniteError
from headstart.interfaces import Teacher
from headstart.records import Rollout
from headstart.train.loop import run as run_loop
from support import beside_progress, make_config, make_parts

ENVIRONMENT = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run.yaml` beside its pair and prompts."""
    folder = tmp_path_factory.mktemp("world")
    path = folder / "run.yaml"
    path.write_text(resolved(make_config(folder)))
    return path


class FailingTeacher(Teacher):
    """Judges like `teacher`, but returns NaN from its `good`-th step on."""

    def __init__(self, teacher: Any, good: int) -> None:
        self.teacher, self.good = teacher, good

    def score(self, rollouts: Sequence[Rollout], prefill: Any = None) -> Any:
        self.good -= 1
        scores = self.teacher.score(rollouts)
        if self.good >= 0:
            return scores
        return SimpleNamespace(logits=lambda rows: scores.logits(rows) * float("nan"))


def test_a_loss_that_is_not_finite_keeps_weights_and_checkpoint(recipe: Path, tmp_path: Path) -> None:
    config = make_config(recipe.parent, "checkpoint.every=2")
    straight = distill(config, out=tmp_path / "straight")
    parts = make_parts(tmp_path / "run", config)
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 4; the weights were not changed"):
        run_loop(replace(parts, teacher=FailingTeacher(parts.teacher, 3)))
    third = {name: p.detach().clone() for name, p in parts.student.trainable().items()}
    assert all(bool(p.isfinite().all()) for p in third.values())
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    resumed = distill(resume=tmp_path / "run")
    a, b = (load_file(result.path / "model" / "model.safetensors") for result in (straight, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB: two checkpoints fit (about 250 KiB each), a third does not."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small file system needs the right to mount one; the file size limit is tested in any case")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(recipe: Path, small_disk: Path, tmp_path: Path) -> None:
    config = make_config(recipe.parent, "checkpoint={every: 1, keep_last: 3}", "training.steps=5")
    straight = distill(config, out=tmp_path / "straight")
    with pytest.raises(CheckpointError, match=r"No space left on device.*step_000002, is kept.*--resume"):
        distill(config, out=small_disk / "run")
    assert sorted(p.name for p in (small_disk / "run" / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    resumed = distill(resume=small_disk / "run")
    a, b = (load_file(result.path / "model" / "model.safetensors") for result in (straight, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- as a process of its own -----------------------------------------------------------------------------------------


class Process(subprocess.Popen[str]):
    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        output, error = super().communicate(input, timeout)
        return output, beside_progress(error)


def process(*arguments: object, **options: Any) -> Process:
    """One whose limits can be set."""
    command = [sys.executable, "-m", "headstart", "distill", *map(str, arguments)]
    pipe = subprocess.PIPE
    return Process(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, **options)


def distilled(*arguments: object, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    done = quick.run("distill", *arguments, env=ENVIRONMENT | environment)
    return done.returncode, done.stdout, beside_progress(done.stderr)


def test_a_file_size_limit_during_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    """Writing stops in the middle of `optimizer.pt`, as on a disk that fills up while a run goes on."""
    run = tmp_path / "run"
    training = process(recipe, "--out", run, "training.steps=500", "checkpoint.every=1", "checkpoint.keep_last=1")
    while training.poll() is None and not list((run / "checkpoints").glob("step_??????")):
        time.sleep(0.01)
    resource.prlimit(training.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    output, error = training.communicate(timeout=120)
    assert training.returncode == 1, output + error
    assert error.startswith("error: checkpoint ")
    assert "File too large" in error
    assert "is kept" in error
    assert error.count("\n") == 1
    (kept,) = (run / "checkpoints").iterdir()
    assert kept.name in error
    with process("--resume", run) as resumed:
        while resumed.poll() is None and not (run / "checkpoints" / f"step_{int(kept.name[5:]) + 3:06d}").exists():
            time.sleep(0.01)
        resumed.send_signal(signal.SIGTERM)
        output, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 143
    assert f"resumed after step {int(kept.name[5:])}" in output
    assert error.startswith("error: stopped after step ")


def test_a_file_size_limit_while_the_model_is_written(recipe: Path, tmp_path: Path) -> None:
    """The adapter's checkpoints fit, the merged model does not: all steps are kept, and --resume writes it."""
    run = tmp_path / "run"
    lora = "tuning={type: lora, r: 1, targets: [q_proj]}"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    training = process(recipe, "--out", run, lora, "training.steps=2", preexec_fn=limit)
    output, error = training.communicate(timeout=120)
    assert training.returncode == 1, output + error
    assert error.startswith(f"error: the model cannot be written to {run / 'model'}")
    assert error.count("\n") == 1
    assert not list(run.glob("model*"))
    assert distill(resume=run).progress.step == 2
    assert (run / "model" / "model.safetensors").exists()


def test_a_complete_run_says_so_and_a_changed_one_names_the_change(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    distill(make_config(recipe.parent, "training.steps=2"), out=run)
    _, output, error = distilled("--resume", run)
    assert (output.splitlines()[0], error) == (
        f"the run in {run} is complete: its model is in {run / 'model'}; nothing to resume",
        "",
    )
    (run / "model").rename(tmp_path / "model")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("steps: 2", "steps: 3").replace("lr: 0.001", "lr: 0.002"))
    code, output, error = distilled("--resume", run, "--allow-changed", "optimizer.lr")
    assert (code, output) == (1, "")
    assert error.splitlines() == [
        "error: this run was started otherwise:",
        "  training.steps: 2 -> 3",
        "Put that back, or continue with the change from here by --allow-changed training.steps, "
        "or start a new run with --out",
    ]
    code, output, error = distilled("--resume", run, "--allow-changed", "training.steps, optimizer.lr")
    assert (code, error) == (0, "")
    assert "changed since the start: training.steps: 2 -> 3" in output


def test_hub_models_are_known_by_the_files_of_their_snapshot(recipe: Path, tmp_path: Path) -> None:
    """A hub name whose branch has moved to another commit: the same files are no change, other files are one."""
    hub, run, file = tmp_path / "hub", tmp_path / "run", tmp_path / "run.yaml"

    def publish(commit: str) -> Path:
        repository = hub / "models--someone--student"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit * 40)
        return Path(shutil.copytree(recipe.parent / "student", repository / "snapshots" / (commit * 40)))

    def resumed(*arguments: object) -> tuple[int, str]:
        code, _, error = distilled(*arguments, HF_HUB_CACHE=str(hub), HF_HUB_OFFLINE="1")
        shutil.rmtree(run / "model", ignore_errors=True)
        return code, error

    publish("a")
    file.write_text(resolved(make_config(recipe.parent, "student.path=someone/student", "training.steps=1")))
    assert resumed(file, "--out", run) == (0, "")
    publish("b")
    assert resumed("--resume", run) == (0, "")
    settings = publish("c") / "config.json"
    settings.write_text(settings.read_text().replace("{", '{"of_another_commit": 1,', 1))
    code, error = resumed("--resume", run)
    assert code == 1
    assert "student/config.json: " in error
    assert "--allow-changed student," in error
    assert resumed("--resume", run, "--allow-changed", "student") == (0, "")


def test_errors_and_warnings_are_readable_lines(tmp_path: Path) -> None:
    """Nothing but our own lines: no progress bars, no notices of libraries, no Python locations."""
    config = make_config(
        tmp_path,
        "tuning={type: lora, r: 2, gradient_checkpointing: true}",
        "prompts.system=w1",
        "training.steps=1",
        "output.format=both",
        architecture="gemma2",
    )
    (tmp_path / "run.yaml").write_text(resolved(config))
    code, output, error = distilled(tmp_path / "run.yaml", "--out", tmp_path / "run")
    assert code == 0, error
    assert error.splitlines() == [
        f"warning: the {who}'s chat template has no system role: the system prompt is put in front of the first user "
        "message; set no system prompt to avoid this"
        for who in ("student", "teacher")
    ]
    starts = ["student ", "24 prompts", "step 1/1", "sample at step 1", "  prompt: ", "  response: ", "model written",
              "1 steps", "next: ", "      headstart "]  # fmt: skip
    assert [line[: len(start)] for line, start in zip(output.splitlines(), starts, strict=False)] == starts, output
    assert len(output.splitlines()) == len(starts)
    code, output, error = distilled(tmp_path / "run.yaml", "--out", tmp_path / "run")
    assert (code, output) == (1, "")
    assert error == (
        f"error: the run folder {tmp_path / 'run'} already holds a run. Continue it with --resume {tmp_path / 'run'}, "
        "or choose another folder with --out.\n"
    )
