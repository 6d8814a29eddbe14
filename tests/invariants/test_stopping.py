"""A signal to one of two ranks ends both together: one message, the same exit code, and a checkpoint to go on from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import quick
from headstart.config.render import resolved
from support import beside_progress, make_config

Processes = Sequence["subprocess.Popen[str]"]


def whole(*arguments: object) -> list[str]:
    """The command line with its imports."""
    return [sys.executable, "-m", "headstart", *map(str, arguments)]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[Path, Processes]]:
    """Starts a run of two gloo ranks with overrides; its folder and its processes."""

    def begin(*overrides: str, command: Callable[..., list[str]] = quick.command) -> tuple[Path, Processes]:
        (tmp_path / "run.yaml").write_text(resolved(make_config(tmp_path, *overrides)))
        pipe, port = subprocess.PIPE, quick.free_port()
        words = command("distill", tmp_path / "run.yaml", "--out", tmp_path / "run")
        environments = (os.environ | quick.launched_by_hand(rank, 2, port) for rank in range(2))
        return tmp_path / "run", [
            subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)
            for environment in environments
        ]

    return begin


def wait(ranks: Processes, happened: Callable[[], object]) -> None:
    while not happened():
        assert all(rank.poll() is None for rank in ranks), [rank.communicate() for rank in ranks]
        time.sleep(0.005)


def ended(ranks: Processes, number: int, step: int | None = None) -> None:
    """Both ranks are gone, and the first alone has said one line."""
    (_, said), (_, silent) = (rank.communicate(timeout=120) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [128 + number] * 2, said + silent
    said = beside_progress(said)
    assert said.startswith("error: stopped after step " + ("" if step is None else f"{step};"))
    assert (said.count("\n"), silent) == (1, "")


def steps(run: Path) -> int:
    return (run / "metrics.jsonl").read_text().count('"event": "step"') if (run / "metrics.jsonl").exists() else 0


def test_before_the_first_step(start: Callable[..., tuple[Path, Processes]]) -> None:
    run, ranks = start("training.steps=100000", "checkpoint.every=100000", command=whole)
    time.sleep(2)  # while torch is being read, or a little later
    ranks[1].send_signal(signal.SIGTERM)
    ended(ranks, signal.SIGTERM)
    assert (run / "config.yaml").exists()


def test_twice_within_steps(start: Callable[..., tuple[Path, Processes]]) -> None:
    """As where a batch system and torchrun both send it."""
    run, ranks = start("training.steps=100000", "checkpoint.every=100000")
    wait(ranks, lambda: steps(run) >= 2)
    for _ in range(2):
        ranks[1].send_signal(signal.SIGTERM)
        time.sleep(0.05)
    ended(ranks, signal.SIGTERM)
    assert len(list((run / "checkpoints").glob("step_??????"))) == 1


def test_within_an_evaluation(tmp_path: Path, start: Callable[..., tuple[Path, Processes]]) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"w{i % 9} w3", "answer": "w1"}) + "\n" for i in range(20)))
    evaluation = f"evaluation={{task: {{type: jsonl, path: {task}}}, every: 2, samples: 30, batch_size: 4}}"
    run, ranks = start("training.steps=2", "checkpoint.every=100", evaluation, "evaluation.max_tokens=40")
    wait(ranks, lambda: steps(run) == 2)
    time.sleep(0.2)
    ranks[1].send_signal(signal.SIGTERM)
    ended(ranks, signal.SIGTERM, 2)
    assert (run / "checkpoints" / "step_000002").is_dir()
    assert not (run / "model").exists()


def test_while_the_model_is_written(start: Callable[..., tuple[Path, Processes]]) -> None:
    run, ranks = start("training.steps=2", "checkpoint.every=100", command=whole)  # a signal that arrives at once
    wait(ranks, (run / "model.incomplete").exists)
    ranks[0].send_signal(signal.SIGINT)
    ended(ranks, signal.SIGINT, 2)
    assert (run / "checkpoints" / "step_000002").is_dir()
    assert not list(run.glob("model*"))
