"""What preflight says of a step, beside what the step takes: GiB by phase over the loaded models, and seconds.

    OMP_NUM_THREADS=1 python -m bench.plan --out docs/results/plan-cpu.json

Each workload runs in a process of its own, three steps of which the last two count. GiB are the most that was resident
in a phase (Linux resets that mark on request), less what was resident when the models were loaded. `--malloc` says what
glibc does with memory that is freed: by default it keeps blocks below 32 MiB for later, `tight` gives all back at once,
which is what the formula counts. Seconds are CPU seconds of the process, those by `headstart.assemble.cost` timed as
preflight does it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.contenders import Headstart
from bench.step import environment, resident
from bench.workloads import WORKLOADS, small
from headstart.assemble.cost import estimate, memory
from headstart.checks.run import timed
from headstart.models.memory import GIB, WORKSPACE
from headstart.train.metrics import Clock
from headstart.train.step import train_step

CASES = ("C1", "C2", "C3", "C4-512", "C4-1024", "C6", "C7", "R1s", "R2s")
PHASES = ("rollout", "teacher", "student", "optimizer")
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
STEPS = 3


@dataclass
class Watch:
    """The most GiB over `base` that were resident in each phase, and each one's CPU seconds, of the steps since
    `clear`."""

    base: int
    gib: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def clear(self) -> None:
        self.gib.clear()
        self.seconds.clear()

    def phase(self) -> Any:
        """A `Clock.phase` that is watched and counts CPU seconds, which other work on the machine does not add to."""
        watch = self

        @contextmanager
        def phase(clock: Clock, name: str) -> Iterator[None]:
            Path("/proc/self/clear_refs").write_text("5")
            start = time.process_time()
            yield
            passed = time.process_time() - start
            clock.seconds[name] = clock.seconds.get(name, 0.0) + passed
            watch.seconds[name] = watch.seconds.get(name, 0.0) + passed
            watch.gib[name] = max(watch.gib.get(name, 0.0), (resident("VmHWM") - watch.base) / GIB)

        return phase


def warm_up() -> None:
    """Code of libraries is loaded when it is first used, and is resident from then on."""
    work = replace(WORKLOADS["C1"], student=small(32), teacher=small(64), vocabulary=256, prompts=2, tokens=80)
    Headstart(work, *work.models()).step(0)


def measure(case: str) -> dict[str, Any]:
    warm_up()
    ours = Headstart(work := WORKLOADS[case], *work.models())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    watch = Watch(resident("VmRSS"))
    with mock.patch.object(Clock, "phase", watch.phase()):
        return compared(ours, watch)


def compared(ours: Headstart, watch: Watch) -> dict[str, Any]:
    """What steps take under `watch`, and what the formulas say of them."""
    parts, pair = ours.parts, ours.pair
    for step in range(STEPS):
        if step == 1:
            watch.clear()
        train_step(parts, step, 0)
    found = {"gib": dict(watch.gib), "seconds": {k: v / (STEPS - 1) for k, v in watch.seconds.items()}}
    tokens = parts.config.horizon.longest
    assert tokens is not None
    same = parts.config.model_copy(update={"training": parts.config.training.model_copy(update={"steps": STEPS})})
    plan = memory(pair, same, parts.prompts, tokens)
    said = {name: getattr(plan, name) + plan.states + WORKSPACE / GIB for name in PHASES}
    few = timed(parts.config, "cpu")
    start = time.process_time()
    line = estimate(pair, few, parts.prompts, [tokens], repeats=1)[0].seconds
    found |= {"gib_said": said, "seconds_said": asdict(line) if line else None, "timing": time.process_time() - start}
    return found | {"items": asdict(plan.items) if plan.items else None}


def row(case: str, one: dict[str, Any]) -> str:
    peak, said = max(one["gib"][p] for p in PHASES), max(one["gib_said"].values())
    took = {p: one["seconds"].get(p, 0.0) for p in PHASES}
    guess = one["seconds_said"]
    cells = [f"{one['gib'][p]:.2f}, {one['gib_said'][p]:.2f}" for p in PHASES]
    cells += [f"**{peak:.2f}, {said:.2f}**", f"{said / peak:.2f}"]
    cells += [f"{took[p]:.2f}, {guess[p]:.2f}" for p in PHASES]
    total, all_said = sum(took.values()), sum(guess.values())
    cells += [f"**{total:.2f}, {all_said:.2f}**", f"{all_said / total:.2f}"]
    return f"| {case} | " + " | ".join(cells) + " |"


def table(cases: dict[str, dict[str, Any]]) -> str:
    names = ["workload", *(f"GiB {p}" for p in PHASES), "peak", "said / took"]
    names += [*(f"s {p}" for p in PHASES), "step", "said / took"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join(lines + [row(case, one) for case, one in cases.items()])


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[*CASES], choices=CASES)
    parser.add_argument("--malloc", choices=("default", "tight"), default="default", help="settings of glibc")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where the raw figures go, as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.here:
        print(json.dumps(measure(options.cases[0])))
        return
    known = options.out is not None and options.out.exists()  # and keeps the workloads that are not measured again
    found: dict[str, dict[str, Any]] = json.loads(options.out.read_text())["workloads"] if known else {}
    for case in options.cases:
        command = [sys.executable, "-m", "bench.plan", case, "--here"]
        variables = {**os.environ, **(TIGHT if options.malloc == "tight" else {})}
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            continue
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(row(case, found[case]), file=sys.stderr, flush=True)
        record = {"command": " ".join(["python -m bench.plan", *arguments]), "environment": environment()}
        if options.out is not None:
            options.out.write_text(json.dumps(record | {"workloads": found}, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
