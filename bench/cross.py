"""What a teacher with another tokenizer costs: workload C7, a student of 49,152 ids and a teacher of 151,936.

    OMP_NUM_THREADS=1 python -m bench.cross --rounds 5 --out docs/results/cross-tokenizer-cost.json

The same two models take turns as three pairs: `cross` (each its own tokenizer, `divergence.alignment: coarse`), `same`
(one tokenizer, both heads cut to its 49,152 ids, so the teacher's head is a third of what it is in `cross`) and `wide`
(one tokenizer of 151,936 ids; the student's head is then three times as large, too). Prompts and rollouts are words, of
which every third of the teacher's is the student's; the others begin with one. `--memory NAME` prints how far the peak
of one pair's resident memory rises above its loaded models.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.step import resident
from bench.workloads import Workload, small, tokenizer
from headstart.assemble.pair import Pair
from headstart.config.loader import parse
from headstart.horizon.fixed import FixedHorizon
from headstart.records import Prompt
from headstart.rollout.engine import InProcessEngine
from headstart.tracking import FanTracker
from headstart.train.optimizer import make_optimizer
from headstart.train.parts import Parts
from headstart.train.step import train_step

OURS, THEIRS = 49_152, 151_936
WORK = Workload("C7", small(256), small(512), OURS)
PAIRS = {"cross": (OURS, THEIRS), "same": (OURS, OURS), "wide": (THEIRS, THEIRS)}
"""Ids of the student's and of the teacher's tokenizer."""
PHASES = ("rollout", "teacher", "student", "optimizer")


def parts(name: str) -> Parts:
    """One pair, assembled as `headstart distill` does it."""
    ours, theirs = PAIRS[name]
    student = WORK.student.model(ours, 1, "cpu", torch.float32)
    teacher = WORK.teacher.model(THEIRS, 2, "cpu", torch.float32)
    words = tokenizer(ours)
    config = parse(
        {
            "student": {"path": "student"},
            "teacher": {"path": "teacher"},
            "prompts": {"source": "prompts.jsonl", "chat": False},
            "tuning": {"type": "full"},
            "rollout": {"temperature": 1.0, "top_p": 1.0},
            "horizon": {"type": "fixed", "tokens": WORK.tokens},
            "optimizer": {"lr": 1e-6},
            "training": {"prompts_per_step": WORK.prompts, "steps": 1000, "device": "cpu"},
        }
    )
    pair = Pair(student, teacher, words, words if theirs == ours else tokenizer(theirs), config=config)
    ids = [tuple(words(text)["input_ids"]) for text in WORK.texts]
    return Parts(
        config=config,
        runtime=pair.runtime,
        folder=None,
        prompts=tuple(Prompt(i, str(i), p, p) for i, p in enumerate(ids)),
        vocabulary=pair.vocabulary,
        student=pair.student,
        teacher=pair.scorer(),
        engine=InProcessEngine(pair.student, ()),
        horizon=FixedHorizon(WORK.tokens),
        optimizer=make_optimizer(pair.student.trainable().values(), config),
        evaluator=None,
        tracker=FanTracker([]),
        decode=lambda ids: [],
        export=lambda model, path, tokens, report: None,
    )


def memory(name: str) -> float:
    """GiB that three steps need beyond the loaded models."""
    made = parts(name)
    gc.collect()
    before = resident("VmRSS")
    for step in range(3):
        train_step(made, step, 0)
    return (resident("VmHWM") - before) / 2**30


def measure(rounds: int) -> dict[str, Any]:
    everybody = {name: parts(name) for name in PAIRS}
    cpu: dict[str, list[float]] = {name: [] for name in PAIRS}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in PAIRS}
    scored = 0.0
    for turn in range(rounds + 1):
        for name, made in everybody.items():
            gc.collect()
            start = time.process_time()
            metrics = train_step(made, turn, 0)[0].metrics
            if turn:
                cpu[name].append(time.process_time() - start)
                phases[name].append(
                    {p: metrics[f"seconds_{p}"] for p in ("rollout", "teacher", "student", "optimizer")}
                )
            scored = metrics.get("share_scored", scored)
    return {
        "cpu_seconds": cpu,
        "median": {name: statistics.median(values) for name, values in cpu.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(cpu["cross"], cpu[name], strict=True))
            for name in ("same", "wide")
        },
        "phases": {
            name: {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
            for name, runs in phases.items()
        },
        "share_scored": scored,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", choices=PAIRS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(memory(arguments.memory))
        return
    result = measure(arguments.rounds)
    each = ([sys.executable, "-m", "bench.cross", "--memory", name] for name in PAIRS)
    found = (float(subprocess.run(c, check=True, capture_output=True, text=True).stdout) for c in each)
    result["memory_gib"] = dict(zip(PAIRS, found, strict=True))
    result["torch"] = torch.__version__
    print(json.dumps({k: v for k, v in result.items() if k != "cpu_seconds"}, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
