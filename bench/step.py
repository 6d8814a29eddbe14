"""How long one whole training step takes, beside the trainers that people use instead, and beside the machine's floor.

    OMP_NUM_THREADS=1 python -m bench.step C1 C2 C3 --malloc both --memory --out docs/results/step-cpu.json

All contenders start from the same weights and prompts, live in one process and take turns (A B C A B C ...), the first
rounds are dropped, and what is told is the median of the ratios within a round: a machine that slows down slows all of
them. Completions have one fixed length, so that everybody does the same work. Before any timing, the gradient of each
on the same completions is compared with plain transformers in float64. `--memory` measures, in a fresh process per
contender, how far the peak of resident memory rises above what the loaded models hold. C5 is a workload of its own
(bench/accuracy.py). A picture is drawn beside the JSON. Who does not run here is listed with the reason.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import accuracy, cost, picture
from bench.contenders import NAMES, Contender, make, reference_gradient
from bench.workloads import WORKLOADS, Workload, tokenizer

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
WARM_UP = 2


def sharing(model: Any) -> Any:
    """A model of its own on the same weights: teachers are frozen, and large."""
    return copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})


def contenders(work: Workload, names: list[str]) -> tuple[dict[str, Contender], dict[str, float], dict[str, str]]:
    """Everybody on equal weights; the relative error of each one's gradient on four completions; why those who are left
    out are."""
    words = tokenizer(work.vocabulary)
    prompts = [tuple(words(text)["input_ids"]) for text in work.texts[:4]]
    completions = [p[:9] for p in prompts]  # means per token and per rollout agree only for equal lengths
    # First, because on a GPU the reference's models are the largest and must be gone before the others come.
    exact, adapters = reference_gradient(work, *work.models(), prompts, completions)
    if work.device == "cuda":
        torch.cuda.empty_cache()
    student, teacher = work.models()
    found, errors, absent = {}, {}, {}
    for name in names:
        try:
            contender = make(name, work, copy.deepcopy(student), sharing(teacher))
            adopt(contender.model, adapters)
            errors[name] = float((contender.gradient(prompts, completions) - exact).norm() / exact.norm())
            found[name] = contender
        except Exception as problem:
            absent[name] = told(problem)
    return found, errors, absent


def told(problem: Exception) -> str:
    lines = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"


@torch.no_grad()
def adopt(model: Any, adapters: list[Tensor]) -> None:
    """Give a model the reference's LoRA weights (none: all weights are trained and equal already)."""
    if adapters:
        for own, theirs in zip((p for p in model.parameters() if p.requires_grad), adapters, strict=True):
            own.copy_(theirs)


def timed(contender: Contender, work: Workload, step: int) -> dict[str, Any]:
    """One step: wall seconds, CPU seconds of the process, wall seconds by phase."""
    gc.collect()
    cost.synchronize(work.device)
    wall, cpu = time.perf_counter(), time.process_time()
    phases = contender.step(step)
    cost.synchronize(work.device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    known = {name: phases.get(name, 0.0) for name in ("rollout", "teacher", "optimizer")}
    return {"seconds": wall, "cpu_seconds": cpu, "phases": known | {"student": wall - sum(known.values())}}


def measure(work: Workload, names: list[str], rounds: int) -> dict[str, Any]:
    everybody, errors, absent = contenders(work, names)
    print(f"{work.name:8} gradient errors: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()), flush=True)
    before = cost.measured_rates(work)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in everybody}
    for turn in range(rounds + WARM_UP):
        for name in list(runs):
            try:
                run = timed(everybody[name], work, turn)
            except Exception as problem:  # out of memory, usually: the others go on
                absent[name] = told(problem)
                del runs[name], everybody[name]
                continue
            if turn >= WARM_UP:
                runs[name].append(run)
    after = cost.measured_rates(work)
    rates = cost.Rates(max(before.flops, after.flops), max(before.bytes, after.bytes))
    return summary(runs) | {
        "gradient_error": errors,
        "unavailable": absent,
        "rates": {"gflops": rates.flops / 1e9, "copied_gb_per_s": rates.bytes / 1e9},
        "cost": {name: asdict(c) for name, c in cost.costs(work, work.lengths(0)).items()},
        "floor": cost.floor(work, work.lengths(0), rates),
    }


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    cpu = {name: [run["cpu_seconds"] for run in found] for name, found in runs.items()}
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "median": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": ratios(seconds),
        "ratio_in_cpu_seconds": ratios(cpu),
        "phases": {
            name: {phase: statistics.median(run["phases"][phase] for run in found) for phase in found[0]["phases"]}
            for name, found in runs.items()
        },
    }


def ratios(seconds: dict[str, list[float]], base: str = "headstart") -> dict[str, dict[str, float]]:
    """Everybody else's seconds over `base`'s, round by round."""
    found = {}
    for name, values in seconds.items():
        if base in seconds and name != base:
            each = [theirs / ours for theirs, ours in zip(values, seconds[base], strict=True)]
            found[name] = {"median": statistics.median(each), "min": min(each), "max": max(each)}
    return found


def memory(name: str, work: Workload) -> float:
    """GiB that three steps need beyond the loaded models: peak resident memory on a CPU, peak allocated on a GPU."""
    contender = make(name, work, *work.models())
    cuda = work.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    for step in range(3):
        contender.step(step)
    return float((torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - base) / 2**30


def resident(name: str) -> int:
    """Bytes of resident memory: now (VmRSS), or the most since the program began (VmHWM). getrusage would count what
    the parent process held when it started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def memory_apart(name: str, work: Workload) -> float | None:
    """`memory` in a process of its own; None where it did not get through."""
    command = [sys.executable, "-m", "bench.step", work.name, "--contenders", name, "--memory-here"]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True)
    versions = {}
    for package in ("torch", "transformers", "trl", "peft", "liger_kernel"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "commit": git.stdout.strip(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "malloc": {name: os.environ[name] for name in MALLOC if name in os.environ},
        **versions,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def table(run: dict[str, Any]) -> str:
    """One malloc setting's results, in Markdown."""
    lines = [
        "| workload | contender | seconds | ratio [min, max] | in CPU seconds | over floor | gradient error | GiB |"
    ]
    lines.append("|" + "---|" * 8)
    for work, result in run["workloads"].items():
        if "arms" in result:
            lines.append(f"| {work} | {accuracy.sentence(result)} |" + " |" * 6)
            continue
        least = sum(result["floor"].values())
        for name, median in result["median"].items():
            wall, cpu = result["ratio"].get(name), result["ratio_in_cpu_seconds"].get(name)
            cells = [work, name, f"{median:.3f}"]
            cells += [f"{r['median']:.2f} [{r['min']:.2f}, {r['max']:.2f}]" if r else "" for r in (wall, cpu)]
            cells += [f"{median / least:.2f}", f"{result['gradient_error'][name]:.1e}"]
            gib = result.get("memory_gib", {}).get(name)
            lines.append("| " + " | ".join([*cells, "" if gib is None else f"{gib:.2f}"]) + " |")
        rates = result["rates"]
        told = f"{rates['gflops']:.0f} GFLOP/s, {rates['copied_gb_per_s']:.1f} GB/s"
        lines.append(f"| {work} | floor | {least:.3f} | {told} |" + " |" * 4)
        lines += [f"| {work} | {name} | not run: {why} |" + " |" * 5 for name, why in result["unavailable"].items()]
    return "\n".join(lines)


def run_here(options: argparse.Namespace) -> dict[str, Any]:
    run: dict[str, Any] = {"environment": environment(), "workloads": {}}
    for name in options.workloads:
        if name == "C5":
            run["workloads"][name] = accuracy.measure(options.seeds)
            continue
        work = WORKLOADS[name]
        result = measure(work, options.contenders, options.rounds)
        if options.memory:
            result["memory_gib"] = {who: memory_apart(who, work) for who in result["median"]}
        run["workloads"][name] = result
    return run


def run_with(variables: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    """This program again, under other environment variables: malloc reads them once, when a process begins."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [sys.executable, "-m", "bench.step", *arguments, "--part", str(part)]
        subprocess.run(command, env={**os.environ, **variables}, check=True)
        run: dict[str, Any] = json.loads(part.read_text())
        return run


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["C1"], choices=[*WORKLOADS, "C5"], help="default C1")
    parser.add_argument("--contenders", nargs="+", default=["headstart", "trl", "engineer"], choices=NAMES)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5, help="of C5")
    parser.add_argument("--malloc", choices=("default", "tuned", "both"), default="default", help="settings of glibc")
    parser.add_argument("--memory", action="store_true", help="also measure memory, each contender in its own process")
    parser.add_argument("--memory-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where the raw figures go, as JSON; the picture goes beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.memory_here:
        print(memory(options.contenders[0], WORKLOADS[options.workloads[0]]))
        return
    if options.part is not None:
        options.part.write_text(json.dumps(run_here(options)))
        return
    settings = {"default": [{}], "tuned": [MALLOC], "both": [{}, MALLOC]}[options.malloc]
    record: dict[str, Any] = {"command": " ".join(["python -m bench.step", *arguments]), "runs": []}
    for variables in settings:
        record["runs"].append(run_with(variables, arguments))
        print(f"\nmalloc: {'tuned' if variables else 'default'}\n\n{table(record['runs'][-1])}\n", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            picture.steps(record, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
