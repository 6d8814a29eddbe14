"""The page of one run, or of several side by side: its sections, and those about the runs themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from headstart.records import Result
from headstart.reports.figures import accuracy_figure, to_svg, training_figure
from headstart.reports.page import Block, Code, Fold, Page, Picture, Section, Table, Text, write
from headstart.reports.readings import reading_sections
from headstart.reports.run import Point, Run, labels, read_run
from headstart.reports.samples import sample_sections
from headstart.reports.wording import (
    NOTHING,
    at_equal_steps,
    cut_mark,
    estimate,
    first_past,
    gap,
    last_within,
    measured,
    outcome,
    paired,
    percent,
)
from headstart.stats import Estimate

Named = Sequence[tuple[str, Run]]
REMEDIES = (
    ("diagnose/preflight", "headstart preflight {run}/config.yaml --out {run}", "whether the pair fits together"),
    ("diagnose/decay", "headstart diagnose {run}/config.yaml --out {run}", "where to stop"),
    ("explain/cascade", "headstart explain {run}", "what training did beyond the accuracy"),
)
SHORT = (
    "student.path", "teacher.path", "tuning.type", "tuning.r", "prompts.source",
    "prompts.teacher_view.context_column", "rollout.mix", "horizon", "divergence.type",
    "divergence.support.type", "selection.type", "optimizer.lr", "schedule.type", "training.steps",
    "training.prompts_per_step", "rollout.temperature", "training.seed", "evaluation.task", "evaluation.samples",
)  # fmt: skip
ALWAYS_DIFFERENT = ("started", "command")
"""Entries of environment.json that differ between any two runs."""
TABLE_HEADER = ("model", "steps", "accuracy [95%]", "against the first", "tokens", "seconds")


def write_report(paths: Sequence[Path], out: Path | None = None) -> tuple[list[Path], list[Run]]:
    """Read the run folders, write the page and its Markdown copy; returns their paths and the runs.

    `out` is the page's file: by default `report.html` in the folder of a single run, `comparison.html` in the first of
    several. Raises RunFolderError when a folder holds no run or the page cannot be written.
    """
    runs = [read_run(path) for path in paths]
    out = out or runs[0].path / ("report.html" if len(runs) == 1 else "comparison.html")
    return write(build_page(runs), out), runs


def report(folders: Path | str | Sequence[Path | str], out: Path | str | None = None) -> Result:
    """One self-contained HTML page, and a Markdown copy, about a run or several side by side; see `write_report`.

    `pages` are the files that were written; `str(result)` is the outcome in words.
    """
    several = [folders] if isinstance(folders, str | Path) else list(folders)
    pages, runs = write_report([Path(folder) for folder in several], None if out is None else Path(out))
    return Result({"pages": [str(page) for page in pages]}, "\n".join(outcome(runs)))


def build_page(runs: Sequence[Run]) -> Page:
    """The content of the page. Folders without training, such as those of a diagnosis, add their readings."""
    named = list(zip(labels(runs), runs, strict=True))
    trained = [(name, run) for name, run in named if run.steps or run.points] or named
    evaluated = [(name, run) for name, run in trained if run.points]
    lead: list[Block] = [Text(_subtitle(named), "soft"), *(Text(text, "outcome") for text in outcome(runs))]
    lead += [Text(f"{run.path.name}: {problem}", "warning") for run in runs for problem in run.problems]
    sections: list[Section] = []
    if evaluated:
        sections += [_before_and_after(evaluated), cost_section(evaluated, teacher(runs))]
    if any(run.steps for _, run in trained):
        sections.append(training_section(trained))
    sections += [section for name, run in trained if (section := _teachers(name, run)) is not None]
    sections += sample_sections(trained)
    sections += [what_was_run(trained), *reading_sections(named)]
    sections += _missing(trained[0][1].path, {name for run in runs for name in run.readings})
    title = trained[0][0] if len(trained) == 1 else f"{len(trained)} runs compared"
    return Page(f"Headstart: {title}", lead, sections)


def teacher(runs: Sequence[Run]) -> tuple[str, Estimate] | None:
    """The teacher's own accuracy with its interval and a name that says on what it was measured; None when nowhere."""
    for run in runs:
        with suppress(KeyError, TypeError):
            own = measured(run.readings["diagnose/decay"]["teacher"])
            return ("teacher (in the diagnosis)", own) if own.value is not None else None
    return None


def _before_and_after(runs: Named) -> Section:
    """A table for the first run, those of the others in folds."""
    note = "Paired: both evaluations drew the same problems with the same random numbers; intervals are over problems."
    (name, first), *others = runs
    blocks: list[Block] = [before_and_after(name, first.points), Text(note, "soft")]
    blocks += [Fold(other, [before_and_after(other, run.points)]) for other, run in others]
    return Section("Before and after", blocks)


def _subtitle(named: Named) -> str:
    """Who learned from whom, in which folders."""
    first = named[0][1]
    student = first.setting("student", "path") or "unknown"
    teachers = first.config.get("teachers") or [first.config.get("teacher") or {}]
    master = " and ".join(one.get("path") or one.get("model") or "unknown" for one in teachers)
    folders = ", ".join(str(run.path.resolve().name) for _, run in named)
    seeds = ", ".join(sorted({str(run.setting("training", "seed")) for _, run in named}))
    started = first.environment.get("started", "at an unknown time")
    return f"{student} learning from {master}; seed {seeds}; started {started}; from {folders}."


def _missing(run: Path, have: set[str]) -> list[Section]:
    """The commands for what this page lacks; nothing when everything is there."""
    lacking = [(command.format(run=run), what) for name, command, what in REMEDIES if name not in have]
    blocks: list[Block] = [block for code, what in lacking for block in (Text(f"To know {what}:"), Code(code))]
    return [Section("What is not here", blocks)] if blocks else []


def _teachers(name: str, run: Run) -> Section | None:
    """What the student made of each of several teachers; None with one."""
    tenth = max(1, len(run.steps) // 10)
    ends, rows = (run.steps[:tenth], run.steps[-tenth:]), []
    for key in (teacher["name"] for teacher in run.config.get("teachers") or []):
        tokens, *few = (sum(step.get(f"tokens_{key}", 0) for step in some) for some in (run.steps, *ends))
        nats = [sum(step.get(f"nats_{key}", 0.0) for step in some) for some in ends]
        if tokens:
            means = (f"{value / count:.3f}" if count else NOTHING for value, count in zip(nats, few, strict=True))
            rows.append([key, f"{tokens:,.0f}", *means])
    header = (f"teacher of {name}", "tokens it scored", "nats per token, first tenth of the steps", "last tenth")
    return Section("Several teachers", [Table(header, rows)]) if rows else None


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
        fold = Fold(f"All settings that differ: {len(differ)}", [Table(("setting", *names), differ)])
        blocks.append(fold if differ else Text("No setting differs"))
    entries = list(dict.fromkeys(key for _, run in runs for key in run.environment))
    machine = [[key, *(_value(run.environment.get(key)) for _, run in runs)] for key in entries]
    blocks.append(Fold("Versions, hardware, command", [Table(("", *names), machine)]))
    unlike = [row[0] for row in machine if len(set(row[1:])) > 1 and row[0] not in ALWAYS_DIFFERENT]
    if unlike:
        blocks.append(Text(f"The runs differ in {', '.join(unlike)}, so compare their seconds with care.", "warning"))
    for name, run in runs:
        code = Code(yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True))
        blocks.append(Fold(f"Whole configuration: {name}", [code]))
    return Section("What was run", blocks)


def before_and_after(name: str, points: Sequence[Point]) -> Table:
    """First and last evaluation, reading by reading; differences are paired over problems."""
    ends = points[0], points[-1]
    theirs, ours = (point.graded() for point in ends)

    def row(title: str, key: str, values: Sequence[float | None]) -> list[str]:
        change = paired(ours.get(key, {}), theirs.get(key, {}))
        shown = [NOTHING if value is None else percent(value) for value in values]
        return [title, *shown, NOTHING if change is None else f"{change:+.1f}"]

    details = [point.evaluation.get("details", {}) for point in ends]
    rows = [row("accuracy", "correct", [point.evaluation["accuracy"] for point in ends])]
    rows += [
        row(key.replace("_", " "), key, [of.get(key) for of in details])
        for key in dict.fromkeys((*details[0], *details[1]))
    ]
    cut = [point.evaluation.get("truncated") for point in ends]
    rows[0][1:3] = [cell + cut_mark(share) for cell, share in zip(rows[0][1:3], cut, strict=True)]
    rows.append(row("stopped by itself", "stopped", [None if share is None else 1.0 - share for share in cut]))
    means = [point.evaluation.get("mean_tokens") for point in ends]
    rows.append(["mean length, tokens", *(NOTHING if m is None else f"{m:.0f}" for m in means), NOTHING])
    return Table((name, *(f"step {point.step}" for point in ends), "change in points, 95% interval"), rows)


def table_rows(runs: Named, teacher: tuple[str, Estimate] | None = None) -> list[list[str]]:
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
        rows.append([teacher[0], NOTHING, f"{teacher[1]:.1%}", *[NOTHING] * 3])
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
    joined = [(", ".join(role for role, other in roles if other is point), point) for point in points]
    return [(role, point) for role, point in joined if role]


def _row(name: str, point: Point, end: Point) -> list[str]:
    against = None if point is end else gap(point, end)
    shown = NOTHING if against is None else f"{against:+.1f}"
    cost = f"{point.generated_tokens:,}", f"{point.seconds:.1f}"
    accuracy = estimate(point.evaluation) + cut_mark(point.evaluation.get("truncated"))
    return [name, str(point.step), accuracy, shown, *cost]


def cost_section(runs: Named, teacher: tuple[str, Estimate] | None) -> Section:
    """Accuracy against seconds and generated tokens: the figure, and the points that are worth a row."""
    arms = [(name, run.points) for name, run in runs if run.points]
    levels = [("before", arms[0][1][0].accuracy)]
    levels += [("teacher", teacher[1].value or 0.0)] if teacher is not None else []
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

    spans = "; ".join(f"{n}: loss {span(r, 'loss')}, gradient norm {span(r, 'grad_norm')}" for n, r in trained)
    alt = f"Six panels over steps: loss, divergence, gradient norm, accuracy, length, share at the horizon. {spans}."
    caption = (
        "Divergence is over the sampled positions of each step, so runs with other horizons differ in what it covers. "
        "Rollouts at the horizon were cut there, which is normal: the shorter it is, the more of them."
    )
    return Section("Training", [Picture("training", to_svg(training_figure(trained)), alt, caption)])


def _short(flat: Mapping[str, Any], key: str) -> Any:
    """A setting, or the settings below it in one cell."""
    if key in flat:
        return flat[key]
    below = {k[len(key) + 1 :]: v for k, v in flat.items() if k.startswith(f"{key}.")}
    if key == "rollout.mix":  # shares of nobody are not worth a word
        below = {name: share for name, share in below.items() if share}
    return ", ".join(str(v) if k == "type" else f"{k} {_value(v)}" for k, v in below.items() if v is not None) or None


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a nested configuration."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(value: Any) -> str:
    return NOTHING if value is None else f"{value:g}" if isinstance(value, float) else str(value)
