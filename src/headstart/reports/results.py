"""What runs were and what came of them: configuration, before and after, accuracy against cost, training curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from headstart.reports.comparison import at_equal_steps, first_past, gap, last_within
from headstart.reports.figures import accuracy_figure, to_svg, training_figure
from headstart.reports.page import Block, Code, Fold, Picture, Section, Table, Text
from headstart.reports.run import Point, Record, Run
from headstart.reports.wording import NOTHING, percent
from headstart.stats import paired_difference

Named = Sequence[tuple[str, Run]]
SHORT = (
    "student.path", "teacher.path", "tuning.type", "tuning.r", "prompts.source", "horizon", "divergence.type",
    "divergence.support.type", "selection.type", "optimizer.lr", "schedule.type", "training.steps",
    "training.prompts_per_step", "rollout.temperature", "training.seed", "evaluation.task", "evaluation.samples",
)  # fmt: skip
UNTOLD = ("started", "command")
"""Entries of environment.json that differ between any two runs."""


def what_was_run(runs: Named) -> Section:
    """The configuration in short and where it ran, with everything in folds; of several runs also what differs."""
    flat = [dict(_flat(run.config)) for _, run in runs]
    names = [name for name, _ in runs]
    rows = [[key, *(_value(_short(config, key)) for config in flat)] for key in SHORT]
    blocks: list[Block] = [
        Table(("setting", *names), [row for row in rows if any(cell != NOTHING for cell in row[1:])])
    ]
    if len(runs) > 1:
        keys = [key for key in dict.fromkeys(k for config in flat for k in config) if not key.startswith("output.")]
        differ = [[key, *(_value(config.get(key)) for config in flat)] for key in keys]
        differ = [row for row in differ if len(set(row[1:])) > 1]
        told = "All settings that differ" if differ else "No setting differs"
        blocks.append(Fold(f"{told}: {len(differ)}", [Table(("setting", *names), differ)]) if differ else Text(told))
    entries = list(dict.fromkeys(key for _, run in runs for key in run.environment))
    machine = [[key, *(_value(run.environment.get(key)) for _, run in runs)] for key in entries]
    blocks.append(Fold("Versions, hardware, command", [Table(("", *names), machine)]))
    unlike = [row[0] for row in machine if len(set(row[1:])) > 1 and row[0] not in UNTOLD]
    if unlike:
        blocks.append(Text(f"The runs differ in {', '.join(unlike)}, so compare their seconds with care.", "warning"))
    for name, run in runs:
        text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        blocks.append(Fold(f"Whole configuration: {name}", [Code(text)]))
    return Section("What was run", blocks)


def before_and_after(name: str, points: Sequence[Point]) -> Table:
    """First and last evaluation, reading by reading; differences are paired over problems."""
    first, last = points[0], points[-1]
    ours, theirs = last.graded(), first.graded()
    keys = list(dict.fromkeys((*first.evaluation.get("details", {}), *last.evaluation.get("details", {}))))
    rows = [_reading("accuracy", "correct", first.evaluation["accuracy"], last.evaluation["accuracy"], theirs, ours)]
    for key in keys:
        before, after = (point.evaluation.get("details", {}).get(key) for point in (first, last))
        rows.append(_reading(key.replace("_", " "), key, before, after, theirs, ours))
    before, after = (None if (t := p.evaluation.get("truncated")) is None else 1.0 - t for p in (first, last))
    rows.append(_reading("stopped by itself", "stopped", before, after, theirs, ours))
    means = [p.evaluation.get("mean_tokens") for p in (first, last)]
    rows.append(["mean length, tokens", *(NOTHING if m is None else f"{m:.0f}" for m in means), NOTHING])
    return Table((name, f"step {first.step}", f"step {last.step}", "change in points, 95% interval"), rows)


def _reading(
    name: str, key: str, before: float | None, after: float | None, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> list[str]:
    cells = [NOTHING if value is None else percent(value) for value in (before, after)]
    a, b = ours.get(key, {}), theirs.get(key, {})
    shared = [problem for problem in a if problem in b]
    if not shared:
        return [name, *cells, NOTHING]
    change, (low, high) = paired_difference([a[p] for p in shared], [b[p] for p in shared])
    return [name, *cells, f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"]


TABLE_HEADER = ("model", "steps", "accuracy [95%]", "against the first", "tokens", "seconds")


def table_rows(runs: Named, teacher: tuple[str, Record] | None = None) -> list[list[str]]:
    """Rows in the columns of `TABLE_HEADER`, ready for a terminal and for a page.

    The student before, the teacher where it was measured, the end of the first run (also after as many steps as the
    others took), and for every other run the points around equal seconds, at equal steps (or the nearest before) and
    its end. Roles that fall on one point share a row. "Against the first" is paired with the first run's end (points).
    """
    measured = [(name, run.points) for name, run in runs if run.points]
    if not measured:
        return []
    (name, points), *others = measured
    end = points[-1]
    rows = []
    if points[0].step < end.step:
        rows.append(_row("student before", points[0], end))
    if teacher is not None:
        low, high = teacher[1]["interval"]
        shown = f"{percent(teacher[1]['accuracy'])} [{100 * low:.1f}, {100 * high:.1f}]"
        rows.append([teacher[0], NOTHING, shown, *[NOTHING] * 3])
    lasts = {theirs[-1].step for _, theirs in others}
    rows += [_row(f"{name}: {p.step} steps", p, end) for p in points if p.step in lasts and p is not end and p.step]
    rows.append(_row(f"{name}: end" if others else name, end, end))
    for other, theirs in others:
        same_steps = any(p.step == theirs[-1].step for p in points)
        rows += [_row(f"{other}: {role}", point, end) for role, point in _roles(theirs, end, same_steps)]
    return rows


def _roles(points: Sequence[Point], end: Point, same_steps: bool) -> list[tuple[str, Point]]:
    """The points of a run worth a row beside the first run's `end`, in step order, with what they stand for.

    Evaluations are rare, so equal cost is shown as the two points around it. `same_steps`: the first run has a row of
    its own at this one's last step, so that needs no stand-in.
    """
    roles: list[tuple[str, Point | None]] = [("end", points[-1])]
    same, within = at_equal_steps(points, end.step), last_within(points, end.seconds)
    exact = same is not None and same.step == end.step
    if exact or not same_steps:
        roles.append(("equal steps" if exact else f"nearest to {end.step} steps", same))
    roles.append((f"last within {end.seconds:.1f} s", within))
    if within is None or within.seconds < end.seconds:
        roles.append((f"first past {end.seconds:.1f} s", first_past(points, end.seconds)))
    told = [(", ".join(role for role, other in roles if other is point), point) for point in points]
    return [(role, point) for role, point in told if role]


def _row(name: str, point: Point, end: Point) -> list[str]:
    low, high = point.evaluation["interval"]
    against = None if point is end else gap(point, end)
    return [
        name,
        str(point.step),
        f"{percent(point.accuracy)} [{100 * low:.1f}, {100 * high:.1f}]",
        against.signed if against is not None else NOTHING,
        f"{point.generated_tokens:,}",
        f"{point.seconds:.1f}",
    ]


def cost_section(runs: Named, teacher: tuple[str, Record] | None) -> Section:
    """Accuracy against seconds and generated tokens: the figure, and the points that are worth a row."""
    arms = [(name, run.points) for name, run in runs if run.points]
    levels = [("before", arms[0][1][0].accuracy)]
    levels += [("teacher", teacher[1]["accuracy"])] if teacher is not None else []
    ends = "; ".join(
        f"{name} ends at {percent(p[-1].accuracy)} after {p[-1].seconds:.1f} s and {p[-1].generated_tokens:,} tokens"
        for name, p in arms
    )
    picture = Picture(
        "accuracy",
        to_svg(accuracy_figure(arms, levels)),
        f"Accuracy against training seconds and against generated tokens, a curve for each run. {ends}.",
        "Bands are 95% intervals; dashed are the student before training and, where it was measured, the teacher. The "
        "right axis is logarithmic: equal distances are equal ratios.",
    )
    note = (
        "Steps, tokens and seconds count training only: sampling, the teacher's judgement and the update, without the "
        "evaluations in between. One run is one seed: intervals cover the choice of problems, not that of the seed."
    )
    if len(arms) > 1:
        note += f" “Against the first” is the difference to the end of {arms[0][0]} in points, paired over problems."
    return Section(
        "Accuracy against cost", [picture, Table(TABLE_HEADER, table_rows(runs, teacher)), Text(note, "soft")]
    )


def training_section(runs: Named) -> Section:
    """How training went, step by step."""
    trained = [(name, run) for name, run in runs if run.steps]

    def span(run: Run, key: str) -> str:
        first, last = (step.get(key) for step in (run.steps[0], run.steps[-1]))
        return "unknown" if first is None or last is None else f"{first:.3g} to {last:.3g}"

    told = "; ".join(f"{n}: loss {span(r, 'loss')}, gradient norm {span(r, 'grad_norm')}" for n, r in trained)
    alt = f"Six panels over training steps: loss, divergence, gradient norm, accuracy, length, share stopped. {told}."
    caption = (
        "Divergence is over the sampled positions of each step, so runs with other horizons differ in what it covers."
    )
    return Section("Training", [Picture("training", to_svg(training_figure(trained)), alt, caption)])


def _short(flat: Mapping[str, Any], key: str) -> Any:
    """A setting, or the settings below it in one cell."""
    if key in flat:
        return flat[key]
    below = {k[len(key) + 1 :]: v for k, v in flat.items() if k.startswith(f"{key}.")}
    return ", ".join(str(v) if k == "type" else f"{k} {_value(v)}" for k, v in below.items() if v is not None) or None


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a nested configuration."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(value: Any) -> str:
    match value:
        case None:
            return NOTHING
        case float():
            return f"{value:g}"
        case _:
            return str(value)
