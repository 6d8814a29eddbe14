"""Several teachers into one student, beside the merged weights of students of one teacher each.

    OMP_NUM_THREADS=1 nice python -m bench.teachers RUNS --out docs/results/teachers.json

Trains every arm of `studies/teachers.yaml` with every seed into RUNS (what is there is kept, what was stopped resumes),
merges the arms of one teacher by seed (`examples/merge.py`), and counts each world by itself. About a quarter of an
hour of one core.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from examples.merge import merge

from headstart.config.loader import load_study
from headstart.config.schema import Config
from headstart.config.study import slug
from headstart.distillation.run import distill
from headstart.evaluation.run import evaluate
from headstart.version import __version__

STUDY = Path("studies/teachers.yaml")
SPECIALISTS = ("tiny's teacher alone", "late's teacher alone")
SCALES = {"merged, mean": 0.5, "merged, task arithmetic": 1.0}


def by_world(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy on each world; a problem's id begins with its world."""
    found: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        found[row["problem_id"].split("/")[0]].append(row["verdict"]["correct"])
    return {world: fmean(right) for world, right in sorted(found.items())}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained(config: Config, folder: Path, seed: int) -> dict[str, Any]:
    """One run: accuracy before and after by world, tokens and seconds of training."""
    training = config.training.model_copy(update={"seed": seed})
    if not (folder / "model").exists():
        if (folder / "config.yaml").exists():
            distill(resume=folder)
        else:
            distill(config.model_copy(update={"training": training}), out=folder)
    steps = config.training.steps
    metrics = [row for row in read_rows(folder / "metrics.jsonl") if row["event"] == "step"]
    return {
        "before": by_world(read_rows(folder / "eval" / "step_000000.jsonl")),
        "after": by_world(read_rows(folder / "eval" / f"step_{steps:06d}.jsonl")),
        "generated_tokens": metrics[-1]["generated_tokens"],
        "seconds": sum(row["seconds"] for row in metrics),
    }


def merged(config: Config, folders: list[Path], out: Path, scale: float) -> dict[str, Any]:
    """The specialists in `folders` merged, evaluated as a run is."""
    if not (out / "graded" / "summary.json").exists():
        merge(out / "model", [str(folder / "model") for folder in folders], config.student.path, scale)
        evaluate(config, out=out / "graded", **{"student.path": str(out / "model")})
    return {"after": by_world(read_rows(out / "graded" / "rows.jsonl"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder for the runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = load_study(STUDY)
    record: dict[str, dict[str, Any]] = defaultdict(dict)
    for seed in study.config.seeds:
        places = {arm: arguments.runs / f"{slug(arm)}-{seed}" for arm in study.arms}
        for arm, config in study.arms.items():
            record[arm][str(seed)] = trained(config, places[arm], seed)
        for name, scale in SCALES.items():
            out = arguments.runs / f"{slug(name)}-{seed}"
            first = next(iter(study.arms.values()))
            record[name][str(seed)] = merged(first, [places[arm] for arm in SPECIALISTS], out, scale)
        versions = {"headstart": __version__, "torch": torch.__version__}
        arguments.out.write_text(json.dumps({"study": str(STUDY), **versions, "arms": record}, indent=2) + "\n")
    for arm, seeds in record.items():
        worlds = {world: [one["after"][world] for one in seeds.values()] for world in ("tiny", "late")}
        print(arm, {world: f"{fmean(found):.3f} {found}" for world, found in worlds.items()})


if __name__ == "__main__":
    main()
