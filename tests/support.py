"""Small worlds for tests: a random pair on disk, a prompt file, and a configuration that ties them together."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from headstart.assemble.pair import Pair
from headstart.config import loader
from headstart.config.schema import Config
from headstart.distillation.run import build
from headstart.ranks.runtime import Runtime
from headstart.records import Rollout, Sampling
from headstart.rollout import engine as engine_module
from headstart.rollout.engine import InProcessEngine
from headstart.streams import uniforms
from headstart.testing import WORDS, Architecture, byte_tokenizer, random_model, word_tokenizer, write_checkpoint
from headstart.train.folder import RunFolder
from headstart.train.parts import Parts


def beside_progress(stderr: str) -> str:
    """What a command says on stderr beside what it is doing."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not re.match(r"\[\d+:\d\d", line))


def write_pair(folder: Path, architecture: Architecture = "llama", **teacher: Any) -> tuple[Path, Path]:
    """A random student and a random teacher of `architecture`; keyword arguments go to the teacher's `random_model`."""
    make_tokenizer = byte_tokenizer if architecture == "qwen2" else word_tokenizer
    tokenizer = make_tokenizer(system_role=architecture not in ("gemma2", "gemma3"))
    student = write_checkpoint(folder / "student", random_model(architecture, len(tokenizer), seed=1), tokenizer)
    options = {"hidden": 48, "seed": 2, "vocabulary": len(tokenizer), **teacher}
    return student, write_checkpoint(folder / "teacher", random_model(architecture, **options), tokenizer)


def write_prompts(folder: Path, count: int = 24) -> Path:
    """Prompts of one to six words."""
    path = folder / "prompts.jsonl"
    lines = [{"prompt": " ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(1 + i % 6))} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_config(folder: Path, *overrides: str, architecture: Architecture = "llama", **teacher: Any) -> Config:
    """A quick full fine-tuning run in `folder`: 4 steps of 6 prompts, horizon 6, no dropout, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "student").exists():
        write_pair(folder, architecture, **teacher)
        write_prompts(folder)
    base = {
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "tuning": {"type": "full"},
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "rollout": {"temperature": 1.0, "top_p": 1.0},
        "horizon": {"type": "fixed", "tokens": 6},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 4, "prompts_per_step": 6, "device": "cpu"},
        "checkpoint": {"every": 1},
    }
    return loader.parse(base, overrides)


def make_parts(folder: Path, config: Config) -> Parts:
    """`config` assembled, with its run folder in `folder`."""
    return build(config, Runtime.start("cpu"), lambda: RunFolder.create(folder, config))


GOOD, SAFE = (0.87, 1.15), (0.9, 1.35)
"""Bounds of the memory formula over what torch allocates: where the fast decoder computes, and elsewhere."""


def allocated(work: Callable[[], object]) -> int:
    """Largest number of bytes that were allocated by `work` and alive together, as torch's own allocator reports."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results: Any = profiled.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def drawn_logprobs(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Rollout], tuple[int, str, int], int], Tensor]:
    """From now on engines in this process are watched while they draw. The function that is returned gives the
    log-probability `[M]` that every token of rollouts of a key and a horizon had when it was drawn."""
    seen: dict[float, float] = {}
    draw = engine_module.sample_tokens

    def spy(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
        token_B = draw(logits_BV, uniform_B, sampling)
        logprob_B = logits_BV.log_softmax(-1).gather(-1, token_B[:, None])[:, 0]
        for uniform, logprob in zip(uniform_B.tolist(), logprob_B.tolist(), strict=True):
            seen.setdefault(uniform, logprob)  # a uniform number names (row, position); rows that are done draw again
        return token_B

    monkeypatch.setattr(engine_module, "sample_tokens", spy)

    def drawn(rollouts: list[Rollout], key: tuple[int, str, int], horizon: int) -> Tensor:
        numbers = [uniforms(key, [(r.prompt.index, r.sample_index)], 0, horizon)[0] for r in rollouts]
        pairs = zip(rollouts, numbers, strict=True)
        return torch.tensor([seen[float(u[t])] for r, u in pairs for t in range(len(r.completion_ids))])

    return drawn


def world(folder: Path, architecture: Architecture, words: int, *overrides: str) -> tuple[Parts, Pair]:
    """A pair of 3 layers whose rollouts never stop before their horizon, as parts of a run and as a pair."""
    tokenizer = word_tokenizer([f"w{i}" for i in range(words)], system_role=not architecture.startswith("gemma"))
    for name, hidden, seed in (("student", 64, 1), ("teacher", 96, 2)):
        model = random_model(architecture, len(tokenizer), hidden=hidden, layers=3, seed=seed)
        write_checkpoint(folder / name, model, tokenizer)
    write_prompts(folder)
    config = make_config(folder, "training.prompts_per_step=8", *overrides)
    parts = make_parts(folder / "run", config)
    parts = replace(parts, engine=InProcessEngine(parts.student, ()))
    teacher: Any = parts.teacher
    return parts, Pair(
        parts.student, teacher.model, tokenizer, config=config, runtime=parts.runtime, vocabulary=parts.vocabulary
    )
