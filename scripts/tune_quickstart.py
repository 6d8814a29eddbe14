"""Choose learning rate and batch of both quickstart arms on the dev split: an equal grid per arm, three seeds each.

    python scripts/tune_quickstart.py --pair strong --out docs/results/quickstart-tuning-strong.json

Each run is an ordinary `distill` run with the quickstart's settings except what the grid changes; it is scored by its
final accuracy on 96 dev problems x 4 samples. Finished runs in the output file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from headstart.build import distill
from headstart.config.evaluation import TinyTask
from headstart.config.schema import Config
from headstart.quickstart import Arm, arm_config, arms

GRID = {"esr": (1e-4, 3e-4, 1e-3), "full": (3e-4, 1e-3, 3e-3)}
BATCHES = (8, 16)
SEEDS = (0, 1, 2)


def dev_config(arm: Arm, pair: str, schedule: str, seed: int, batch: int) -> Config:
    """The arm's run with `batch` prompts per step, evaluated on the dev split after its last step."""
    config = arm_config(arm, pair, seed)  # type: ignore[arg-type]
    assert config.evaluation is not None
    evaluation = config.evaluation.model_copy(update={"task": TinyTask(split="dev"), "every": None})
    training = config.training.model_copy(update={"prompts_per_step": batch})
    shape = config.schedule.model_copy(update={"type": schedule})
    return config.model_copy(update={"evaluation": evaluation, "training": training, "schedule": shape})


def run(arm: Arm, pair: str, schedule: str, seed: int, batch: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = distill(dev_config(arm, pair, schedule, seed, batch), out=Path(folder) / "run")
    assert result.after is not None
    return {
        "pair": pair,
        "arm": arm.key,
        "schedule": schedule,
        "lr": arm.lr,
        "batch": batch,
        "seed": seed,
        "accuracy": result.after.accuracy,
        **result.after.details,
        "seconds": result.progress.seconds,
        "generated_tokens": result.progress.generated_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", choices=("strong", "weak"), required=True)
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="constant")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for base, batch in product(arms(arguments.pair), BATCHES):
        for lr in GRID[base.key]:
            arm = replace(base, lr=lr)
            for seed in SEEDS:
                key = {"arm": arm.key, "schedule": arguments.schedule, "lr": lr, "batch": batch, "seed": seed}
                if not any(all(row[k] == v for k, v in key.items()) for row in rows):
                    rows.append(run(arm, arguments.pair, arguments.schedule, seed, batch))
                    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
            del key["seed"]
            cell = [row["accuracy"] for row in rows if all(row[k] == v for k, v in key.items())]
            print(f"{arm.key:5} lr {lr:g} batch {batch}: {sum(cell) / len(cell):.3f} {[round(a, 3) for a in cell]}")


if __name__ == "__main__":
    main()
