"""A study's record as plain JSON: every cell's curve, and one table at equal cost. Reads run folders, no torch.

A cell's accuracy at a cost is read off its own curve, per problem, on the straight line between the two evaluations
around that cost; never beyond the last one. All seeds of an arm must reach a cost, else the arm has no figure there. A
run that failed (numbers that are not finite) has no end, and a trial that failed ends with no answer right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from headstart.config.study import StudyConfig, slug
from headstart.errors import RunFolderError
from headstart.reports.run import Record, Run, read_run
from headstart.stats import Z95, Array, crossed_means, holm, interval, p_value

AXES = ("steps", "tokens", "seconds")
LEVEL = 0.05
"""Holm-adjusted p-values from here on are called noise."""


class Choice(NamedTuple):
    """What the trials chose for an arm: the rate with the best development accuracy at the end, and that rate's best
    step."""

    rate: float
    step: int


def trial_folder(out: Path, arm: str, rate: float, seed: int) -> Path:
    return out / "tuning" / slug(arm) / f"lr-{rate:g}-seed-{seed}"


def final_folder(out: Path, arm: str, seed: int) -> Path:
    return out / "cells" / slug(arm) / f"seed-{seed}"


def choose(study: StudyConfig, out: Path) -> dict[str, Choice]:
    """The rate and the step that the trials in `out/tuning` chose for each arm.

    Of rates that end alike the one that was higher on the way, then the lower; of equal steps the earlier.
    """
    choices = {}
    for arm in study.arms:
        curves: dict[float, dict[int, float]] = {}
        for trial in trials(study, out, arm):
            for step, accuracy in trial["curve"]:
                at = curves.setdefault(trial["rate"], {})
                at[step] = at.get(step, 0.0) + accuracy
        rate = max(sorted(curves), key=lambda rate: (curves[rate][max(curves[rate])], sum(curves[rate].values())))
        steps = sorted(step for step in curves[rate] if step > 0)
        choices[arm] = Choice(rate, max(steps, key=lambda step: curves[rate][step]))
    return choices


def trials(study: StudyConfig, out: Path, arm: str) -> list[Record]:
    """The tuning runs of an arm: rate, seed and development accuracies by step."""
    t = study.tuning
    records: list[Record] = []
    for rate, seed in product(t.rates, t.seeds) if t else ():
        run = read_run(trial_folder(out, arm, rate, seed))
        curve, failed = [[p.step, p.accuracy] for p in run.points], run.failure
        if failed:
            curve.append([run.setting("training", "steps"), 0.0])
        records.append({"rate": rate, "seed": seed, "curve": curve, "failed": failed})
    return records


def collect(study: StudyConfig, out: Path) -> dict[str, Any]:
    """Everything in the finished study at `out`, its table included (`study.json`).

    Raises RunFolderError when a cell is missing or was judged on other problems than the first.
    """
    choices = choose(study, out) if study.tuning else {}
    arms: list[Record] = []
    problems: list[str] = []
    environment: dict[str, Any] = {}
    for name, changes in study.arms.items():
        cells = []
        for seed in study.seeds:
            run = read_run(final_folder(out, name, seed))
            cell, asked = _cell(run, seed)
            problems = problems or asked
            environment = environment or {k: v for k, v in run.environment.items() if k != "command"}
            if asked != problems:
                raise RunFolderError(f"{run.path} was evaluated on other problems than the first cell; remove it")
            cells.append(cell)
        choice = choices.get(name)
        arms.append({
            "name": name, "changes": changes, "lr": run.setting("optimizer", "lr"),
            "chosen_step": choice.step if choice else None, "cells": cells, "trials": trials(study, out, name),
        })  # fmt: skip
    record = {
        "format": 1, "question": study.question, "reference": study.first, "environment": environment, "arms": arms,
    }  # fmt: skip
    return {**record, "table": table(arms, study.first, study.budgets.model_dump(), study.target)}


def _cell(run: Run, seed: int) -> tuple[dict[str, Any], list[str]]:
    """A run's curve, and the ids of the problems it was judged on."""
    points, problems = [], []
    for point in run.points:
        graded = point.graded().get("correct", {})
        if not graded:
            raise RunFolderError(f"{point.rows} holds no graded responses; remove {run.path} and run the study again")
        problems = list(graded)
        points.append({
            "step": point.step, "tokens": point.generated_tokens, "seconds": round(point.seconds, 4),
            "truncated": point.evaluation["truncated"], "mean_tokens": point.evaluation["mean_tokens"],
            "scores": [round(score, 4) for score in graded.values()],
        })  # fmt: skip
    memory = max((step.get("peak_memory_gib") or 0.0 for step in run.steps), default=0.0)
    cell = {"seed": seed, "failed": run.failure, "peak_memory_gib": round(memory, 3), "points": points}
    return cell, problems


# --- the table -------------------------------------------------------------------------------------------------------


def table(
    arms: Sequence[Record], reference: str, budgets: Mapping[str, Sequence[float]], target: float | None
) -> dict[str, Any]:
    """`columns` (what is compared at what cost, each with an entry per arm, None where an arm has no figure) and
    `costs` (what each arm took)."""
    readings: list[tuple[str, float | None]] = [
        (axis, cost) for axis in AXES for cost in budgets[axis] or [_common(arms, axis)]
    ]
    readings += [("end", None)] + ([("chosen", None)] if any(arm["chosen_step"] for arm in arms) else [])
    columns = []
    for axis, cost in readings:
        scores = {arm["name"]: scores_at(arm, axis, cost) for arm in arms}
        columns.append({"at": axis, "cost": cost, "arms": _entries(scores, reference)})
    end_SP = next(scores_at(arm, "end", None) for arm in arms if arm["name"] == reference)
    bar = target
    if bar is None and end_SP is not None:
        low, high = interval(crossed_means(end_SP))
        bar = float(end_SP.mean()) - (high - low) / 2 / Z95
    return {"columns": columns, "target": bar, "costs": {arm["name"]: _costs(arm, bar) for arm in arms}}


def scores_at(arm: Record, axis: str, cost: float | None) -> Array | None:
    """Share of right answers `[seeds, problems]` at a cost on an axis, at the end, or at the chosen step; None where a
    seed's curve does not get there."""
    seeds = []
    for cell in arm["cells"]:
        points = cell["points"]
        xs = [point[_KEYS[axis]] for point in points]
        x = {"end": xs[-1], "chosen": arm["chosen_step"]}.get(axis, cost)
        if x is None or x > xs[-1] or (axis == "end" and cell.get("failed")):
            return None
        seeds.append([np.interp(x, xs, ys) for ys in zip(*(point["scores"] for point in points), strict=True)])
    return np.array(seeds, dtype=np.float64)


_KEYS = {"steps": "step", "tokens": "tokens", "seconds": "seconds", "chosen": "step", "end": "step"}


def _common(arms: Sequence[Record], axis: str) -> float:
    """The largest cost that every cell reached, those that failed aside."""
    cells = [cell for arm in arms for cell in arm["cells"]]
    whole = [cell for cell in cells if not cell.get("failed")] or cells
    least: float = min(cell["points"][-1][_KEYS[axis]] for cell in whole)
    return least


def _entries(scores: Mapping[str, Array | None], reference: str) -> dict[str, dict[str, Any] | None]:
    """Accuracy with its interval, and the paired difference to the reference with its Holm-adjusted p-value."""
    entries = {name: None if score_SP is None else _estimate("accuracy", score_SP) for name, score_SP in scores.items()}
    base, tested = scores[reference], []
    for name, score_SP in scores.items():
        entry = entries[name]
        if entry is not None and score_SP is not None and base is not None and name != reference:
            gap_SP = score_SP - base
            entry["difference"] = _estimate("value", gap_SP) | {"p": p_value(crossed_means(gap_SP))}
            tested.append(entry["difference"])
    for difference, adjusted in zip(tested, holm([d["p"] for d in tested]), strict=True):
        difference |= {"p_holm": adjusted, "noise": adjusted >= LEVEL}
    return entries


def _estimate(name: str, values_SP: Array) -> dict[str, Any]:
    low, high = interval(crossed_means(values_SP))
    return {name: float(values_SP.mean()), "low": low, "high": high}


def _costs(arm: Record, bar: float | None) -> dict[str, Any]:
    """What an arm took, as means over its seeds; prices of the bar (None: there is none) over those that reached it."""
    ends = [cell["points"][-1] for cell in arm["cells"]]
    starts = [cell["points"][0] for cell in arm["cells"]]
    crossings = [price_of(cell["points"], bar) for cell in arm["cells"]] if bar is not None else []
    prices = [price for price in crossings if price is not None]
    return {
        "seeds": len(ends),
        "reached": len(prices),
        "to_target": {axis: fmean(p[axis] for p in prices) for axis in AXES} if prices else None,
        "end": {axis: fmean(end[_KEYS[axis]] for end in ends) for axis in AXES},
        "below_start": sum(fmean(e["scores"]) < fmean(s["scores"]) for s, e in zip(starts, ends, strict=True)),
        "truncated": fmean(end["truncated"] for end in ends),
        "mean_tokens": fmean(end["mean_tokens"] for end in ends),
        "peak_memory_gib": max(cell["peak_memory_gib"] for cell in arm["cells"]),
    }


def price_of(points: Sequence[Record], bar: float) -> dict[str, float] | None:
    """Steps, tokens and seconds at which a curve first reaches `bar`, on straight lines between its evaluations."""
    before = points[0]
    if fmean(before["scores"]) >= bar:
        return dict.fromkeys(AXES, 0.0)
    for point in points[1:]:
        low, high = fmean(before["scores"]), fmean(point["scores"])
        if high >= bar:
            part = (bar - low) / (high - low)
            return {axis: before[_KEYS[axis]] + part * (point[_KEYS[axis]] - before[_KEYS[axis]]) for axis in AXES}
        before = point
    return None
