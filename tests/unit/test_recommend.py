"""The recommendation on constructed curves: what it concludes, what it refuses to conclude, and what it warns of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from headstart.diagnosis.curve import DecayCurve, DecayPoint, Plateau, Share
from headstart.diagnosis.recommend import StepCost, Window, horizon_window, recommend
from headstart.stats import Estimate

Damage = tuple[float, float, float]
EARLY: dict[int, Damage] = {8: (0.6, 0.4, 0.8), 16: (0.97, 0.88, 1.0), 32: (1.0, 0.92, 1.1), 128: (1.0, 0.95, 1.1)}
SIGNAL = {"0.4": 14, "0.5": 20, "0.9": 120}
MENTION = "no short horizon is supported by this evidence"


def share(mean: float, n: int = 64) -> Share:
    return Share(round(mean * n), n, max(0.0, mean - 0.1), min(1.0, mean + 0.1))


def make_curve(damage: dict[int, Damage | None], *, teacher: float = 0.98, student: float = 0.45) -> DecayCurve:
    """A curve with these damage shares; every other reading is what it would be in that world."""
    points = [_point(0, (0.0, -0.1, 0.1) if None not in damage.values() else None, teacher, student)]
    points += [_point(n, d, teacher, student) for n, d in damage.items()]
    return DecayCurve(
        task="made",
        labelled=True,
        prompts=64,
        left_out=0,
        grid=(0, *damage),
        max_tokens=200,
        median_tokens=154,
        longest_tokens=192,
        generated_tokens=1,
        seconds=1.0,
        student=share(student),
        teacher=share(teacher),
        points=tuple(points),
    )


def _point(n: int, damage: Damage | None, teacher: float, student: float) -> DecayPoint:
    nothing = Share(0, 0, 0.0, 1.0)
    value = damage[0] if damage else 0.0
    return DecayPoint(
        prefix_tokens=n,
        after_student=share(teacher - value * (teacher - student)),
        after_clean=nothing,
        after_wrong=nothing,
        after_finished=nothing,
        after_own=share(teacher),
        student_continues=share(student),
        gift=share(teacher),
        damage=Estimate(*damage) if damage else Estimate(None, 0.0, 1.0),
    )


def make_plateau(value: float, short: tuple[float, float, float]) -> Plateau:
    return Plateau(16, Estimate(value, value - 0.03, value + 0.03), Estimate(*short))


def costs(*tokens: int) -> Sequence[StepCost]:
    return [StepCost(n, 0.01 * n, 0.001 * n) for n in tokens]


def test_a_horizon_is_short_beside_the_longer_of_the_two_models_responses() -> None:
    """With the damage measured on a pruned Qwen2.5-Coder-0.5B, which answers in 48 tokens."""
    damage = {10: (0.37, 0.05, 0.61), 25: (0.9, 0.76, 1.0), 50: (0.97, 0.88, 1.0), 100: (1.0, 0.9, 1.1)}
    coverage = {"0.4": 21, "0.5": 28, "0.9": 91}
    brief = replace(make_curve(damage, teacher=0.4, student=0.08), median_tokens=48)
    assert horizon_window(brief, coverage) is None
    assert "of 48 tokens" in recommend(brief, coverage).sentence
    curve = replace(brief, teacher_median_tokens=140)
    assert horizon_window(curve, coverage) == Window(low=21, tokens=25, high=70)
    assert "of a median response of 140" in recommend(curve, coverage).sentence


def test_early_damage_gives_a_horizon_at_a_measured_length_and_its_range() -> None:
    curve = make_curve(EARLY)
    assert horizon_window(curve, SIGNAL) == Window(low=14, tokens=16, high=32)
    advice = recommend(curve, SIGNAL, make_plateau(0.97, (0.01, -0.02, 0.04)), costs(14, 16, 32, 192))
    assert "N = 16" in advice.sentence
    assert "Warning" not in advice.sentence
    text = " ".join(advice.reasons)
    assert all(
        word in text for word in ("97% [88, 100] at 16", "14 to 20 tokens", "correct opening is enough", "0.16 s")
    )
    assert "full rollouts, 192 tokens: 1.9 s" in text


def test_an_uncertain_crossing_widens_the_range_in_both_directions() -> None:
    curve = make_curve({8: (0.7, 0.4, 0.95), 16: (0.85, 0.6, 1.0), 32: (0.95, 0.7, 1.1), 64: (1.0, 0.85, 1.1)})
    assert horizon_window(curve, SIGNAL) == Window(low=8, tokens=32, high=77)


def test_a_signal_in_the_first_tokens_alone_does_not_pull_the_range_to_them() -> None:
    assert horizon_window(make_curve(EARLY), {"0.4": 1, "0.5": 2, "0.9": 3}) == Window(low=4, tokens=16, high=32)
    assert horizon_window(make_curve(EARLY), {"0.4": 0, "0.5": 0, "0.9": 0}) == Window(low=16, tokens=16, high=32)


def test_the_paper_s_pair_gets_a_range_that_holds_its_horizon() -> None:
    """R(N) as published (arXiv 2605.27028): D(100) is .18, D(300) .94; N = 100 took nearly the whole gain."""
    published: dict[int, Damage | None] = {
        100: (0.18, 0.10, 0.26), 200: (0.63, 0.54, 0.72), 300: (0.94, 0.84, 1.04), 600: (1.0, 0.95, 1.05)
    }  # fmt: skip
    curve = replace(make_curve(published, teacher=0.653, student=0.5095), median_tokens=900, longest_tokens=3584)
    window = horizon_window(curve, {"0.4": 90, "0.5": 140, "0.9": 600})
    assert window is not None
    assert window.low <= 100 <= window.tokens == 300 <= window.high <= 450


UNSUPPORTED = {
    "no lead": (make_curve({8: None, 64: None}, teacher=0.5), "is not better than the student"),
    "recovers": (make_curve({16: (0.0, -0.1, 0.1), 64: (0.05, -0.1, 0.2)}), "still repairs"),
    "spread": (make_curve({16: (0.2, 0.1, 0.3), 64: (0.5, 0.4, 0.6), 128: (0.95, 0.9, 1.0)}), "spread over"),
    "noise": (make_curve({16: (0.95, -0.5, 2.0), 64: (1.0, 0.1, 2.0)}), "probe more problems"),
    "late grid": (make_curve({128: (1.0, 0.9, 1.1)}), "no prefix shorter"),
}


@pytest.mark.parametrize("world", UNSUPPORTED)
def test_without_evidence_no_short_horizon_is_recommended(world: str) -> None:
    curve, why = UNSUPPORTED[world]
    advice = recommend(curve, SIGNAL, None, costs(192))
    assert MENTION in advice.sentence.lower()
    assert why in advice.sentence
    record = json.loads(json.dumps(advice.to_json()))
    assert (record["supported"], record["tokens"], record["low"], record["high"]) == (False, None, None, None)
    assert record["plateau"] is None


def test_a_right_opening_that_is_not_enough_is_a_warning_with_the_plateau() -> None:
    advice = recommend(make_curve(EARLY), SIGNAL, make_plateau(0.91, (0.07, 0.03, 0.11)), costs(16, 192))
    assert "correct opening is not enough" in advice.sentence
    assert "91%" in advice.sentence
    assert any("7.0 [3.0, 11.0] points less than the teacher" in reason for reason in advice.reasons)
    record = advice.to_json()
    assert record["plateau"]["value"] == 0.91
    assert record["supported"]


@pytest.mark.parametrize(("student", "teacher", "supported"), [(0.94, 0.2, True), (0.2, 0.94, False)])
def test_mostly_cut_responses_carry_no_advice(student: float, teacher: float, supported: bool) -> None:
    """What there is to win is not known where the teacher's are; where the student's are, a horizon comes with a
    warning. Neither speaks for full rollouts."""
    who = "student" if supported else "teacher"
    said = f"94% of the {who}'s responses were cut at 200 tokens: the accuracy is that of mostly cut responses"
    cut = {"student_cut": student, "teacher_cut": teacher}
    advice = recommend(replace(make_curve(EARLY), **cut), SIGNAL, None, costs(192))
    assert (advice.window is not None) == supported
    for world in (advice, *(recommend(replace(curve, **cut), SIGNAL) for curve, _ in UNSUPPORTED.values())):
        assert said in world.sentence
        assert world.sentence.endswith("set diagnosis.max_tokens=1600, then diagnose again.")
        assert "use full rollouts" not in world.sentence
        assert any(reason.startswith(said) for reason in world.reasons)


def test_some_cut_responses_are_a_doubt() -> None:
    advice = recommend(replace(make_curve(EARLY), student_cut=0.2), SIGNAL)
    assert "cut" not in advice.sentence
    assert any(
        "20% of the student's responses were cut at 200 tokens and hardly" in reason for reason in advice.reasons
    )
    assert (
        recommend(replace(make_curve(EARLY), student_cut=0.1), SIGNAL).reasons
        == recommend(make_curve(EARLY), SIGNAL).reasons
    )


def test_doubts_are_said() -> None:
    assert not [r for r in recommend(make_curve(EARLY), SIGNAL).reasons if "control" in r or "agreement" in r]
    voted = recommend(replace(make_curve(EARLY), labelled=False, left_out=3), SIGNAL)
    assert any("agreement with the teacher's majority answer, not truth" in reason for reason in voted.reasons)
    assert any("3 problems could not be judged" in reason for reason in voted.reasons)
    curve = make_curve(EARLY)
    broken = replace(curve, points=(*curve.points[:-1], replace(curve.points[-1], after_own=share(0.5))))
    assert any("control is off: the teacher" in reason for reason in recommend(broken, SIGNAL).reasons)
    spread = {"0.4": (9, 18), "0.5": (15, 33)}
    assert any(
        "20 tokens (95% intervals 9 to 18 and 15 to 33)" in r for r in recommend(curve, SIGNAL, spread=spread).reasons
    )
    even = recommend(curve, {"0.4": 60, "0.5": 75, "0.9": 140})
    assert any("spread over the response" in reason for reason in even.reasons)
    assert recommend(curve, SIGNAL, None, [StepCost(16, None, 0.1)]).to_json()["costs"][0]["seconds"] is None
