"""The figures of runs, diagnoses and explanations. Only this file imports matplotlib.

Figures are drawn without pyplot, so no display and no global state is involved, on a white ground, 8 inches wide
(about 800 px). Colours follow Okabe and Ito, distinguishable in all common forms of colour blindness.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headstart.reports.run import Point, Record, Run
from headstart.reports.wording import measured
from headstart.stats import Z95

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
Label = tuple[float, str, str]
"""Height, text and colour of a name at the right edge."""
MODELS = {"before": "before", "after": "after", "twin": "full rollouts", "teacher": "teacher"}
"""The models of an explanation as the page names them."""
LINES = {
    "before": (GREY, "-"), "after": (BLUE, "-"), "twin": (VERMILION, "--"), "teacher": (GREEN, ":"),
    "fixed": (PURPLE, "-"),
}  # fmt: skip
PHASES = (("rollout", BLUE), ("teacher", GREEN), ("student", VERMILION), ("optimizer", GREY))


def accuracy_figure(arms: Sequence[tuple[str, Sequence[Point]]], levels: Sequence[tuple[str, float]] = ()) -> Figure:
    """Accuracy of every arm against training seconds and against generated tokens (log), with 95% bands.

    `levels` are dashed lines, such as the teacher's accuracy. The log axis leaves out points without cost.
    """
    figure, (left, right) = panels(1, 2, sharey=True)
    for slot, (name, points) in enumerate(arms):
        costly = [p for p in points if p.generated_tokens > 0]
        _draw_accuracy(left, name, [p.seconds for p in points], points, slot)
        _draw_accuracy(right, name, [p.generated_tokens for p in costly], costly, slot)
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
    ends = [(points[-1].accuracy, name, colour(slot)) for slot, (name, points) in enumerate(arms) if points]
    ends += [(level, name, GREY) for name, level in levels]
    end_labels(right, [(level, f"{name}: {level:.1%}", shade) for level, name, shade in ends])
    return figure


def training_figure(runs: Sequence[tuple[str, Run]]) -> Figure:
    """Six small panels over steps: loss, divergence, gradient norm, accuracy, length, share at the horizon."""
    figure, axes = panels(2, 3, height=4.6)
    kinds = (
        ("loss", "loss (nats)"),
        ("divergence", "divergence (nats per token)"),
        ("grad_norm", "gradient norm"),
        ("", "accuracy at evaluations"),
        ("completion_length_mean", "completion length (tokens)"),
        ("share_reached_horizon", "share at the horizon"),
    )
    for panel, (key, title) in zip(axes, kinds, strict=True):
        for slot, (name, run) in enumerate(runs):
            if key:
                xs, ys = [s["step"] for s in run.steps], [number(s.get(key)) for s in run.steps]
                panel.plot(xs, ys, color=colour(slot), linewidth=1.3, label=name)
            else:
                _draw_accuracy(panel, name, [p.step for p in run.points], run.points, slot)
        finish(panel, "step" if panel in axes[3:] else "")
        panel.set_title(title, loc="left", fontsize=FONT + 0.5)
        if key in ("", "share_reached_horizon"):
            share_axis(panel, 0.0)
        else:
            panel.set_ylim(bottom=0)
    if len(runs) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=3, fontsize=FONT, frameon=False)
    return figure


def decay_figure(decay: Record, window: tuple[int, int, int] | None = None) -> Figure:
    """Accuracy of continuations against prefix length; `window` (low, N, high) is marked.

    Left: both models, each finishing its own and the other's prefixes. Right, for a task that can tell right prefixes
    from wrong ones: the teacher after the student's prefix, by its state.
    """
    points = decay["points"]
    known = any((p.get(key) or {}).get("n") for p in points for key in ("after_clean", "after_wrong"))
    kinds = (
        (
            "all prefixes",
            ("teacher after\nits own", "after_own", GREEN, "D"),
            ("teacher after\nthe student's", "after_student", BLUE, "o"),
            ("student after\nthe teacher's", "gift", VERMILION, "s"),
            ("student after\nits own", "student_continues", GREY, "v"),
        ),
        (
            "teacher after the student's prefix, by its state",
            ("still clean", "after_clean", BLUE, "^"),
            ("already\nfinished", "after_finished", GREEN, "D"),
            ("already\nwrong", "after_wrong", VERMILION, "v"),
        ),
    )[: 1 + known]
    figure, everything = panels(1, len(kinds), sharey=True)
    lengths = [p["prefix_tokens"] for p in points]
    for axes, (title, *curves) in zip(everything, kinds, strict=True):
        labels = [
            draw(axes, name, lengths, [interval(p.get(key)) for p in points], shade, marker)
            for name, key, shade, marker in curves
        ]
        finish(axes, "prefix length (tokens)")
        share_axis(axes, 0.0)
        _length_axis(axes, lengths, window)
        end_labels(axes, labels)
        axes.set_title(title, loc="left", fontsize=FONT + 0.5)
    everything[0].set_ylabel("accuracy" if decay.get("labelled", True) else "agreement with the teacher's majority")
    return figure


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
            read = [(number(r.get("mean")), Z95 * number(r.get("se"))) for r in (b.get(key) or {} for b in bins)]
            values = [(mean, (mean - half, mean + half)) for mean, half in read]
            name = names.get(key, key.replace("_", "\n"))
            labels.append(draw(axes, name, range(len(bins)), values, shade, marker))
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
    for key, name, marker in (
        ("before", "before", "o"),
        ("after", "after", "s"),
        ("fixed", "after, on\nold rollouts", "^"),
    ):
        values = [interval(b["levels"].get(key)) for b in bins]
        labels.append(draw(left, name, range(len(bins)), values, LINES[key][0], marker))
    edge = next((i for i, b in enumerate(bins) if b["first"] >= cascade["first"]), 0)
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


def lengths_figure(models: Mapping[str, Record]) -> Figure:
    """How long responses are: shares of rollouts by length, one outline a model."""
    figure, (axes,) = panels(1, 1, height=2.8)
    highest = 0.0
    for name, model in models.items():
        counts, edges = model["lengths"]["rollouts"], model["lengths"]["edges"]
        shares = [count / (sum(counts) or 1) for count in counts]
        shade, line = LINES[name]
        axes.stairs(shares, edges, color=shade, linewidth=1.7, linestyle=line, label=MODELS[name])
        highest = max(highest, *shares)
    share_axis(axes, 0.0)
    axes.set_ylim(0, 1.08 * highest)
    finish(axes, "response length (tokens)", "share of responses")
    _legend(axes)
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
    _legend(axes)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as SVG text: letters drawn as outlines, no date, so that it looks and reads the same everywhere."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # names are not formulas, and may hold characters no font has
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


def colour(slot: int) -> str:
    """The colour of arm number `slot`."""
    return STYLES[slot % len(STYLES)][0]


def number(value: Any) -> float:
    """A float; NaN for None."""
    return float(value) if value is not None else NAN


def interval(record: Record | None) -> tuple[float, tuple[float, float]]:
    """Value and bounds of an estimate, NaN where it is undefined."""
    read = measured(record)
    return (NAN, (NAN, NAN)) if read.value is None else (read.value, (read.low, read.high))


def draw(
    axes: Axes,
    name: str,
    xs: Sequence[float],
    values: Sequence[tuple[float, tuple[float, float]]],
    shade: str,
    marker: str,
) -> Label:
    """A line with its markers and band, unknown heights being NaN; returns the label of its last known height."""
    ys, band = [y for y, _ in values], [bounds for _, bounds in values]
    axes.plot(xs, ys, color=shade, marker=marker, markersize=4, linewidth=1.8, zorder=3)
    lows, highs = [low for low, _ in band], [high for _, high in band]
    axes.fill_between(xs, lows, highs, color=shade, alpha=0.14, linewidth=0, zorder=2)
    return next((y for y in reversed(ys) if math.isfinite(y)), NAN), name, shade


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


def end_labels(axes: Axes, labels: Sequence[Label]) -> None:
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


def _draw_accuracy(axes: Axes, name: str, xs: Sequence[float], points: Sequence[Point], slot: int) -> None:
    draw(axes, name, xs, [interval(p.evaluation) for p in points], *STYLES[slot % len(STYLES)])


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


def dots(axes: Axes, rows: Sequence[tuple[str, Record | None]], xlabel: str) -> None:
    """Rows from top to bottom: a dot at the value, a line over the interval; undefined ones stay empty."""
    for y, (_, estimate) in enumerate(rows):
        value, (low, high) = interval(estimate)
        axes.plot([low, high], [y, y], color=BLUE, linewidth=1.6)
        axes.plot([value], [y], "o", color=BLUE, markersize=5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    finish(axes, xlabel)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.7)


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=FONT, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))


def _bin_axis(axes: Axes, bins: Sequence[Record]) -> None:
    axes.set_xticks(range(len(bins)), [str(b["first"]) for b in bins])
