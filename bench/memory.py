"""The plan's bytes beside those of a real step of one process on a CPU, for models of 90 to 220 M parameters.

    OMP_NUM_THREADS=1 python -m bench.memory

Weights, gradients and optimizer states are compared with the tensors that are there after a step; the peak with what
the process's resident set grew by, from before the models were loaded.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

from headstart.models.memory import GIB

CASES: dict[str, tuple[dict[str, int], dict[str, int], str]] = {
    "qwen3 88M full": ({"hidden": 768, "layers": 12}, {"hidden": 768, "layers": 12}, "tuning.type=full"),
    "qwen3 88M LoRA, teacher 218M": ({"hidden": 768, "layers": 12}, {"hidden": 1280, "layers": 12}, "tuning.type=lora"),
    "qwen3 218M full, checkpointing": (
        {"hidden": 1280, "layers": 12},
        {"hidden": 768, "layers": 12},
        "tuning={type: full, gradient_checkpointing: true}",
    ),
}
WORDS = 32_000
WORD_60 = [f"w{i}" for i in range(60)]


def measure(case: str, queue: Any) -> None:
    """One case in a process of its own: (plan, measured) of each kind, in GiB."""
    import torch

    from headstart.checks.plan import Outlines, World
    from headstart.config import loader
    from headstart.distillation.run import build
    from headstart.ranks.runtime import Runtime
    from headstart.testing import random_model, word_tokenizer, write_checkpoint
    from headstart.train.folder import RunFolder
    from headstart.train.step import train_step

    student, teacher, tuning = CASES[case]
    with tempfile.TemporaryDirectory() as text:
        folder, tokenizer = Path(text), word_tokenizer([f"w{i}" for i in range(WORDS)])
        for name, size in (("student", student), ("teacher", teacher)):
            write_checkpoint(folder / name, random_model("qwen3", len(tokenizer), scale=0.02, **size), tokenizer)
        (folder / "prompts.jsonl").write_text(16 * (json.dumps({"prompt": " ".join(WORD_60)}) + "\n"))
        base = {
            "student": {"path": str(folder / "student")},
            "teacher": {"path": str(folder / "teacher")},
            "prompts": {"source": str(folder / "prompts.jsonl")},
            "horizon": {"type": "fixed", "tokens": 64},
            "training": {"device": "cpu", "prompts_per_step": 8, "steps": 2},
        }
        config = loader.parse(base, [tuning])
        before = resident()
        parts = build(config, Runtime.start("cpu"), lambda: RunFolder.create(folder / "run", config))
        longest = max(len(p.token_ids) for p in parts.prompts)
        plan = Outlines(config, "cpu").plan(World(gib=16.0), longest).memory
        for step in (0, 1):
            train_step(parts, step, 0)
        peak = parts.runtime.peak_memory_gib() - before
        trained = list(parts.student.trainable().values())
        models = [parts.student.model, parts.teacher.model.model]  # type: ignore[union-attr]
        states = [v for s in parts.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
        weights = sum(t.nbytes for m in models for t in (*m.parameters(), *m.buffers())) / GIB
        assert plan.items is not None
        queue.put(
            {
                "weights": (plan.weights, weights),
                "gradients": (plan.items.gradients, sum(p.nbytes for p in trained) / GIB),
                "optimizer": (plan.states, sum(v.nbytes for v in states) / GIB),
                "peak": (plan.peak, peak),
            }
        )


def resident() -> float:
    """GiB of this process now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 2**20


def main() -> None:
    print("| case | " + " | ".join(("weights", "gradients", "optimizer", "peak over start")) + " | plan / measured |")
    print("|---|---|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    for case in CASES:
        queue = spawn.Queue()
        process = spawn.Process(target=measure, args=(case, queue))
        process.start()
        found = queue.get(timeout=900)
        process.join()
        cells = [f"{plan:.3f}, {real:.3f}" for plan, real in found.values()]
        plan, real = found["peak"]
        print(f"| {case} | {' | '.join(cells)} | {plan / real:.2f} |", flush=True)


if __name__ == "__main__":
    main()
