"""The quickstart's table, sentence, pictures and page, on made-up results for both pairs and for degenerate ones."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.numerics.estimators import wilson
from headstart.report.comparison import at_equal_steps, first_level_with, first_past, gap, last_within
from headstart.report.figures import accuracy_figure, decay_figure, spread, to_png, to_svg
from headstart.report.quickstart import TABLE_HEADER, outcome, render, table_rows, write_page
from headstart.report.wording import decay_reading, weaknesses

CURVES = {
    # (step, training seconds, generated tokens, accuracy, plan right, faithful)
    "strong": {
        "esr": [(0, 0, 0, 0.461, 0.375, 0.93), (10, 0.3, 1280, 0.63, 0.58, 0.94), (20, 0.6, 2560, 0.82, 0.80, 0.95),
                (30, 1.0, 3840, 0.915, 0.90, 0.96), (40, 1.4, 5120, 0.945, 0.95, 0.96),
                (50, 1.7, 6400, 0.961, 0.965, 0.97), (60, 2.1, 7680, 0.971, 0.97, 0.97)],
        "full": [(0, 0, 0, 0.461, 0.375, 0.93), (5, 1.1, 6900, 0.52, 0.45, 0.9), (10, 2.2, 13800, 0.69, 0.66, 0.92),
                 (15, 3.2, 20700, 0.83, 0.82, 0.94), (20, 4.2, 27600, 0.917, 0.91, 0.97),
                 (30, 6.4, 41400, 0.952, 0.95, 0.98), (40, 8.7, 55200, 0.970, 0.97, 0.99)],
    },
    "weak": {
        "esr": [(0, 0, 0, 0.419, 0.37, 0.84), (10, 0.3, 1280, 0.58, 0.6, 0.83), (20, 0.6, 2560, 0.72, 0.82, 0.83),
                (30, 1.0, 3840, 0.79, 0.93, 0.84), (40, 1.4, 5120, 0.80, 0.95, 0.83),
                (50, 1.7, 6400, 0.795, 0.96, 0.83), (60, 2.1, 7680, 0.79, 0.96, 0.82)],
        "full": [(0, 0, 0, 0.419, 0.37, 0.84), (5, 1.1, 6900, 0.45, 0.42, 0.85), (10, 2.2, 13800, 0.60, 0.6, 0.88),
                 (15, 3.2, 20700, 0.70, 0.72, 0.92), (20, 4.2, 27600, 0.80, 0.82, 0.94),
                 (30, 6.4, 41400, 0.89, 0.92, 0.96), (40, 8.7, 55200, 0.935, 0.95, 0.98)],
    },
}  # fmt: skip
LENGTHS = (0, 5, 10, 16, 32, 64, 128)


def make_eval(accuracy: float, plan: float, faithful: float) -> dict[str, Any]:
    """As 96 problems x 4 samples give it, with the interval of 180 independent yes/no readings."""
    return {
        "accuracy": accuracy, "interval": list(wilson(180 * accuracy, 180)),
        "details": {"plan_right": plan, "faithful": faithful}, "problems": 96, "samples": 4,
        "truncated": 0.0, "mean_tokens": 171.0, "generated_tokens": 65000, "seconds": 2.0,
    }  # fmt: skip


def make_share(successes: int, n: int) -> dict[str, Any]:
    low, high = wilson(successes, n)
    return {"successes": successes, "n": n, "low": low, "high": high}


def make_decay() -> dict[str, Any]:
    """96 prompts; ever more prefixes spoiled, 98% right after clean ones, 8% after wrong ones."""
    points = []
    for length, wrong in zip(LENGTHS, (0, 26, 46, 54, 55, 55, 56), strict=True):
        clean = 96 - wrong
        right_clean, right_wrong = round(0.98 * clean), round(0.08 * wrong)
        points.append(
            {
                "prefix_tokens": length,
                "after_student": make_share(right_clean + right_wrong, 96),
                "after_clean": make_share(right_clean, clean),
                "after_wrong": make_share(right_wrong, wrong),
                "after_own": make_share(93 if length else 94, 96),
            }
        )
    return {"points": points, "student": make_share(44, 96), "prompts": 96, "generated_tokens": 210_000}


def make_arm(key: str, name: str, settings: dict[str, Any], curve: list[tuple[Any, ...]]) -> dict[str, Any]:
    points = [
        {"step": step, "seconds": float(seconds), "generated_tokens": tokens, "eval": make_eval(*figures)}
        for step, seconds, tokens, *figures in curve
    ]
    shared = {"prompts_per_step": 8, "divergence": "reverse_kl"}
    return {"key": key, "name": name, "settings": {**settings, **shared}, "points": points}


def make_results(pair: str = "strong") -> dict[str, Any]:
    curves = CURVES[pair]
    esr = {"horizon": 16, "steps": 60, "lr": 0.0003}
    full = {"horizon": 200, "steps": 40, "lr": 0.001}
    return {
        "pair": pair, "seed": 0,
        "command": "headstart quickstart" + (" --pair weak" if pair == "weak" else ""),
        "environment": {"python": "3.11.2", "torch": "2.13.0+cpu", "platform": "Linux-6.1", "cpus": 2, "threads": 2},
        "seconds": 97.3,
        "student": make_eval(*curves["esr"][0][3:]), "teacher": make_eval(0.982, 0.99, 0.99),
        "decay": make_decay(),
        "arms": [
            make_arm("esr", "early stopping, N = 16", esr, curves["esr"]),
            make_arm("full", "full rollouts", full, curves["full"]),
        ],
    }  # fmt: skip


def with_curves(esr: list[float], full: list[float], student: float = 0.46) -> dict[str, Any]:
    """Results whose arms were measured at steps 10, 20, ...: one second a step for esr, four for full rollouts."""
    results = make_results()
    results["student"] = make_eval(student, 0.4, 0.9)
    for arm, curve, pace in zip(results["arms"], (esr, full), (0.1, 0.4), strict=True):
        steps = range(10, 10 * len(curve) + 1, 10)
        points = [(s, s * pace, s * 100, a, a, 0.9) for s, a in zip(steps, curve, strict=True)]
        arm["points"] = make_arm("", "", {}, points)["points"]
    return results


# --- the table -------------------------------------------------------------------------------------------------------


def test_rows_of_the_strong_pair() -> None:
    rows = table_rows(make_results())
    assert {len(row) for row in rows} == {len(TABLE_HEADER)}
    assert [(row[0], row[1]) for row in rows] == [
        ("student before", "0"),
        ("teacher", "-"),
        ("early stopping, N = 16: 40 steps", "40"),
        ("early stopping, N = 16: end", "60"),
        ("full rollouts: last within 2.1 s", "5"),
        ("full rollouts: first past 2.1 s", "10"),
        ("full rollouts: end", "40"),
    ]
    assert rows[3][2:] == ["97.1% [93.5, 98.7]", "97.0%", "7,680", "2.1"]
    assert rows[4][4:] == ["6,900", "1.1"]


@pytest.mark.parametrize(
    ("step", "seconds", "expected"),
    [
        (20, 4.0, [("last within 4.0 s", "10"), ("equal steps", "20"), ("end", "30")]),
        (20, 4.5, [("last within 4.5 s", "10"), ("equal steps, first past 4.5 s", "20"), ("end", "30")]),
        (30, 1.0, [("first past 1.0 s", "10"), ("end, equal steps", "30")]),
        (5, 99.0, [("end, last within 99.0 s", "30")]),
    ],
)
def test_roles_share_a_row_where_they_meet(step: int, seconds: float, expected: list[tuple[str, str]]) -> None:
    results = with_curves([0.8], [0.5, 0.7, 0.9])
    results["arms"][0]["points"][-1].update(step=step, seconds=seconds)
    rows = [(row[0].removeprefix("full rollouts: "), row[1]) for row in table_rows(results)[3:]]
    assert rows == expected


@pytest.mark.parametrize(("key", "count"), [("esr", 3), ("full", 3)])
def test_a_missing_arm_leaves_its_rows_out(key: str, count: int) -> None:
    results = make_results()
    results["arms"] = [arm for arm in results["arms"] if arm["key"] != key]
    assert len(table_rows(results)) == count
    assert "nothing to compare" in outcome(results)
    assert weaknesses(results) == []


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 100)), min_size=1, max_size=8),
    st.integers(0, 60),
    st.floats(0, 120),
)
def test_chosen_points_are_the_latest_that_fit(pairs: list[tuple[int, float]], step: int, seconds: float) -> None:
    steps, costs = sorted({s for s, _ in pairs}), sorted(c for _, c in pairs)
    points = [{"step": s, "seconds": c} for s, c in zip(steps, costs, strict=False)]
    same, within, past = at_equal_steps(points, step), last_within(points, seconds), first_past(points, seconds)
    assert (same and same["step"]) == max((p["step"] for p in points if p["step"] <= step), default=None)
    fitting = [p["step"] for p in points if p["seconds"] <= seconds and p["step"] > 0]
    assert (within and within["step"]) == max(fitting, default=None)
    assert (past and past["step"]) == min((p["step"] for p in points if p["seconds"] > seconds), default=None)


# --- the sentence ----------------------------------------------------------------------------------------------------


def test_outcome_level_at_the_end() -> None:
    assert outcome(make_results()) == (
        "Early stopping took the student from 46.1% to 97.1% in 2.1 s of training; "
        "full rollouts came level at their last evaluation, after 8.7 s (97.0%, 4.1 times as long)."
    )


def test_outcome_level_before_the_end() -> None:
    sentence = outcome(with_curves([0.8, 0.9], [0.7, 0.9, 0.91]))
    assert sentence.endswith(
        "came level after 8.0 s (90.0%, 4.0 times as long) "
        "and ended at 91.0% after 12.0 s, within noise of early stopping."
    )


def test_outcome_not_level_but_within_noise() -> None:
    sentence = outcome(with_curves([0.8, 0.9], [0.7, 0.86]))
    assert sentence.endswith("did not get there and ended at 86.0% after 8.0 s, within noise of early stopping.")


def test_outcome_full_rollouts_end_higher() -> None:
    sentence = outcome(make_results("weak"))
    assert "came level after 4.2 s (80.0%, 2.0 times as long)" in sentence
    assert re.search(r"ended at 93.5% after 8.7 s, 14.5 points \(95% interval 7.\d to 2\d.\d\) higher\.$", sentence)


def test_outcome_full_rollouts_never_get_there() -> None:
    sentence = outcome(with_curves([0.8, 0.97], [0.5, 0.7]))
    assert "full rollouts did not get there" in sentence
    assert "27.0 points" in sentence
    assert sentence.endswith("lower.")


def test_outcome_full_rollouts_are_sooner() -> None:
    results = with_curves([0.6, 0.7, 0.8, 0.8, 0.8, 0.8], [0.95])
    results["arms"][1]["points"][0]["seconds"] = 0.6
    assert "came level after 0.60 s (95.0%, 0.1 times as long)" in outcome(results)


@pytest.mark.parametrize(
    ("end", "words"), [(0.48, "did not move the student beyond noise"), (0.3, "made the student worse")]
)
def test_outcome_without_a_gain(end: float, words: str) -> None:
    sentence = outcome(with_curves([end], [0.9]))
    assert words in sentence
    assert "came level" not in sentence
    assert "higher" in sentence


def test_outcome_survives_points_without_cost() -> None:
    results = with_curves([0.9], [0.9])
    for arm in results["arms"]:
        arm["points"][0].update(seconds=0.0, generated_tokens=0)
    assert "times as long" not in outcome(results)
    assert weaknesses(results)


@given(st.tuples(*[st.floats(0.02, 0.98)] * 2), st.integers(20, 2000))
def test_gap_is_antisymmetric_contains_the_difference_and_zero_at_equality(pair: tuple[float, float], n: int) -> None:
    a, b = ({"accuracy": x, "interval": wilson(x * n, n)} for x in pair)
    there, back = gap(a, b), gap(b, a)
    assert there.low <= there.points <= there.high
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert gap(a, a).is_noise
    assert str(there).removeprefix("-") == str(there)


def test_gap_against_a_published_example() -> None:
    # Newcombe 1998, table II, example (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339.
    a, b = ({"accuracy": x / n, "interval": wilson(x, n)} for x, n in ((56, 70), (48, 80)))
    assert (gap(a, b).low, gap(a, b).high) == pytest.approx((5.24, 33.39), abs=0.02)


def test_level_is_at_most_one_standard_error_below() -> None:
    points = make_results()["arms"][1]["points"]
    assert first_level_with(points, points[0]["eval"]) is points[0]
    assert first_level_with(points[:3], points[-1]["eval"]) is None
    target = {"accuracy": 0.9, "interval": (0.9 - 1.96 * 0.02, 0.9 + 1.96 * 0.02)}
    near, far = ({"eval": {"accuracy": a}} for a in (0.881, 0.879))
    assert first_level_with([far, near], target) is near


# --- what it says of losses and of the decay -------------------------------------------------------------------------


def test_weak_pair_is_told_as_a_loss_on_a_plateau() -> None:
    text = " ".join(weaknesses(make_results("weak")))
    assert "it loses" in text
    assert "on a plateau: from step 30 to 60" in text
    assert "82.0% of the answers (full rollouts: 98.0%)" in text


def test_strong_pair_is_not_told_as_a_loss() -> None:
    text = " ".join(weaknesses(make_results()))
    assert "no visible loss" in text
    assert "plateau" not in text
    assert "7.2 times the generated tokens" in text


def test_a_fall_after_the_best_point_is_told() -> None:
    assert any("did not hold its best: 95.0% at step 10" in s for s in weaknesses(with_curves([0.95, 0.7], [0.95])))


def test_decay_reading_follows_the_figures() -> None:
    results = make_results()
    assert "the curve is the share of spoiled prefixes" in decay_reading(results)[-1]
    tired = copy.deepcopy(results)
    tired["decay"]["points"][-1]["after_own"] = make_share(50, 96)
    assert "do not explain the whole fall" in decay_reading(tired)[-1]
    robust = copy.deepcopy(results)
    robust["decay"]["points"][-1]["after_student"] = make_share(94, 96)
    assert "no measurable decay" in decay_reading(robust)[-1]
    forgiving = copy.deepcopy(results)
    forgiving["decay"]["points"][-1]["after_wrong"] = make_share(55, 56)
    assert "does not explain the fall" in decay_reading(forgiving)[-1]
    empty = copy.deepcopy(results)
    empty["decay"]["points"] = []
    assert "Too little was measured" in decay_reading(empty)[0]


# --- pictures and page -----------------------------------------------------------------------------------------------


def degenerate(kind: str) -> dict[str, Any]:
    results = make_results()
    nothing = make_share(0, 0)
    match kind:
        case "one point":
            for arm in results["arms"]:
                arm["points"] = arm["points"][:1]
            results["decay"]["points"] = results["decay"]["points"][:1]
        case "no points":
            for arm in results["arms"]:
                arm["points"] = []
            results["decay"].update(points=[], student=nothing)
        case "n = 0":
            for point in results["decay"]["points"]:
                point.update(after_clean=nothing, after_wrong=nothing, after_own=nothing, after_student=nothing)
        case "no arms":
            results["arms"] = []
        case "five arms":
            results["arms"] += [{**results["arms"][0], "key": f"more{i}"} for i in range(3)]
    return results


KINDS = ("one point", "no points", "n = 0", "no arms", "five arms")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_results_have_pictures_and_page(kind: str) -> None:
    results = degenerate(kind)
    page = render(results, to_svg(accuracy_figure(results)), to_svg(decay_figure(results)))
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page)


def test_pictures_are_reproducible_and_wide_enough() -> None:
    png = to_png(decay_figure(make_results()))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20], "big") == 1600
    assert to_svg(decay_figure(make_results())) == to_svg(decay_figure(make_results()))


@given(st.lists(st.floats(0, 1), max_size=6).map(sorted), st.floats(0.01, 0.3))
def test_spread_labels_keep_order_and_distance(heights: list[float], step: float) -> None:
    placed = spread(heights, step)
    assert len(placed) == len(heights)
    assert all(b - a >= step - 1e-9 for a, b in zip(placed, placed[1:], strict=False))
    if all(b - a >= step for a, b in zip(heights, heights[1:], strict=False)):
        assert placed == pytest.approx(heights)


class Page(HTMLParser):
    """Collects tags with their attributes; fails on a closing tag that does not match."""

    VOID = ("meta", "img", "link", "br", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_described(tmp_path: Path) -> None:
    results = make_results("weak")
    paths = write_page(results, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["quickstart.json", "accuracy.png", "decay.png", "quickstart.html"]
    assert all(path.stat().st_size > 1000 for path in paths)
    assert json.loads(paths[0].read_text()) == results
    text = paths[-1].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2
    assert all(len(image["alt"] or "") > 100 for image in images)
    assert all((image["src"] or "").startswith("data:image/svg+xml;base64,") for image in images)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert not re.search(r"https?://|url\(|@import", text)
    assert outcome(results) in text
    assert "prefers-color-scheme: dark" in text
    assert all(cell in text for row in table_rows(results) for cell in row)


def test_page_escapes_what_it_is_given() -> None:
    results = make_results()
    results["environment"]["platform"] = "<script>alert(1)</script>"
    results["arms"][0]["name"] = "N < 16 & more"
    text = render(results, "<svg/>", "<svg/>")
    assert "<script>" not in text
    assert "N &lt; 16 &amp; more: end" in text
