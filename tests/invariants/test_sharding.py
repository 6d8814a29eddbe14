"""Models divided over gloo ranks train as whole ones do in one process: same samples, losses, norms and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

import sharded_ranks
from headstart.config.loader import load
from headstart.config.render import resolved
from headstart.distillation.run import distill
from support import make_config

FULL, LORA = "tuning={type: full}", "tuning={type: lora, r: 4, alpha: 8, dropout: 0.0, targets: [q_proj, down_proj]}"
CHECKPOINTING = "tuning.gradient_checkpointing=true"
HALF = "student.dtype=bfloat16"
PROBES = "probes={every: 2, prompts: 3, max_tokens: 14}"
SPLIT = ("training.prompts_per_step=3", "training.micro_batch=1")
"""Four micro-batches on one of two ranks and two on the other."""
# The step of AdamW divides by gradients that may be rounding alone; with a larger eps it does not.
SHARED = ("rollout.samples_per_prompt=2", "training.steps=3", "training.prompts_per_step=5", "optimizer.eps=1e-3")
TWO: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "llama full, tied": ("trajectory", "llama", (FULL,)),
    "llama LoRA": ("trajectory", "llama", (LORA, *SPLIT)),
    "qwen2 full, untied": ("trajectory", "qwen2", (FULL, *SPLIT)),
    "qwen2 LoRA with the head": ("trajectory", "qwen2", (LORA, "tuning.targets=[v_proj, lm_head]")),
    "qwen3 full, checkpointing": ("trajectory", "qwen3", (FULL, CHECKPOINTING)),
    "qwen3 LoRA, checkpointing": ("trajectory", "qwen3", (LORA, CHECKPOINTING)),
    "gemma3 full": ("trajectory", "gemma3", (FULL,)),
    "gemma3 LoRA": ("trajectory", "gemma3", (LORA,)),
    "a rank without prompts": ("trajectory", "llama", (FULL, "training.prompts_per_step=1")),
    "decoded apart": ("trajectory apart", "qwen3", (FULL, *SPLIT)),
    "sampled": ("sampled", "llama", (LORA,)),
    "sampled apart": ("sampled apart", "llama", (LORA,)),
    "sampled apart, one rank idle": ("sampled apart", "gemma3", (LORA, "training.prompts_per_step=1")),
    **{
        f"out of memory in {place}, {tuning[14:18]}": (f"trajectory, out of memory in {place}", "llama", (tuning,))
        for place in sharded_ranks.PLACES
        if hasattr(FSDPModule, "reset_iter_state")  # torch >= 2.13; before, such a run ends in words
        for tuning in (FULL, LORA)[: 1 + (place == "backward")]
    },
    "with probes": ("trajectory", "llama", (LORA, PROBES)),
    "with probes, apart": ("trajectory apart", "llama", (FULL, PROBES)),
    "audited": ("audited", "llama", (FULL,)),
    "audited LoRA": ("audited", "gemma3", (LORA,)),
    "evaluated": ("evaluated", "llama", (LORA,)),
    "evaluated apart": ("evaluated apart", "llama", (LORA,)),
    "diagnosed": ("diagnosed", "llama", (LORA,)),
    "diagnosed apart": ("diagnosed apart", "gemma3", (LORA,)),
    "preflown": ("preflown", "llama", (FULL,)),
    "preflown apart": ("preflown apart", "llama", (LORA,)),
    "explained apart": ("explained apart", "llama", (LORA,)),
    "half precision": ("trajectory", "qwen2", (FULL, HALF, "optimizer.lr=1e-6")),
    "memory": ("memory", "qwen2", (FULL,)),
}
FOUR = {
    "qwen3 over four": ("trajectory", "qwen3", (FULL,)),
    "two copies over two": ("trajectory", "gemma3", (FULL, "sharding.size=2")),
    "two copies over two, untied": ("trajectory", "qwen2", (FULL, "sharding.replicate=2", *SPLIT)),
    "two copies over two, LoRA": ("trajectory", "llama", (LORA, "sharding.size=2")),
    "memory": ("memory", "qwen2", (FULL,)),
    "memory of two copies": ("memory", "qwen2", (FULL, "sharding.size=2")),
}


@dataclass(frozen=True, slots=True)
class World:
    """What ranks found, by scenario, and the configurations of their scenarios."""

    folder: Path
    scenarios: dict[str, tuple[str, str, tuple[str, ...]]]
    config: Callable[[str], Path]

    def ranks(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.folder / f"{name}.pt", weights_only=False)
        return found

    def alone(self, name: str) -> dict[str, Any]:
        """The same in this process, with whole models."""
        work, architecture, overrides = self.scenarios[name]
        own = [override for override in overrides if not override.startswith(("sharding", "training.micro_batch"))]
        return sharded_ranks.run(work.removesuffix(" apart"), load(self.config(architecture), [*SHARED, *own]))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run file of an architecture's pair, written once."""
    folder = tmp_path_factory.mktemp("pairs")
    task = folder / "task.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"w{i} w3", "answer": f"w{i}"}) + "\n" for i in range(5)))

    def written(architecture: Any) -> Path:
        file = folder / architecture / "run.yaml"
        if not file.exists():
            own = f"task: {{type: jsonl, path: {task}}}"
            overrides = (
                f"evaluation={{{own}, samples: 2, max_tokens: 8}}",
                f"diagnosis={{{own}, max_tokens: 12, grid: [2, 4], batch_size: 4}}",
                f"output.dir={folder / architecture / 'run'}",
            )
            made = make_config(folder / architecture, *overrides, architecture=architecture)
            file.write_text(resolved(made))
            if architecture == "llama":  # the run that is explained
                distill(made)
        return file

    return written


def launched(
    folder: Path, ranks: int, scenarios: dict[str, tuple[str, str, tuple[str, ...]]], config: Callable[[str], Path]
) -> World:
    file = folder / "scenarios.json"
    rows = [
        {
            "name": name,
            "work": work,
            "config": str(config(architecture)),
            "overrides": ["sharding.type=fsdp", *SHARED, *overrides],
        }
        for name, (work, architecture, overrides) in scenarios.items()
    ]
    file.write_text(json.dumps(rows))
    torchrun(ranks, [sharded_ranks.__file__, str(file)])
    return World(folder, scenarios, config)


def torchrun(ranks: int, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, config: Callable[[str], Path]) -> World:
    return launched(tmp_path_factory.mktemp("two"), 2, TWO, config)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, config: Callable[[str], Path]) -> World:
    return launched(tmp_path_factory.mktemp("four"), 4, FOUR, config)


def named(scenarios: dict[str, tuple[str, str, tuple[str, ...]]], work: str) -> list[str]:
    return [name for name, (kind, *_) in scenarios.items() if kind.startswith(work)]


@pytest.mark.parametrize("name", [name for name in named(TWO, "trajectory") if name != "half precision"])
def test_two_ranks_train_as_one(two: World, name: str) -> None:
    assert_same_training(two.ranks(name), two.alone(name))


def test_weights_that_are_trained_are_kept_in_float32(two: World) -> None:
    """Layers compute in bfloat16, and steps that it cannot add move the weights all the same."""
    found, whole = two.ranks("half precision"), two.alone("half precision")
    start = load_file(two.config("qwen2").parent / "student" / "model.safetensors")
    for a, b in zip(found["steps"], whole["steps"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
    for name, tensor in found["weights"].items():
        assert tensor.dtype == torch.float32
        assert 0 < float((tensor - start[name].bfloat16().float()).abs().max()) < 4e-6
        assert whole["weights"][name].dtype == torch.bfloat16


@pytest.mark.parametrize("name", named(FOUR, "trajectory"))
def test_four_ranks_train_as_one(four: World, name: str) -> None:
    assert_same_training(four.ranks(name), four.alone(name))


def assert_same_training(found: dict[str, Any], straight: dict[str, Any]) -> None:
    for a, b in zip(found["steps"], straight["steps"], strict=True):
        for name in ("tokens", "probe_tokens", "probe_continuations", "probe_length_mean"):
            assert a[name] == b[name]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-6)  # float32 sums in another order
    assert found["weights"].keys() == straight["weights"].keys()
    for name, tensor in straight["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", named(TWO, "sampled"))
def test_divided_students_sample_the_same_tokens(two: World, name: str) -> None:
    found = two.ranks(name)
    assert found["divided"]
    assert found["rollouts"] == two.alone(name)["rollouts"]


@pytest.mark.parametrize("name", [*named(TWO, "evaluated"), *named(TWO, "diagnosed"), *named(TWO, "explained")])
def test_divided_models_are_measured_alike(two: World, name: str) -> None:
    assert_close(two.ranks(name), two.alone(name))


@pytest.mark.parametrize("name", named(TWO, "audited"))
def test_gradients_are_the_same(two: World, name: str) -> None:
    for found, own in zip(two.ranks(name)["gradients"], two.alone(name)["gradients"], strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


def test_preflight_looks_at_divided_models(two: World) -> None:
    assert two.ranks("preflown") == two.alone("preflown")
    apart = dict(two.ranks("preflown apart")["findings"])
    assert apart["sharding"] == "note"
    assert apart["vocabulary"] == "ok"
    assert "self-test" not in apart


def assert_close(a: Any, b: Any) -> None:
    """Equal but for rounding."""
    match a:
        case dict():
            assert a.keys() == b.keys()
            for key in a:
                assert_close(a[key], b[key])
        case list() | tuple():
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                assert_close(x, y)
        case float():
            assert a == pytest.approx(b, rel=1e-4, abs=2e-4)
        case _:
            assert a == b


def test_a_rank_holds_its_share(two: World, four: World) -> None:
    """Weights, gradients and AdamW's averages fall as one over the ranks that a copy is divided over."""
    whole = two.alone("memory")["ranks"][0]
    for world, name, size in ((two, "memory", 2), (four, "memory", 4), (four, "memory of two copies", 2)):
        for rank in world.ranks(name)["ranks"]:
            for kind, held in rank.items():
                assert whole[kind] / size <= held * 1.02
                assert held <= whole[kind] / size * 1.06
