"""Small worlds for tests: a random pair on disk, a prompt file, and a configuration that ties them together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headstart.build import build
from headstart.config import loader
from headstart.config.schema import Config
from headstart.runtime import Runtime
from headstart.testing import WORDS, Architecture, byte_tokenizer, random_model, word_tokenizer, write_checkpoint
from headstart.train.folder import RunFolder
from headstart.train.parts import Parts


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
