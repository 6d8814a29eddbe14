"""What a GPU changes: bfloat16 weights, device memory, captured decoding steps. Runs where CUDA is present."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.config.schema import LoraTuning
from headstart.distillation.run import build, distill
from headstart.models.causal import CausalModel
from headstart.models.decoder import Prefill
from headstart.models.lora import add_lora
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout.engine import InProcessEngine
from headstart.rollout.sampling import draw_tokens, sample_tokens
from headstart.rollout.static import CudaCapture, StaticRows
from headstart.teacher.local import LocalTeacher
from headstart.testing import Architecture, random_model
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


FAMILIES: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
PROMPTS = [Prompt(i, str(i), tuple(range(2, 5 + 7 * (i % 5))), ()) for i in range(12)]


def on_gpu(architecture: Architecture, dtype: torch.dtype, tuning: str = "full") -> CausalModel:
    made = random_model(architecture, 300, hidden=64, scale=0.2)
    if tuning == "lora":
        made = add_lora(made, LoraTuning(r=4), 0)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)  # zero at first, which would hide a forgotten adapter
    cut = CausalModel(made.to("cuda", dtype), 300, 0)
    cut.use_fast_paths()
    return cut


def rollouts(engine: InProcessEngine, **settings: Any) -> list[Rollout]:
    asked: dict[str, Any] = {"samples": 2, "max_tokens": 40, "sampling": Sampling(0.8, 0.95), "key": (0, "test", 0)}
    return engine.generate(PROMPTS, **asked | settings)


class Uncaptured(CudaCapture):
    """Steps run as they are, at the same places of the same memory."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_graphs_draw_what_the_same_steps_draw_uncaptured(
    architecture: Architecture, tuning: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = on_gpu(architecture, dtype, tuning)
    uncaptured = InProcessEngine(cut, (1, 2, 3), Uncaptured(cut.device))
    captured = InProcessEngine(cut, (1, 2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a capture that fails warns
        for settings in ({}, {"batch_size": 9}, {"sampling": Sampling(1.0, 1.0)}, {"sampling": Sampling(0.0)}):
            assert rollouts(captured, **settings) == rollouts(uncaptured, **settings)
    assert isinstance(captured._static, StaticRows)
    assert captured._static._replays
    if dtype == torch.float32:  # bfloat16 rounds apart where attention is summed over another number of places
        monkeypatch.setattr(StaticRows, "suits", lambda _: False)
        assert rollouts(InProcessEngine(cut, (1, 2, 3))) == rollouts(captured)


def test_graphs_see_weights_that_moved_in_place() -> None:
    cut = on_gpu("qwen3", torch.bfloat16)
    engine = InProcessEngine(cut, (1, 2, 3))
    before = rollouts(engine)
    with torch.no_grad():
        for parameter in cut.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert before != rollouts(engine) == rollouts(InProcessEngine(cut, (1, 2, 3)))


def test_the_teacher_encodes_prompts_beside_the_decoding() -> None:
    student, teacher = on_gpu("qwen3", torch.bfloat16), LocalTeacher(on_gpu("llama", torch.bfloat16))
    engine = InProcessEngine(student, (1, 2, 3))
    found = [replace(r, prompt=replace(r.prompt, teacher_token_ids=r.prompt.token_ids)) for r in rollouts(engine)]
    plain = teacher.score(found).logits(slice(None))
    for _ in range(3):
        made = teacher.prefill([r.prompt for r in found])
        rollouts(engine)
        assert torch.equal(teacher.score(found, made).logits(slice(None)), plain)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_students_prefill_serves_sampling_and_training(architecture: Architecture, tuning: str) -> None:
    cut = on_gpu(architecture, torch.float32, tuning)
    cut.model.eval()
    found = rollouts(InProcessEngine(cut, (1, 2, 3)))
    batch, trained = cut.batch(found, "student"), list(cut.backbone.parameters())
    trained = [parameter for parameter in trained if parameter.requires_grad]
    upstream = torch.randn(len(batch.tokens_M), 64, device="cuda")

    def gradient(prefill: Prefill | None = None) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((cut.completion_hidden(batch, prefill) * upstream).sum(), trained)

    engine = InProcessEngine(cut, (1, 2, 3))
    made = engine.prefill([r.prompt for r in found])
    assert rollouts(engine, prefill=made) == found
    shared = gradient(made)
    alone = gradient()
    cut.decoder = None  # the model's own forward
    for a, b, c in zip(shared, alone, gradient(), strict=True):
        assert (a - b).norm() <= 1e-4 * c.norm()
        assert (a - c).norm() <= 1e-3 * c.norm()


def test_the_first_rollouts_are_there_within_seconds() -> None:
    cut = on_gpu("qwen3", torch.bfloat16)
    start = time.perf_counter()
    rollouts(InProcessEngine(cut, (1, 2, 3)))
    assert time.perf_counter() - start < 20


def test_a_step_that_waits_for_the_device_runs_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = on_gpu("llama", torch.float32)
    expected = rollouts(InProcessEngine(cut, (1, 2, 3)))
    head = cut.head
    monkeypatch.setattr(cut, "head", lambda x: head(x) * (1.0 if bool(x.isfinite().all()) else 2.0))
    engine = InProcessEngine(cut, (1, 2, 3))
    with pytest.warns(UserWarning, match="uncaptured"):
        assert rollouts(engine) == expected
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert rollouts(engine, batch_size=9) == expected


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 1.0), Sampling(0.7, 0.9, 50), Sampling(0.0)])
def test_a_draw_on_the_gpu_is_the_draw_on_the_cpu(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 151_936, generator=generator) * torch.linspace(0.02, 4.0, 16)[:, None]
    uniform = torch.rand(16, generator=generator, dtype=torch.float64)
    expected = sample_tokens(logits, uniform, sampling)
    token, _ = draw_tokens(logits.cuda(), uniform.cuda(), sampling, complete=True)
    assert token.tolist() == expected.tolist()
    token, has = draw_tokens(logits.cuda(), uniform.cuda(), sampling, complete=False)
    assert token[has].tolist() == expected[has.cpu()].tolist()


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
