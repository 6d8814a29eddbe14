"""Everything that only a GPU can tell, in one visit of twelve minutes.

    python -m bench.gpu --out DIR               on a machine with a GPU
    python -m bench.gpu --out DIR --rehearse    the same parts on a CPU with tiny models: does every command run?

The GPU tests come first, then steps beside TRL (G1, G2, LoRA), an evaluation beside `generate`, and the loop with a
static cache and compiled decoding, whose compilation nobody can bound. Every part is a process of its own with a limit,
so a part that fails or hangs takes nothing from the others; what it printed is in DIR/NAME.txt, its figures are in
DIR/NAME.json, and DIR/parts.json is rewritten after each. A part for which too little time is left is skipped and said
to be. Ends with the tables, and with 1 where a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

LEAST = 20.0
"""Seconds below which no part begins."""


@dataclass(frozen=True)
class Part:
    """A command (after `python -m`) and the seconds it may take. `{out}` is where its JSON goes."""

    name: str
    command: Sequence[str]
    limit: float


def steps(name: str, work: str, contenders: str, limit: float, *more: str) -> Part:
    """Rounds begin within the first half of the limit, because models are made and compiled in it, too."""
    options = ["--contenders", *contenders.split(), "--rounds", "8", "--warm-up", "2", "--seconds", str(limit / 2)]
    return Part(name, ["bench.step", work, *options, *more, "--out", "{out}"], limit)


def parts(rehearse: bool) -> list[Part]:
    """In the order of how much would be missed."""
    g1, g2, g6 = ("T1", "T1", "T6") if rehearse else ("G1", "G2", "G6")
    where = ["--workloads", "tiny-world", "--rounds", "1"] if rehearse else ["--device", "cuda", "--rounds", "3"]
    return [
        Part("tests", ["pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/integration/test_gpu.py"], 180),
        steps("G1", g1, "headstart trl", 90),
        steps("G2", g2, "headstart trl", 120),
        steps("G6", g6, "headstart trl", 120),
        Part("evaluate", ["bench.evaluate", *where, "--out", "{out}"], 90),
        steps("G1-engineer", g1, "headstart engineer", 120),
        steps("G2-engineer", g2, "headstart engineer", 150),
        steps("G1-memory", g1, "headstart trl", 90, "--memory"),
    ]


def run(part: Part, folder: Path, limit: float) -> dict[str, Any]:
    """One part; its whole process group is ended at the limit."""
    said, figures = folder / f"{part.name}.txt", folder / f"{part.name}.json"
    command = [sys.executable, "-m", *(word.format(out=figures) for word in part.command)]
    start = time.perf_counter()
    with said.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome = {None: f"stopped after {limit:.0f} s", 0: "done"}.get(code, f"failed with {code}")
    return asdict(part) | {"outcome": outcome, "seconds": time.perf_counter() - start, "figures": figures.exists()}


def visit(found: Sequence[Part], folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Parts in turn, as long as there is time; what came of each."""
    folder.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.perf_counter() + seconds, list[dict[str, Any]]()
    for part in found:
        left = end - time.perf_counter()
        if left < LEAST:
            outcomes.append(asdict(part) | {"outcome": "skipped: no time left", "seconds": 0.0, "figures": False})
        else:
            outcomes.append(run(part, folder, min(part.limit, left)))
        print(f"{part.name}: {outcomes[-1]['outcome']}, {outcomes[-1]['seconds']:.0f} s", flush=True)
        (folder / "parts.json").write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what the parts print and measure")
    parser.add_argument("--minutes", type=float, default=11.5, help="in all")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --rehearse runs the same parts on a CPU")
    outcomes = visit(parts(options.rehearse), options.out, 60 * options.minutes)
    for outcome in outcomes:
        said = options.out / f"{outcome['name']}.txt"
        if said.exists():
            print(f"\n== {outcome['name']}\n{said.read_text(errors='replace')[-4000:]}", flush=True)
    return int(any(outcome["outcome"] != "done" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
