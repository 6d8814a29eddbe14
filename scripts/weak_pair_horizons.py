"""Can a horizon that moves reach the accuracy of full rollouts on the weak pair for half their cost?

    python scripts/weak_pair_horizons.py --split test --out docs/results/weak-pair-horizons.json

Every arm is an ordinary `distill` run with the quickstart's settings except horizon, learning rate and steps, evaluated
as it goes on 96 problems x 4 samples. The arms of one seed run side by side in turn, so that the machine's drift meets
all of them. Finished runs in the output file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from headstart.build import distill
from headstart.config.loader import parse
from headstart.config.render import resolved
from headstart.config.schema import Config
from headstart.config.text import read_yaml
from headstart.quickstart import arm_config, arms

SEEDS = (0, 1, 2)
MIXED = {"type": "mixed", "tokens": 16, "max_tokens": 200, "every": 5}
OFTEN = {**MIXED, "every": 3}
DAMAGE = {"type": "damage", "tokens": 16, "min_tokens": 16, "max_tokens": 200, "grid": [16, 200], "memory": 16}
FULL = {"type": "full", "max_tokens": 200}
Arm = tuple[dict[str, Any], float, str, int, int]
"""Horizon, learning rate, its schedule, steps, steps between evaluations."""
ARMS: dict[str, Arm] = {
    "full": (FULL, 1e-3, "constant", 40, 5),
    "mixed": (MIXED, 3e-4, "constant", 80, 10),
    "mixed 3": (OFTEN, 6e-4, "constant", 45, 5),
    "damage": (DAMAGE, 3e-4, "constant", 60, 10),
    "fixed 16": ({"type": "fixed", "tokens": 16}, 1e-4, "constant", 60, 20),
}
TUNING: dict[str, Arm] = {
    f"{name} {lr:g}": (horizon, lr, "constant", steps, steps)
    for name, horizon, steps, rates in (
        ("full", FULL, 40, (1e-3,)),
        ("mixed 5", MIXED, 68, (3e-4, 6e-4)),
        ("mixed 3", OFTEN, 45, (3e-4, 6e-4)),
    )
    for lr in rates
}
"""On dev, at most half of the full rollouts' tokens for the mixed horizons."""


def config_of(arm: Arm, split: str, seed: int) -> Config:
    horizon, lr, schedule, steps, every = arm
    data = read_yaml(resolved(arm_config(arms("weak")[1], "weak", seed)))
    data["horizon"] = horizon
    data["optimizer"]["lr"] = lr
    data["schedule"]["type"] = schedule
    data["training"]["steps"] = steps
    data["evaluation"] |= {"task": {"type": "tiny", "split": split}, "every": every}
    if horizon["type"] == "damage":
        data["probes"] = {"every": 10, "prompts": 8}
    return parse(data)


def run(name: str, arm: Arm, split: str, seed: int, bare: bool) -> dict[str, Any]:
    """Accuracy against training cost. `cpu_seconds` is the whole process, evaluation included; `seconds` training."""
    config, cpu = config_of(arm, split, seed), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        distill(config.model_copy(update={"evaluation": None}) if bare else config, out=Path(folder) / "run")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    points, seconds, tokens, probe = [], 0.0, 0, 0
    for line in lines:
        if line["event"] == "step":
            seconds, tokens = seconds + line["seconds"], line["generated_tokens"]
            probe += line["probe_tokens"]
        else:
            figures = {"accuracy": line["accuracy"], "plan_right": line["details"]["plan_right"]}
            points.append({"step": line["step"], "seconds": seconds, "generated_tokens": tokens, **figures})
    horizons = [line["horizon"] for line in lines if line["event"] == "step"]
    return {
        "arm": name,
        "split": split,
        "seed": seed,
        "lr": arm[1],
        "points": points,
        "seconds": seconds,
        "generated_tokens": tokens,
        "probe_tokens": probe,
        "horizons": horizons,
        "cpu_seconds": time.process_time() - cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--tune", action="store_true", help="the settings of full and mixed instead")
    parser.add_argument("--bare", action="store_true", help="no evaluations, to time training alone")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    chosen = TUNING if arguments.tune else ARMS  # interleaved: all arms of a seed, then the next seed
    for seed in SEEDS:
        for name, arm in chosen.items():
            key = {"arm": name, "split": arguments.split, "seed": seed}
            if not any(all(row[k] == v for k, v in key.items()) for row in rows):
                rows.append(run(name, arm, arguments.split, seed, arguments.bare))
                lines = ",\n".join(json.dumps(row) for row in rows)
                arguments.out.write_text(f"[\n{lines}\n]\n")
                last = rows[-1]["points"][-1]["accuracy"] if rows[-1]["points"] else float("nan")
                print(f"{name:10} seed {seed}: {last:.3f}, {rows[-1]['generated_tokens']} tokens")


if __name__ == "__main__":
    main()
