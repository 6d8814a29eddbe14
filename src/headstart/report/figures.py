"""The pictures of a report: accuracy against cost, and teacher decay. The only file that imports matplotlib.

Figures are drawn without pyplot, so no display and no global state is involved, on a white ground, 8 inches wide
(about 800 px in a README). Colours are those of Okabe and Ito, told apart in all common forms of colour blindness.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Label = tuple[float, str, str]
"""Height in data units, text, colour."""

BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#00795a", "#a5527c", "#5c5c5c"
ARM_STYLES = ((BLUE, "o"), (VERMILION, "s"), (PURPLE, "^"), (GREEN, "D"))
FONT = 8.5
WIDTH, HEIGHT = 8.0, 3.6
DPI = 200


def accuracy_figure(results: Record) -> Figure:
    """Accuracy of every arm against training seconds and against generated tokens (log), with 95% bands.

    Dashed lines are the student before training and the teacher. A point without cost has no place on the log axis
    and is left out there.
    """
    figure, (left, right) = _panels()
    labels: list[Label] = []
    for arm, (colour, marker) in zip(results["arms"], _cycle(len(results["arms"])), strict=True):
        points = arm["points"]
        _arm_line(left, points, "seconds", colour, marker)
        _arm_line(right, [p for p in points if p["generated_tokens"] > 0], "generated_tokens", colour, marker)
        if points:
            end = points[-1]["eval"]["accuracy"]
            labels.append((end, f"{arm['name']}: {end:.1%}", colour))
    for name, key in (("teacher", "teacher"), ("student before", "student")):
        level = results[key]["accuracy"]
        labels.append((level, f"{name}: {level:.1%}", GREY))
        for axes in (left, right):
            axes.axhline(level, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    evals = [p["eval"] for arm in results["arms"] for p in arm["points"]]
    lows = [e["interval"][0] for e in (*evals, results["student"], results["teacher"])]
    left.set_xlim(left=0)
    if any(p["generated_tokens"] > 0 for arm in results["arms"] for p in arm["points"]):
        _log_axis(right)
    left.set_xlabel("training seconds")
    right.set_xlabel("generated tokens (log scale)")
    left.set_ylabel("accuracy")
    for axes in (left, right):
        _share_axis(axes, max(min(lows) - 0.05, 0.0))
    _end_labels(right, labels)
    return figure


def decay_figure(results: Record) -> Figure:
    """Accuracy of the teacher's continuation against prefix length: all prefixes, and split by their state.

    Left: after the student's prefix, after the teacher's own (the control), the share of prefixes still clean (grey
    area) and the student's own accuracy. Right: after clean and after already wrong prefixes.
    """
    points = results["decay"]["points"]
    figure, (left, right) = _panels()
    lengths = [p["prefix_tokens"] for p in points]
    clean_shares = [clean_share(p) for p in points]
    left.fill_between(lengths, clean_shares, color="#e4e4e4", linewidth=0, zorder=0)
    own = _share_line(left, points, "after_own", GREEN, "D")
    student = _share_line(left, points, "after_student", BLUE, "o")
    clean = _share_line(right, points, "after_clean", BLUE, "^")
    wrong = _share_line(right, points, "after_wrong", VERMILION, "v")
    level = _mean(results["decay"]["student"])
    left.axhline(level, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    horizons = [h for arm in results["arms"] if isinstance(h := arm["settings"].get("horizon"), int)]
    for axes in (left, right):
        _share_axis(axes, 0.0)
        _length_axis(axes, lengths, min(horizons, default=None))
    _end_labels(
        left,
        [
            (own, "after its\nown prefix", GREEN),
            (student, "after the\nstudent's", BLUE),
            (level, "student\nalone", GREY),
        ],
    )
    _end_labels(right, [(clean, "prefix\nstill clean", BLUE), (wrong, "prefix\nalready wrong", VERMILION)])
    if any(math.isfinite(share) for share in clean_shares):
        note = "grey: share of prefixes still clean"
        left.text(0.03, 0.05, note, transform=left.transAxes, color=GREY, fontsize=FONT)
    left.set_title("after all prefixes", loc="left", fontsize=FONT + 1)
    right.set_title("the student's prefixes, split", loc="left", fontsize=FONT + 1)
    left.set_ylabel("accuracy of the teacher's continuation")
    return figure


def clean_share(point: Record) -> float:
    """Share of the student's prefixes that are still clean, of those known to be clean or wrong; NaN without any."""
    clean, wrong = point["after_clean"]["n"], point["after_wrong"]["n"]
    return clean / (clean + wrong) if clean + wrong else math.nan


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, 1600 px wide."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """The figure as SVG text: letters drawn as outlines, no date, so that it looks and reads the same everywhere."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "headstart"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def _panels() -> tuple[Figure, tuple[Axes, Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    return figure, (left, right)


def _cycle(n: int) -> list[tuple[str, str]]:
    return [ARM_STYLES[i % len(ARM_STYLES)] for i in range(n)]


def _mean(share: Record) -> float:
    return share["successes"] / share["n"] if share["n"] else math.nan


def _arm_line(axes: Axes, points: Sequence[Record], cost: str, colour: str, marker: str) -> None:
    xs = [p[cost] for p in points]
    _banded_line(
        axes,
        xs,
        [p["eval"]["accuracy"] for p in points],
        [p["eval"]["interval"] for p in points],
        (colour, marker),
    )


def _share_line(axes: Axes, points: Sequence[Record], key: str, colour: str, marker: str) -> float:
    """Draws one curve and returns its height at the last length that has one (NaN without any)."""
    shares = [p[key] for p in points]
    means = [_mean(share) for share in shares]
    intervals = [(s["low"], s["high"]) if s["n"] else (math.nan, math.nan) for s in shares]
    _banded_line(axes, [p["prefix_tokens"] for p in points], means, intervals, (colour, marker))
    return next((mean for mean in reversed(means) if math.isfinite(mean)), math.nan)


def _banded_line(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    intervals: Sequence[Sequence[float]],
    style: tuple[str, str],
) -> None:
    colour, marker = style
    axes.plot(xs, ys, color=colour, marker=marker, markersize=4, linewidth=1.8, zorder=3)
    axes.fill_between(
        xs, [i[0] for i in intervals], [i[1] for i in intervals], color=colour, alpha=0.16, linewidth=0, zorder=2
    )


def _share_axis(axes: Axes, bottom: float) -> None:
    """Shares as whole percentages, light grid, no box."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(bottom, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(FONT + 0.5)


def _log_axis(axes: Axes) -> None:
    """Powers of ten, with 2 and 5 between them, as 500, 1k, 2k ..."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _length_axis(axes: Axes, lengths: Sequence[int], horizon: int | None) -> None:
    """Prefix lengths, each measured one a tick, doubling at equal distance; the horizon as a dotted line."""
    axes.set_xscale("symlog", base=2, linthresh=4, linscale=0.6)
    axes.set_xticks(list(lengths), [str(length) for length in lengths])
    axes.minorticks_off()
    if len(lengths) > 1:
        axes.set_xlim(min(lengths) - 0.6, max(lengths) * 1.15)
    axes.set_xlabel("prefix length (tokens)")
    if horizon is not None and lengths and min(lengths) <= horizon <= max(lengths):
        axes.axvline(horizon, color=GREY, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(f"N = {horizon}", (horizon, 0.68), (4, 0), textcoords="offset points", color=GREY, fontsize=FONT)


def _end_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Names at the right edge, beside where their curves end, moved apart as far as they would overlap."""
    shown = sorted((label for label in labels if math.isfinite(label[0])), key=lambda label: label[0])
    bottom, top = axes.get_ylim()
    lines = max((text.count("\n") + 1 for _, text, _ in shown), default=1)
    step = 0.062 * lines * (top - bottom)
    heights = spread([height for height, _, _ in shown], step)
    for height, (_, text, colour) in zip(heights, shown, strict=True):
        axes.text(
            1.02,
            height,
            text,
            transform=axes.get_yaxis_transform(),
            color=colour,
            fontsize=FONT,
            va="center",
            linespacing=1.0,
        )


def spread(heights: Sequence[float], step: float) -> list[float]:
    """Ascending `heights` moved apart to at least `step`, each group of neighbours around its own middle."""
    groups: list[tuple[float, int]] = []
    for height in heights:
        middle, size = height, 1
        while groups and middle - groups[-1][0] < step * (size + groups[-1][1]) / 2:
            before, count = groups.pop()
            middle, size = (middle * size + before * count) / (size + count), size + count
        groups.append((middle, size))
    return [middle + step * (i - (size - 1) / 2) for middle, size in groups for i in range(size)]
