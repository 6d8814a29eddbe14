"""The pictures of position readings and of explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from headstart.reports.figures import (
    BLUE,
    DASHED,
    FONT,
    GREEN,
    GREY,
    PURPLE,
    STYLES,
    VERMILION,
    Curve,
    draw,
    end_labels,
    finish,
    interval,
    number,
    panels,
    share_axis,
)
from headstart.reports.run import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VOICES = {"before": "before", "after": "after", "twin": "full rollouts", "teacher": "teacher"}
"""Who speaks in an explanation, as a reader knows them."""
COLOURS = {
    "before": (GREY, "-"),
    "after": (BLUE, "-"),
    "twin": (VERMILION, "--"),
    "teacher": (GREEN, ":"),
    "fixed": (PURPLE, "-"),
}
PHASES = (("rollout", BLUE), ("teacher", GREEN), ("student", VERMILION), ("optimizer", GREY))


def positions_figure(positions: Record) -> Figure:
    """By position. Left: mean divergence with its spread over rollouts, and both entropies. Right: the cumulative share
    of the divergence, teacher confidence, arg-max agreement, top-k overlap."""
    bins = positions["bins"]
    figure, (left, right) = panels(1, 2)
    nats = (("divergence", BLUE, "o"), ("student_entropy", VERMILION, "s"), ("teacher_entropy", GREEN, "D"))
    shares = (("agree", BLUE, "o"), ("teacher_top", GREEN, "D"), ("overlap", VERMILION, "s"))
    names = {"agree": "favourites\nagree", "teacher_top": "teacher\nconfidence", "overlap": "top-k\noverlap"}
    for axes, kinds in ((left, nats), (right, shares)):
        labels = []
        for key, shade, marker in kinds:
            read = [b.get(key) or {} for b in bins]
            ys, se = [number(r.get("mean")) for r in read], [1.96 * number(r.get("se")) for r in read]
            band = [(y - s, y + s) for y, s in zip(ys, se, strict=True)]
            curve = Curve(names.get(key, key.replace("_", "\n")), range(len(bins)), ys, band, shade, marker)
            draw(axes, curve)
            labels.append((curve.end, curve.name, shade))
        if axes is right:
            covered = [number(b.get("divergence_share")) for b in bins]
            axes.plot(range(len(bins)), covered, color=GREY, linestyle=DASHED, linewidth=1.6)
            labels.append((covered[-1], "divergence\nso far", GREY))
            share_axis(axes, 0.0)
        else:
            axes.set_yscale("log")
        finish(axes, "completion position", "nats per token, log scale" if axes is left else "")
        _bin_axis(axes, bins)
        end_labels(axes, labels)
    return figure


def cascade_figure(cascade: Record) -> Figure:
    """Left: divergence by position, before, after, and after on the rollouts of before. Right: the change on untrained
    positions, and its two parts, with intervals."""
    bins = cascade["bins"]
    figure, (left, right) = panels(1, 2, width_ratios=(1.6, 1))
    labels = []
    for (key, name), (_, marker) in zip(
        (("before", "before"), ("after", "after"), ("fixed", "after, on\nold rollouts")), STYLES, strict=False
    ):
        read = [interval(b["levels"].get(key)) for b in bins]
        curve = Curve(name, range(len(bins)), [y for y, _ in read], [b for _, b in read], COLOURS[key][0], marker)
        draw(left, curve)
        labels.append((curve.end, name, COLOURS[key][0]))
    edge = next((place for place, b in enumerate(bins) if b["first"] >= cascade["first"]), 0)
    if cascade.get("untrained") and edge:
        left.axvline(edge - 0.5, color=GREY, linewidth=1, linestyle=":")
        note = ((edge - 0.45), 0.94)
        left.annotate("never trained", note, xycoords=left.get_xaxis_transform(), color=GREY, fontsize=FONT)
    left.set_yscale("log")
    finish(left, "completion position", "divergence (nats per token, log scale)")
    _bin_axis(left, bins)
    end_labels(left, labels)
    parts = [(name, cascade["parts"].get(name)) for name in ("change", "mixture", "within")]
    dots(right, parts, "change on untrained positions (nats)")
    right.axvline(0, color=GREY, linewidth=1)
    return figure


def lengths_figure(speakers: Mapping[str, Record]) -> Figure:
    """How long responses are: shares of rollouts by length, one outline a speaker."""
    figure, (axes,) = panels(1, 1, height=2.8)
    highest = 0.0
    for name, speaker in speakers.items():
        lengths = speaker["lengths"]
        counts, edges = lengths["rollouts"], lengths["edges"]
        total = sum(counts) or 1
        shares = [count / total for count in counts]
        shade, line = COLOURS[name]
        axes.stairs(shares, edges, color=shade, linewidth=1.7, linestyle=line, label=VOICES[name])
        highest = max(highest, *shares)
    share_axis(axes, 0.0)
    axes.set_ylim(0, 1.08 * highest)
    finish(axes, "response length (tokens)", "share of responses")
    axes.legend(fontsize=FONT, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def dots_figure(rows: Sequence[tuple[str, Record | None]], xlabel: str) -> Figure:
    """One estimate a row, with its interval."""
    figure, (axes,) = panels(1, 1, height=0.7 + 0.26 * len(rows))
    dots(axes, rows, xlabel)
    return figure


def phases_figure(runs: Sequence[tuple[str, Record]]) -> Figure:
    """Seconds of a step by phase, one bar a run."""
    figure, (axes,) = panels(1, 1, height=0.9 + 0.4 * len(runs))
    lefts = [0.0] * len(runs)
    for phase, shade in PHASES:
        widths = [run["phases"].get(phase, 0.0) / max(run["steps"], 1) for _, run in runs]
        axes.barh([name for name, _ in runs], widths, left=lefts, color=shade, height=0.6, label=phase)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.invert_yaxis()
    finish(axes, "seconds of a step")
    axes.grid(visible=False)
    axes.legend(fontsize=FONT, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def dots(axes: Axes, rows: Sequence[tuple[str, Record | None]], xlabel: str) -> None:
    """Rows from top to bottom: a dot at the value, a line over the interval; undefined ones stay empty."""
    for place, (_, estimate) in enumerate(rows):
        value, (low, high) = interval(estimate)
        axes.plot([low, high], [place, place], color=BLUE, linewidth=1.6)
        axes.plot([value], [place], "o", color=BLUE, markersize=5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    finish(axes, xlabel)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.7)


def _bin_axis(axes: Axes, bins: Sequence[Record]) -> None:
    axes.set_xticks(range(len(bins)), [str(b["first"]) for b in bins])
