"""The pictures of runs and of teacher decay, and what all pictures share. Only report/figures*.py import matplotlib.

Figures are drawn without pyplot, so no display and no global state is involved, on a white ground, 8 inches wide
(about 800 px). Colours are those of Okabe and Ito, told apart in all common forms of colour blindness.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headstart.reports.run import Point, Record, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#00795a", "#a5527c", "#5c5c5c"
STYLES = (
    (BLUE, "o"), (VERMILION, "s"), (PURPLE, "^"), (GREEN, "D"), ("#b07a00", "v"), ("#2b8fc4", "P"), ("#3a3a3a", "X"),
    ("#8a4b2d", "<"),
)  # fmt: skip
DASHED = (0, (4, 3))
FONT = 8.5
WIDTH, HEIGHT = 8.0, 3.6
NAN = math.nan


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line; unknown heights are NaN. `band` holds the interval of each height."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    band: Sequence[tuple[float, float]] | None
    colour: str
    marker: str

    @property
    def end(self) -> float:
        """Height at the last place that has one."""
        return next((y for y in reversed(self.ys) if math.isfinite(y)), NAN)


def accuracy_figure(arms: Sequence[tuple[str, Sequence[Point]]], levels: Sequence[tuple[str, float]] = ()) -> Figure:
    """Accuracy of every arm against training seconds and against generated tokens (log), with 95% bands.

    `levels` are dashed lines, such as the teacher's accuracy. A point without cost has no place on the log axis and is
    left out there.
    """
    figure, (left, right) = panels(1, 2, sharey=True)
    for place, (name, points) in enumerate(arms):
        costly = [p for p in points if p.generated_tokens > 0]
        draw(left, _accuracy(name, [p.seconds for p in points], points, place))
        draw(right, _accuracy(name, [p.generated_tokens for p in costly], costly, place))
    for _, level in levels:
        for axes in (left, right):
            axes.axhline(level, color=GREY, linewidth=1, linestyle=DASHED, zorder=1)
    lows = [p.evaluation["interval"][0] for _, points in arms for p in points] + [level for _, level in levels]
    left.set_xlim(left=0)
    if any(p.generated_tokens > 0 for _, points in arms for p in points):
        _log_axis(right)
    finish(left, "training seconds", "accuracy")
    finish(right, "generated tokens (log scale)")
    share_axis(left, max(min(lows, default=0.0) - 0.05, 0.0))
    ends = [(points[-1].accuracy, name, colour(place)) for place, (name, points) in enumerate(arms) if points]
    labels = [(level, f"{name}: {level:.1%}", shade) for level, name, shade in ends]
    end_labels(right, labels + [(level, f"{name}: {level:.1%}", GREY) for name, level in levels])
    return figure


def training_figure(runs: Sequence[tuple[str, Run]]) -> Figure:
    """Six small panels over steps: loss, divergence, gradient norm, accuracy, completion length, share stopped."""
    figure, axes = panels(2, 3, height=4.6)
    kinds = (
        ("loss", "loss (nats)"),
        ("divergence", "divergence (nats per token)"),
        ("grad_norm", "gradient norm"),
        ("", "accuracy at evaluations"),
        ("completion_length_mean", "completion length (tokens)"),
        ("share_stopped", "share that stopped"),
    )
    for panel, (key, title) in zip(axes, kinds, strict=True):
        for place, (name, run) in enumerate(runs):
            if key:
                xs, ys = [s["step"] for s in run.steps], [number(s.get(key)) for s in run.steps]
                panel.plot(xs, ys, color=colour(place), linewidth=1.3, label=name)
            else:
                draw(panel, _accuracy(name, [p.step for p in run.points], run.points, place))
        finish(panel, "step" if panel in axes[3:] else "")
        panel.set_title(title, loc="left", fontsize=FONT + 0.5)
        if key in ("", "share_stopped"):
            share_axis(panel, 0.0)
        else:
            panel.set_ylim(bottom=0)
    if len(runs) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=3, fontsize=FONT, frameon=False)
    return figure


def decay_figure(decay: Record, window: tuple[int, int, int] | None = None) -> Figure:
    """Accuracy of continuations against prefix length; `window` (low, N, high) is marked.

    Left: both models, each finishing its own and the other's prefixes. Right: the teacher after the student's prefix,
    by its state.
    """
    points = decay["points"]
    figure, (left, right) = panels(1, 2, sharey=True)
    curves = (
        (left, "teacher after\nits own", "after_own", GREEN, "D"),
        (left, "teacher after\nthe student's", "after_student", BLUE, "o"),
        (left, "student after\nthe teacher's", "gift", VERMILION, "s"),
        (left, "student after\nits own", "student_continues", GREY, "v"),
        (right, "still clean", "after_clean", BLUE, "^"),
        (right, "already\nfinished", "after_finished", GREEN, "D"),
        (right, "already\nwrong", "after_wrong", VERMILION, "v"),
    )
    lengths = [p["prefix_tokens"] for p in points]
    labels: dict[Any, list[tuple[float, str, str]]] = {left: [], right: []}
    for axes, name, key, shade, marker in curves:
        shares = [p.get(key) or {"n": 0} for p in points]
        ys = [s["successes"] / s["n"] if s["n"] else NAN for s in shares]
        band = [(s["low"], s["high"]) if s["n"] else (NAN, NAN) for s in shares]
        curve = Curve(name, lengths, ys, band, shade, marker)
        draw(axes, curve)
        labels[axes].append((curve.end, name, shade))
    titles = ((left, "all prefixes"), (right, "teacher after the student's prefix, by its state"))
    for axes, title in titles:
        finish(axes, "prefix length (tokens)")
        share_axis(axes, 0.0)
        _length_axis(axes, lengths, window)
        end_labels(axes, labels[axes])
        axes.set_title(title, loc="left", fontsize=FONT + 0.5)
    left.set_ylabel("accuracy" if decay.get("labelled", True) else "agreement with the teacher's majority")
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as SVG text: letters drawn as outlines, no date, so that it looks and reads the same everywhere."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a name is no formula, and may hold what no font can draw
        text.set_text(text.get_text().replace("$", r"\$").encode(errors="backslashreplace").decode())
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "headstart"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def panels(rows: int, columns: int, height: float = HEIGHT, **options: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def colour(place: int) -> str:
    """The colour of the place-th arm."""
    return STYLES[place % len(STYLES)][0]


def number(value: Any) -> float:
    """A figure as it is; NaN where there is none."""
    return float(value) if value is not None else NAN


def interval(value: Mapping[str, Any] | None) -> tuple[float, tuple[float, float]]:
    """Value and bounds of an estimate (`value`, `low`, `high`), NaN where it is undefined."""
    if not value or value.get("value") is None:
        return NAN, (NAN, NAN)
    return value["value"], (value["low"], value["high"])


def draw(axes: Axes, curve: Curve) -> None:
    """The line with its markers and band."""
    axes.plot(curve.xs, curve.ys, color=curve.colour, marker=curve.marker, markersize=4, linewidth=1.8, zorder=3)
    if curve.band is not None:
        lows, highs = [low for low, _ in curve.band], [high for _, high in curve.band]
        axes.fill_between(curve.xs, lows, highs, color=curve.colour, alpha=0.14, linewidth=0, zorder=2)


def finish(axes: Axes, xlabel: str = "", ylabel: str = "") -> None:
    """Light grid, no box, small letters."""
    axes.set_xlabel(xlabel, fontsize=FONT + 0.5)
    axes.set_ylabel(ylabel, fontsize=FONT + 0.5)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)


def share_axis(axes: Axes, bottom: float) -> None:
    """Shares from `bottom` to one, as whole percentages."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(bottom, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names (height, text, colour) at the right edge, beside where their curves end, moved apart where they overlap."""
    scale = axes.transScale + axes.transLimits
    known = [label for label in labels if math.isfinite(label[0])]
    shown = sorted(((float(scale.transform((1, h))[1]), text, shade) for h, text, shade in known))
    lines = max((text.count("\n") + 1 for _, text, _ in shown), default=1)
    heights = spread([height for height, _, _ in shown], 0.062 * lines)
    for height, (_, text, shade) in zip(heights, shown, strict=True):
        axes.text(
            1.02, height, text, transform=axes.transAxes, color=shade, fontsize=FONT, va="center", linespacing=1.0
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


def _accuracy(name: str, xs: Sequence[float], points: Sequence[Point], place: int) -> Curve:
    band = [(p.evaluation["interval"][0], p.evaluation["interval"][1]) for p in points]
    return Curve(name, xs, [p.accuracy for p in points], band, *STYLES[place % len(STYLES)])


def _log_axis(axes: Axes) -> None:
    """Powers of ten, with 2 and 5 between them, as 500, 1k, 2k ..."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _length_axis(axes: Axes, lengths: Sequence[int], window: tuple[int, int, int] | None) -> None:
    """Prefix lengths, each measured one a tick, doubling at equal distance; the window grey, its N a dotted line."""
    axes.set_xscale("symlog", base=2, linthresh=4, linscale=0.6)
    axes.set_xticks(list(lengths), [str(length) for length in lengths])
    axes.minorticks_off()
    if len(lengths) > 1:
        axes.set_xlim(min(lengths) - 0.6, max(lengths) * 1.15)
    if window is not None:
        low, chosen, high = window
        axes.axvspan(low, high, color="#efefef", linewidth=0, zorder=0)
        axes.axvline(chosen, color=GREY, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(f"N = {chosen}", (chosen, 0.02), (4, 0), textcoords="offset points", color=GREY, fontsize=FONT)
