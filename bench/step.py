"""How long one whole training step takes, beside the trainers that people use instead, and beside the machine's floor.

    OMP_NUM_THREADS=1 python -m bench.step C1 C2 C3 R1s --malloc both --memory --out docs/results/step-cpu.json
    OMP_NUM_THREADS=1 python -m bench.step R1 --student smollm2-135m-instruct --teacher smollm2-135m-instruct

All contenders start from the same weights and prompts, live in one process and take turns (A B C A B C ...), the first
rounds are dropped, and what is told is the median of the ratios within a round: a machine that slows down slows all of
them. On a CPU seconds are CPU seconds of the process (bench.cost.now), so that other work on the machine counts for
nobody; wall seconds stand beside them. Completions have one fixed length, so that everybody does the same work. Before
any timing, the gradient of each on the same completions is compared with plain transformers in float64. A second table
has the seconds of every phase beside the floor of the phase, at the rates of its own products (bench/cost.py).
`--memory` measures, in a fresh process per contender, how far the peak of resident memory rises above what the loaded
models hold. C5 is a workload of its own (bench/accuracy.py). A picture is drawn beside the JSON. Who does not run here
is listed with the reason, and so is what needs folders that are not given.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import json
import math
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
from bench.workloads import FROM_FOLDERS, WORKLOADS, Checkpoints, Workload, from_folders

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
WARM_UP = 2
SECONDS = ("seconds", "cpu_seconds")


def sharing(model: Any) -> Any:
    """A model of its own on the same weights: teachers are frozen, and large."""
    return copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})


def contenders(
    work: Workload, names: list[str]
) -> tuple[dict[str, Contender], dict[str, float | None], dict[str, str]]:
    """Everybody on equal weights; the relative error of each one's gradient on four completions (None where plain
    transformers cannot make it, with two tokenizers); why those who are left out are."""
    prompts = work.prompt_ids[:4]
    completions = [p[:9] for p in prompts]  # means per token and per rollout agree only for equal lengths
    # First, because the reference's models are the largest and must be gone before the others come.
    two = work.teacher_vocabulary is not None
    exact, adapters = (None, []) if two else reference_gradient(work, *work.models(), prompts, completions)
    give_back(work)
    student, teacher = work.models()
    found, errors, absent = {}, {}, {}
    for name in names:
        try:
            contender = make(name, work, student if name == names[-1] else copy.deepcopy(student), sharing(teacher))
            adopt(contender.model, adapters)
            error = None if exact is None else (contender.gradient(prompts, completions) - exact).norm() / exact.norm()
            errors[name] = None if error is None else float(error)
            found[name] = contender
        except Exception as problem:
            absent[name] = told(problem)
    return found, errors, absent


def give_back(work: Workload) -> None:
    """What was freed goes back to the system: the tuned malloc would keep the reference's float64 models."""
    gc.collect()
    if work.device == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc than glibc
            ctypes.CDLL(None).malloc_trim(0)


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
    """One step: wall seconds, CPU seconds of the process, and by phase the seconds of the workload's clock."""
    gc.collect()
    cost.synchronize(work.device)
    wall, cpu = time.perf_counter(), time.process_time()
    phases = contender.step(step)
    cost.synchronize(work.device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    whole = cpu if work.device == "cpu" else wall
    known = {name: phases.get(name, 0.0) for name in ("rollout", "teacher", "optimizer")}
    return {"seconds": wall, "cpu_seconds": cpu, "phases": known | {"student": whole - sum(known.values())}}


def measure(
    work: Workload, names: list[str], rounds: int, warm_up: int = WARM_UP, limit: float = math.inf
) -> dict[str, Any]:
    """Everything about one workload. After `limit` wall seconds no further round begins; one is always measured."""
    started = time.perf_counter()
    everybody, errors, absent = contenders(work, names)
    found = ", ".join(f"{n} {told_error(e)}" for n, e in errors.items())
    print(f"{work.name:8} gradient errors: {found}", file=sys.stderr, flush=True)
    lengths = work.lengths(0)
    before = cost.best_rates(work), cost.shape_rates(work, lengths)
    give_back(work)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in everybody}
    for turn in range(rounds + warm_up):
        if turn > warm_up and time.perf_counter() - started > limit:
            break
        for name in list(runs):
            try:
                run = timed(everybody[name], work, turn)
            except Exception as problem:  # out of memory, usually: the others go on
                absent[name] = told(problem)
                del runs[name], everybody[name]
                continue
            if turn >= warm_up:
                runs[name].append(run)
    best, own = cost.best_rates(work).best(before[0]), cost.shape_rates(work, lengths)
    own = {phase: rates.best(before[1][phase]) for phase, rates in own.items()}
    return summary(runs, "cpu_seconds" if work.device == "cpu" else "seconds") | {
        "gradient_error": errors,
        "unavailable": absent,
        "rates": {name: asdict(r) for name, r in {"best": best, **own}.items()},
        "cost": {name: asdict(c) for name, c in cost.costs(work, lengths).items()},
        "floor": cost.floor(work, lengths, own),
        "floor_at_best_rate": cost.floor(work, lengths, best),
    }


def told_error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def summary(runs: dict[str, list[dict[str, Any]]], clock: str) -> dict[str, Any]:
    """`median` and `ratio` are those of `clock`, a key of `timed`."""
    found = {kind: {name: [run[kind] for run in own] for name, own in runs.items()} for kind in SECONDS}
    return found | {
        "clock": clock,
        "median": {name: statistics.median(values) for name, values in found[clock].items() if values},
        "ratio": ratios(found[clock]),
        "ratio_in_wall_seconds": ratios(found["seconds"]),
        "phases": {
            name: {phase: statistics.median(run["phases"][phase] for run in own) for phase in own[0]["phases"]}
            for name, own in runs.items()
            if own
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
    if isinstance(work, Checkpoints):
        command += ["--student", str(work.student_path), "--teacher", str(work.teacher_path)]
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
    lines = ["| workload | contender | seconds | ratio [min, max] | by the wall | over floor | gradient error | GiB |"]
    lines.append("|" + "---|" * 8)
    for work, result in run["workloads"].items():
        if "arms" in result:
            lines.append(f"| {work} | {accuracy.sentence(result)} |" + " |" * 6)
            continue
        least = sum(result["floor"].values())
        for name, median in result["median"].items():
            ratio, wall = result["ratio"].get(name), result["ratio_in_wall_seconds"].get(name)
            cells = [work, name, f"{median:.3f}"]
            cells += [f"{r['median']:.2f} [{r['min']:.2f}, {r['max']:.2f}]" if r else "" for r in (ratio, wall)]
            cells += [f"{median / least:.2f}", told_error(result["gradient_error"][name])]
            gib = result.get("memory_gib", {}).get(name)
            lines.append("| " + " | ".join([*cells, "" if gib is None else f"{gib:.2f}"]) + " |")
        before = sum(result["floor_at_best_rate"].values())
        rate = f"{before:.3f} at {result['rates']['best']['linear'] / 1e9:.0f} GFLOP/s in every phase"
        lines.append(f"| {work} | floor | {least:.3f} | {rate} |" + " |" * 4)
        lines += [f"| {work} | {name} | not run: {why} |" + " |" * 5 for name, why in result["unavailable"].items()]
    lines += [f"| {work} | not run: {why} |" + " |" * 6 for work, why in run.get("skipped", {}).items()]
    return "\n".join(lines)


def phase_table(run: dict[str, Any]) -> str:
    """Seconds by phase, the floor at the rates of the phase's own products, and how far everybody is over it."""
    found = {work: result for work, result in run["workloads"].items() if "arms" not in result}
    names = list(dict.fromkeys(name for result in found.values() for name in result["median"]))
    lines = ["| workload | phase | floor | " + " | ".join(f"{name} | over" for name in names) + " |"]
    lines.append("|" + "---|" * (3 + 2 * len(names)))
    for work, result in found.items():
        for phase in dict.fromkeys(cost.PHASES.values()):
            least = sum(seconds for part, seconds in result["floor"].items() if cost.PHASES[part] == phase)
            cells = [work, phase, f"{least:.3f}"]
            for name in names:
                seconds = result["phases"].get(name, {}).get(phase)
                cells += ["", ""] if seconds is None else [f"{seconds:.3f}", f"{seconds / least:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_here(options: argparse.Namespace) -> dict[str, Any]:
    """All workloads; what is done is in `options.part` at any moment."""
    run: dict[str, Any] = {"environment": environment(), "workloads": {}, "skipped": {}}
    for name in options.workloads:
        try:
            run["workloads"][name] = one(name, options)
        except LookupError as reason:
            run["skipped"][name] = reason.args[0]
            print(f"{name}: not run: {reason.args[0]}", file=sys.stderr)
        options.part.write_text(json.dumps(run))
    return run


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    if name == "C5":
        return accuracy.measure(options.seeds)
    work = workload(name, options)
    result = measure(work, options.contenders, options.rounds, options.warm_up, options.seconds)
    if options.memory:
        result["memory_gib"] = {who: memory_apart(who, work) for who in result["median"]}
    return result


def workload(name: str, options: argparse.Namespace) -> Workload:
    return from_folders(name, options.student, options.teacher) if name in FROM_FOLDERS else WORKLOADS[name]


def run_with(variables: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    """This program again, under other environment variables: malloc reads them once, when a process begins."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [sys.executable, "-m", "bench.step", *arguments, "--part", str(part)]
        subprocess.run(command, env={**os.environ, **variables}, check=True)
        run: dict[str, Any] = json.loads(part.read_text())
        return run


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["C1"], choices=[*WORKLOADS, *FROM_FOLDERS, "C5"])
    parser.add_argument("--student", type=Path, help="folder of a checkpoint, for " + ", ".join(FROM_FOLDERS))
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--contenders", nargs="+", default=["headstart", "trl", "engineer"], choices=NAMES)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="rounds that are dropped")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after so many no round begins, per workload")
    parser.add_argument("--seeds", type=int, default=5, help="of C5")
    parser.add_argument("--malloc", choices=("default", "tuned", "both"), default="default", help="settings of glibc")
    parser.add_argument("--memory", action="store_true", help="also measure memory, each contender in its own process")
    parser.add_argument("--memory-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where the raw figures go, as JSON; the picture goes beside it")
    return parser


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.memory_here:
        print(memory(options.contenders[0], workload(options.workloads[0], options)))
        return
    if options.part is not None:
        run_here(options)
        return
    settings = {"default": [{}], "tuned": [MALLOC], "both": [{}, MALLOC]}[options.malloc]
    record: dict[str, Any] = {"command": " ".join(["python -m bench.step", *arguments]), "runs": []}
    for variables in settings:
        record["runs"].append(run_with(variables, arguments))
        last = record["runs"][-1]
        print(f"\nmalloc: {'tuned' if variables else 'default'}\n\n{table(last)}\n\n{phase_table(last)}\n", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            picture.steps(record, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
