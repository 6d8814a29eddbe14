"""What a GPU changes: bfloat16 weights, device memory, CUDA streams of time. Runs where CUDA is present."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headstart.build import build, distill
from headstart.records import Rollout
from headstart.runtime import Runtime
from headstart.train.folder import RunFolder
from headstart.train.metrics import Clock
from headstart.train.step import backward
from support import make_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "gemma2", "gemma3"])
def test_lora_in_bfloat16_trains_and_reports_device_memory(tmp_path: Path, architecture: str) -> None:
    config = make_config(
        tmp_path,
        "training.device=cuda",
        "training.steps=12",
        "optimizer.lr=0.01",
        "tuning={type: lora, r: 4, dropout: 0.0}",
        architecture=architecture,  # type: ignore[arg-type]
    )
    result = distill(config, out=tmp_path / "run")
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert sum(s["divergence"] for s in steps[-4:]) < sum(s["divergence"] for s in steps[:4])
    assert all(s["loss"] >= 0 for s in steps)
    assert 0 < steps[-1]["peak_memory_gib"] < 8


def test_a_gpu_run_starts_where_a_cpu_run_starts(tmp_path: Path) -> None:
    """The first step of full fine-tuning in float32: same prompts, nearly the same divergence."""
    first = []
    for device in ("cpu", "cuda"):
        overrides = ("training.steps=1", f"training.device={device}", "student.dtype=float32", "teacher.dtype=float32")
        result = distill(make_config(tmp_path, *overrides), out=tmp_path / device)
        first.append(json.loads((result.path / "metrics.jsonl").read_text().splitlines()[0]))
    assert first[0]["prompt_tokens"] == first[1]["prompt_tokens"]
    assert first[0]["divergence"] == pytest.approx(first[1]["divergence"], rel=0.05)


def test_a_step_too_large_for_the_device_is_divided(tmp_path: Path) -> None:
    """Half of what the whole step takes is allowed: it runs out of memory, is divided, and gives the same gradient."""
    config = make_config(tmp_path, "training.device=cuda", "student.dtype=float32", "teacher.dtype=float32")
    parts = build(config, Runtime.start("cuda"), lambda: RunFolder.create(tmp_path / "run", config))
    rollouts = [
        Rollout(replace(parts.prompts[i % 24], index=i), 0, tuple((7 * i + j) % 46 for j in range(800)), False)
        for i in range(32)
    ]

    def gradient(most: int) -> tuple[torch.Tensor, int]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        backward(parts, rollouts[:most], 0, Clock(parts.runtime))
        flat = torch.cat([p.grad.flatten().clone() for p in parts.student.trainable().values() if p.grad is not None])
        return flat, torch.cuda.max_memory_allocated()

    (whole, most), (_, least) = gradient(32), gradient(1)
    assert parts.budget.bytes is not None
    assert parts.budget.bytes > most, "the budget found on an empty device is no limit here"
    try:
        total = torch.cuda.get_device_properties(parts.runtime.device).total_memory
        torch.cuda.set_per_process_memory_fraction((most + least) / 2 / total)
        with pytest.warns(UserWarning, match="ran out of memory"):
            divided, _ = gradient(32)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(divided, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
