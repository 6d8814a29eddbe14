"""How long one whole training step takes, beside the trainers that people use instead.

    OMP_NUM_THREADS=1 python -m bench.step C1 C2 C3 --out docs/results/step-cpu.json

All contenders start from the same weights and prompts, live in one process and take turns (A B C A B C ...), the first
rounds are dropped, and what is told is the median of the ratios within a round: a machine that slows down slows all of
them. Completions have one fixed length, so that everybody does the same work. Before any timing, the gradient of each
on the same completions is compared with plain transformers in float64. `--memory` measures, in a fresh process per
contender, how far the peak of resident memory rises above what the loaded models hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.contenders import CONTENDERS, Contender, reference_gradient
from bench.workloads import WORKLOADS, Workload, tokenizer

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
WARM_UP = 2


def models(work: Workload) -> tuple[Any, Any]:
    student = work.student.model(work.vocabulary, 1, work.device, work.dtype)
    return student, work.teacher.model(work.vocabulary, 2, work.device, work.dtype)


def make(name: str, work: Workload) -> Contender:
    contender: Contender = CONTENDERS[name](work, *models(work))
    return contender


def synchronize(work: Workload) -> None:
    if work.device == "cuda":
        torch.cuda.synchronize()


def timed(contender: Contender, work: Workload, step: int) -> tuple[float, dict[str, float]]:
    synchronize(work)
    start = time.perf_counter()
    phases = contender.step(step)
    synchronize(work)
    return time.perf_counter() - start, phases


def gradient_errors(contenders: dict[str, Contender], work: Workload) -> dict[str, float]:
    """Relative error of each gradient against float64, on four short completions (LoRA has no common parameters)."""
    if work.lora or work.device == "cuda":
        return {}
    words = tokenizer(work.vocabulary)
    prompts = [tuple(words(text)["input_ids"]) for text in work.texts[:4]]
    completions = [tuple(p[:length]) for p, length in zip(prompts, (24, 17, 9, 30), strict=True)]
    # `trajectory` and mean-over-tokens agree only for equal lengths.
    completions = [c[:9] for c in completions]
    exact = reference_gradient(work, *models(work), prompts, completions)
    return {
        name: float((contender.gradient(prompts, completions) - exact).norm() / exact.norm())
        for name, contender in contenders.items()
    }


def measure(work: Workload, names: list[str], rounds: int) -> dict[str, Any]:
    contenders = {name: make(name, work) for name in names}
    errors = gradient_errors(contenders, work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    phases: list[dict[str, float]] = []
    for turn in range(rounds + WARM_UP):
        for name, contender in contenders.items():
            taken, parts = timed(contender, work, turn)
            if turn >= WARM_UP:
                seconds[name].append(taken)
                if name == "headstart":
                    phases.append(parts)
    return {
        "seconds": seconds,
        "median": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": {name: ratios(seconds, name) for name in names if name != "headstart" and "headstart" in names},
        "phases": {key: statistics.median(p[key] for p in phases) for key in phases[0]} if phases else {},
        "gradient_error": errors,
    }


def ratios(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    found = [theirs / ours for theirs, ours in zip(seconds[name], seconds["headstart"], strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def memory(name: str, work: Workload) -> float:
    """GiB that three steps need beyond the loaded models: peak resident memory on a CPU, peak allocated on a GPU."""
    contender = make(name, work)
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    else:
        base = resident("VmRSS")
    for step in range(3):
        contender.step(step)
    if work.device == "cuda":
        return (torch.cuda.max_memory_allocated() - base) / 2**30
    return (resident("VmHWM") - base) / 2**30


def resident(name: str) -> int:
    """Bytes of resident memory: now (VmRSS), or the most since the program began (VmHWM). getrusage would count what
    the parent process held when it started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def memory_apart(name: str, work: Workload) -> float:
    command = [sys.executable, "-m", "bench.step", work.name, "--contenders", name, "--memory-here"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def environment() -> dict[str, Any]:
    import transformers

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    try:
        import trl

        version = trl.__version__
    except ImportError:
        version = None
    return {
        "command": " ".join(["python", "-m", "bench.step", *sys.argv[1:]]),
        "commit": git,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "malloc": {name: os.environ[name] for name in MALLOC if name in os.environ},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": version,
    }


def show(work: Workload, result: dict[str, Any]) -> None:
    for name, median in result["median"].items():
        ratio = result["ratio"].get(name)
        told = f"{ratio['median']:.2f}x [{ratio['min']:.2f}, {ratio['max']:.2f}]" if ratio else ""
        error = result["gradient_error"].get(name)
        gib = result.get("memory_gib", {}).get(name)
        print(
            f"{work.name:8} {name:10} {median:8.3f} s  {told:22}"
            + (f"  gradient error {error:.1e}" if error is not None else "")
            + (f"  memory over base {gib:.2f} GiB" if gib is not None else "")
        )
    print(f"{work.name:8} phases     " + ", ".join(f"{k} {v:.3f}" for k, v in result["phases"].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["C1"], choices=list(WORKLOADS), help="default C1")
    parser.add_argument("--contenders", nargs="+", default=["headstart", "trl"], choices=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--memory", action="store_true", help="also measure memory, each contender in its own process")
    parser.add_argument("--memory-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where the raw figures go, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.memory_here:
        print(memory(options.contenders[0], WORKLOADS[options.workloads[0]]))
        return
    record: dict[str, Any] = {"environment": environment(), "workloads": {}}
    for name in options.workloads:
        work = WORKLOADS[name]
        result = measure(work, options.contenders, options.rounds)
        if options.memory:
            result["memory_gib"] = {who: memory_apart(who, work) for who in options.contenders}
        record["workloads"][name] = result
        show(work, result)
        if options.out is not None:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
