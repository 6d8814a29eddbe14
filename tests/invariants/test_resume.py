"""A run that was killed, interrupted or damaged and then resumed ends bit-equal to one that ran straight through."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quick
from headstart.config.render import resolved
from headstart.distillation.run import distill
from support import make_config

LORA = "tuning={type: lora, r: 4, alpha: 8, dropout: 0.1, targets: [q_proj, v_proj]}"


def command(*arguments: object) -> list[str]:
    return quick.command("distill", *arguments)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_same_run(run: Path, straight: Path) -> None:
    a, b = final_weights(run), final_weights(straight)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), "weights differ"
    assert timeless(run) == timeless(straight), "metrics differ"


def timeless(run: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what depends on the clock or the machine's memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if "second" not in k and "memory" not in k} for x in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA run of 40 steps with dropout, and its configuration file: what every resumed run must equal."""
    folder = tmp_path_factory.mktemp("straight")
    task = folder / "task.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"w{i} w3", "answer": f"w{i}"}) + "\n" for i in range(6)))
    evaluation = f"evaluation={{task: {{type: jsonl, path: {task}}}, every: 5, samples: 2, max_tokens: 8}}"
    config = make_config(folder, LORA, evaluation, "training.steps=40", "checkpoint.every=3")
    distill(config, out=folder / "run")
    file = folder / "run.yaml"
    file.write_text(resolved(config))
    return folder / "run", file


def test_kill_9_at_random_moments(straight: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed at least five times, anywhere between start and finish, then left to finish."""
    rng, run, kills, attempts = random.Random(20), tmp_path / "run", 0, 0
    while not (run / "model").exists():
        attempts += 1
        assert attempts < 40, "the run never finishes"
        arguments = ("--resume", run) if (run / "config.yaml").exists() else (straight[1], "--out", run)
        # Five kills at random moments from before the first import to the last step; later attempts may finish.
        process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills < 5:
            wait_for_new_line(run, process, rng)
            quick.kill(process)
        error = process.communicate()[1].decode()
        kills += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), error
    assert kills >= 5
    assert_same_run(run, straight[0])


def wait_for_new_line(run: Path, process: subprocess.Popen[bytes], rng: random.Random) -> None:
    """Until training has gone on by a line or two, then a random moment more."""
    metrics, goal = run / "metrics.jsonl", rng.randint(1, 3)
    before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    while process.poll() is None:
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if lines >= before + goal or lines < before:
            break
        time.sleep(0.002)
    time.sleep(rng.random() * 0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_a_checkpoint(straight: tuple[Path, Path], tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(straight[1], "--out", run, "checkpoint.every=1000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics = run / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count('"step"') < 4):
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate()[1].decode()
    assert process.returncode == 128 + number, error
    assert "--resume" in error
    assert "Traceback" not in error
    assert len(list((run / "checkpoints").glob("step_*"))) == 1
    subprocess.run(command("--resume", run), check=True, capture_output=True)
    assert all(torch.equal(v, final_weights(straight[0])[k]) for k, v in final_weights(run).items())


def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_used(
    straight: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(command(straight[1], "--out", run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "checkpoints" / "step_000009").exists():
        assert process.poll() is None
        time.sleep(0.005)
    quick.kill(process)
    process.wait()
    newest = max((run / "checkpoints").glob("step_??????"))
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-10] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    distill(resume=run)
    output = capfd.readouterr().out
    assert newest.name in output
    assert_same_run(run, straight[0])


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Two gloo processes, each with as many micro-batches as its own rollouts need, give the trajectory of one that
    has a single one: same samples, same losses within 1e-6, same weights."""
    config = make_config(tmp_path, "training.prompts_per_step=5", "rollout.samples_per_prompt=2")
    file = tmp_path / "run.yaml"
    file.write_text(resolved(config))
    subprocess.run(command(file, "--out", tmp_path / "one"), check=True, capture_output=True)
    done = quick.ranks(2, "distill", file, "--out", tmp_path / "two", "training.memory_budget_gib=0.0002")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = timeless(tmp_path / "one"), timeless(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    for name, tensor in final_weights(tmp_path / "one").items():
        torch.testing.assert_close(tensor, final_weights(tmp_path / "two")[name], rtol=0, atol=2e-5)


MIXED = ("rollout.mix={student: 0.4, teacher: 0.3, given: 0.3}", "prompts.completion_column=answer")
SFT = ("rollout.mix={teacher: 0.5, given: 0.5}", "divergence.type=sft")


@pytest.mark.parametrize("more", [(), SFT], ids=["reverse_kl", "sft"])
def test_text_of_others_is_the_same_after_a_resume(tmp_path: Path, more: tuple[str, ...]) -> None:
    """What the teacher had written before the kill is used; the rest is sampled as it would have been."""
    rows = [{"prompt": f"w{i} w3", "answer": f"w{i} w1 w2"} for i in range(30)]
    constant = "schedule={type: constant, warmup: 0}"  # of five steps the first five of thirty
    config = make_config(tmp_path, *MIXED, *more, constant, "training.steps=30", "horizon.tokens=5")
    Path(config.prompts.source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    straight = distill(config, out=tmp_path / "straight").path
    fewer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 5})})
    run = distill(fewer, out=tmp_path / "run").path
    written = (run / "teacher_texts.jsonl").read_text()
    assert len(written) < len((straight / "teacher_texts.jsonl").read_text())
    (run / "teacher_texts.jsonl").write_text(written[: len(written) // 2])
    (run / "config.yaml").write_text(resolved(config))
    shutil.rmtree(run / "model")
    distill(resume=run, allow_changed=["training.steps"])
    assert_same_run(run, straight)
