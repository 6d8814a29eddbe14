"""A study's page, its tables and their summary in words. `~` marks a difference to the reference within noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from headstart.config.text import write_yaml
from headstart.reports.figures import accuracy_figure, to_svg
from headstart.reports.page import Block, Code, Fold, Page, Picture, Section, Table, Text
from headstart.reports.run import Point, Record
from headstart.reports.wording import NOTHING, cut_mark, estimate, percent
from headstart.stats import Estimate, crossed_means, cut_note, interval
from headstart.study.table import scores_at

RULES = (
    "Accuracies are means over seeds and problems, with 95% intervals from resampling both. Equal cost is read off "
    "each run's curve on the straight line between the two evaluations around it, never beyond the last; “-” is an arm "
    "that did not get there. ~ marks what is within noise of the reference: the paired, resampled difference has a "
    "Holm-adjusted p of 0.05 or more over all arms of the column. With three seeds an interval is rough."
)
ONE_SEED = "There is one seed: intervals and tests say nothing of another."
COSTS = (
    "Reached: seeds that got to the target, {}, at any time; tokens and seconds: its mean price for these. All "
    "tokens and all s: a whole run. Below: seeds that ended below the start. Cut: responses that did not stop by "
    "themselves at the end. Length in tokens. GiB: the highest of any seed, evaluations during the run included."
)


def study_page(record: Record, text: str = "") -> Page:
    """The whole page; `text` is the study's own YAML."""
    table, arms = record["table"], record["arms"]
    seeds = ", ".join(str(cell["seed"]) for cell in arms[0]["cells"])
    lead: list[Block] = [Text(f"{len(arms)} arms, seeds {seeds}, reference: {record['reference']}.", "soft")]
    lead += [Text(line, "outcome") for line in outcome(record)]
    tested = [[arm["name"], *(_tested(c["arms"][arm["name"]]) for c in table["columns"])] for arm in arms]
    differences = Table(("arm", *titles(record)), tested)
    target = NOTHING if table["target"] is None else percent(table["target"])
    rules = RULES if len(arms[0]["cells"]) > 1 else f"{RULES} {ONE_SEED}"
    tests = Fold("Differences to the reference in points, with raw and Holm-adjusted p", [differences])
    sections = [
        Section("Accuracy at equal cost", [accuracy_table(record), _picture(record), Text(rules, "soft"), tests]),
        Section("Cost and stability", [cost_table(record), Text(COSTS.format(target), "soft")]),
    ]
    if any(arm["trials"] for arm in arms):
        sections.append(_tuning(record))
    machine = [[key, str(value)] for key, value in record["environment"].items() if value is not None]
    folds: list[Block] = [Fold("The study", [Code(text)])] if text else []
    changes = write_yaml({arm["name"]: arm["changes"] for arm in arms})
    folds += [
        Fold("What each arm changes", [Code(changes)]),
        Fold("Versions, hardware", [Table(("", "first cell"), machine)]),
    ]
    sections.append(Section("What was run", folds))
    return Page(record["question"] or "Headstart: a study", lead, sections)


def titles(record: Record) -> list[str]:
    """Heads of the table's columns."""
    names = {"end": "end of the run", "chosen": "step chosen on dev", "steps": "{:,} steps", "tokens": "{:,} tokens"}
    return [
        f"{column['cost']:.2g} s" if column["at"] == "seconds" else names[column["at"]].format(column["cost"])
        for column in record["table"]["columns"]
    ]


def accuracy_table(record: Record) -> Table:
    """One row per arm: its learning rate and its accuracy at each equal cost."""
    rows = []
    for arm in record["arms"]:
        cells = [_accuracy(column["arms"][arm["name"]]) for column in record["table"]["columns"]]
        lr = NOTHING if arm["lr"] is None else f"{arm['lr']:g}"
        rows.append([_name(record, arm), lr, *cells])
    return Table(("arm", "lr", *titles(record)), rows)


def cost_table(record: Record) -> Table:
    """One row per arm: the price of the target, what the whole run took, and how it ended."""
    rows = []
    for arm in record["arms"]:
        cost = record["table"]["costs"][arm["name"]]
        price, end = cost["to_target"], cost["end"]
        paid = [f"{price['tokens']:,.0f}", f"{price['seconds']:.1f}"] if price else [NOTHING, NOTHING]
        rows.append([
            _name(record, arm), f"{cost['reached']}/{cost['seeds']}", *paid, f"{end['tokens']:,.0f}",
            f"{end['seconds']:.1f}", f"{cost['below_start']}/{cost['seeds']}", percent(cost["truncated"]),
            f"{cost['mean_tokens']:.0f}", f"{cost['peak_memory_gib']:.2f}",
        ])  # fmt: skip
    header = ("arm", "reached", "tokens", "seconds", "all tokens", "all s", "below", "cut", "length", "GiB")
    return Table(header, rows)


def outcome(record: Record) -> list[str]:
    """A sentence for each column: which arms are above the reference, below it, or within noise of it. Before them,
    one for each run that failed."""
    failed = [(arm["name"], cell) for arm in record["arms"] for cell in arm["cells"] if cell.get("failed")]
    sentences = [f"{name}, seed {cell['seed']}, failed: {cell['failed']}." for name, cell in failed]
    for title, column in zip(titles(record), record["table"]["columns"], strict=True):
        base = column["arms"][record["reference"]]
        if base is None:
            continue
        groups: dict[str, list[str]] = {"above": [], "below": [], "within noise of it": []}
        for name, entry in column["arms"].items():
            if entry and "difference" in entry:
                gap = entry["difference"]
                kind = "within noise of it" if gap["noise"] else "above" if gap["value"] > 0 else "below"
                groups[kind].append(f"{name} ({percent(entry['accuracy'])})")
        parts = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in groups.items() if names)
        sentences.append(
            f"At {title}, {record['reference']} has {percent(base['accuracy'])}. {parts[:1].upper()}{parts[1:]}."
        )
    cut = ((arm["name"], cut_note(record["table"]["costs"][arm["name"]]["truncated"], None)) for arm in record["arms"])
    return sentences + [f"{name}, at the end: {note}." for name, note in cut if note]


def _name(record: Record, arm: Record) -> str:
    failed = sum(bool(cell.get("failed")) for cell in arm["cells"])
    reference = " (ref.)" if arm["name"] == record["reference"] else ""
    cut = cut_mark(record["table"]["costs"][arm["name"]]["truncated"])
    return f"{arm['name']}{reference}" + (f" ({failed} of {len(arm['cells'])} failed)" if failed else "") + cut


def _accuracy(entry: Record | None) -> str:
    value, _, bounds = estimate(entry).replace(", ", ",\u00a0").partition(" ")
    noise = "\u00a0~" if (entry or {}).get("difference", {}).get("noise") else ""
    return f"{value}{noise} {bounds}".rstrip()


def _tested(entry: Record | None) -> str:
    gap = (entry or {}).get("difference")
    if not gap:
        return NOTHING
    points = Estimate(*(100 * gap[key] for key in ("value", "low", "high")))
    return f"{points:+.1f} p {gap['p']:.4f}, {gap['p_holm']:.4f}"


def _picture(record: Record) -> Picture:
    curves = [(arm["name"], mean_curve(arm)) for arm in record["arms"]]
    start = curves[0][1][0].accuracy
    ends = "; ".join(f"{name} ends at {percent(points[-1].accuracy)}" for name, points in curves)
    return Picture(
        "accuracy",
        to_svg(accuracy_figure(curves, [("before", start)])),
        f"Accuracy against training seconds and against generated tokens, a curve for each arm. {ends}.",
        "Means over seeds, at the mean cost of each evaluation; bands are 95% intervals over seeds and problems.",
    )


def mean_curve(arm: Record) -> Sequence[Point]:
    """The evaluations of an arm's runs, averaged over its seeds."""
    points = []
    for seeds in zip(*(cell["points"] for cell in arm["cells"]), strict=False):  # one that failed has fewer
        step = seeds[0]["step"]
        scores = scores_at(arm, "steps", step)
        assert scores is not None
        evaluation = {"accuracy": float(scores.mean()), "interval": interval(crossed_means(scores))}
        seconds, tokens = (fmean(point[key] for point in seeds) for key in ("seconds", "tokens"))
        points.append(Point(step, seconds, round(tokens), evaluation, Path()))
    return points


def _tuning(record: Record) -> Section:
    """Development accuracy at the end of the trials, by rate; what was chosen is starred."""
    rates = sorted({trial["rate"] for arm in record["arms"] for trial in arm["trials"]})

    def end(arm: Record, rate: float) -> str:
        trials = [trial for trial in arm["trials"] if trial["rate"] == rate]
        failed = " failed" if any(trial.get("failed") for trial in trials) else ""
        return percent(fmean(trial["curve"][-1][1] for trial in trials)) + failed + (" *" if rate == arm["lr"] else "")

    rows = [[arm["name"], *(end(arm, rate) for rate in rates), str(arm["chosen_step"])] for arm in record["arms"]]
    note = (
        "* is used: the best at the end of the trials; one that failed ends at 0. The chosen step is that rate's best."
    )
    header = ("arm", *(f"lr {rate:g}" for rate in rates), "chosen step")
    return Section("Tuning on development problems", [Table(header, rows), Text(note, "soft")])
