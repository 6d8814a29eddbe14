"""Two machines, as two network namespaces: they train what one process trains, with whole and with divided weights.

tests/nodes/two_nodes.sh makes them. Skipped where namespaces cannot be made: that needs root and iproute2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "nodes/two_nodes.sh"
REPOSITORY = Path(__file__).parents[2]
SETTINGS = ("training.steps=3", "training.prompts_per_step=6", "evaluation=null", "horizon.tokens=8")


def lacking() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux and the ip command of iproute2"
    if os.geteuid() != 0:
        return "needs root: run it with sudo to make network namespaces"
    name = f"hs{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None if made.returncode == 0 else f"ip netns add is not allowed here: {made.stderr.strip()}"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    if (why := lacking()) is not None:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("nodes") / "one"
    command = [sys.executable, "-m", "headstart", *arguments(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY, timeout=300)
    return folder


def arguments(out: Path, *overrides: str) -> list[str]:
    return ["distill", "recipe:tiny-esr", "--out", str(out), *SETTINGS, *overrides]


def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("sharding.type=fsdp",)], ids=["whole", "divided"])
def test_two_nodes_equal_one_process(one: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    command = ["bash", str(SCRIPT), sys.executable, "1", *arguments(tmp_path / "two", *overrides)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together = steps(one), steps(tmp_path / "two")
    assert len(alone) == len(together) == 3
    for a, b in zip(alone, together, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    weights = load_file(one / "model/model.safetensors")
    for name, tensor in load_file(tmp_path / "two/model/model.safetensors").items():
        # AdamW divides a gradient by its own size, so rounding shows where gradients are next to nothing.
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)
    assert not list(Path("/run/netns").glob("hs*[ab]")), "a namespace is left"
