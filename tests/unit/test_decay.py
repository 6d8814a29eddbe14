"""Teacher decay in constructed worlds with known answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from headstart.diagnosis.curve import DecayCurve, default_grid
from headstart.diagnosis.probes import DecayProbe
from headstart.records import PrefixState, Problem, Prompt, Rollout, Sampling, Verdict
from headstart.streams import uniforms

GOOD, BAD, STOP = 3, 4, 1
STUDENT_VIEW, TEACHER_VIEW = 7, 8
LENGTH, PROMPTS = 10, 400


@dataclass
class Speaker:
    """Says GOOD until the end, except that the token at `slip` is BAD with probability `error`; a speaker that does
    not `recover` goes on with BAD after a BAD prefix. The first prompt token is the prompt itself."""

    error: float
    slip: int = 4
    recover: bool = False
    stops: bool = True
    asked: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int | Sequence[int],
        sampling: Sampling,
        key: tuple[int, str, int],
        batch_size: int | None = None,
        finished: Callable[[Rollout], None] = lambda rollout: None,
    ) -> list[Rollout]:
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        rows = [(p.index, s) for p in prompts for s in range(samples)]
        assert len(set(rows)) == len(rows), "two rollouts of one call share their draws"
        self.asked += [(p.token_ids, limit) for p, limit in zip(prompts, limits, strict=True)]
        draws = iter(uniforms(key, rows, 0, 1)[:, 0])
        return [
            self._speak(prompt, s, float(next(draws)), limit)
            for prompt, limit in zip(prompts, limits, strict=True)
            for s in range(samples)
        ]

    def _speak(self, prompt: Prompt, sample: int, draw: float, max_tokens: int) -> Rollout:
        said = list(prompt.token_ids[1:])
        start = len(said)
        while len(said) - start < max_tokens and (len(said) < LENGTH or not self.stops):
            spoiled = BAD in said and not self.recover
            slips = len(said) == self.slip and draw < self.error
            said.append(BAD if spoiled or slips else GOOD)
        room = len(said) - start < max_tokens
        return Rollout(prompt, sample, (*said[start:], *([STOP] if room else [])), stopped=room)


class LastTokenTask:
    """Right when the last token is GOOD."""

    name = "last"

    def problems(self) -> Sequence[Problem]:
        return [Problem(id=str(i)) for i in range(PROMPTS)]

    def grade(self, problem: Problem, response: str) -> Verdict:
        return Verdict(response.endswith("3"), "correct" if response.endswith("3") else "wrong")

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        return "wrong" if "4" in prefix else "clean"


class Digits:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(str, ids))


def make_probe(teacher: Speaker, student: Speaker, prompts: int = PROMPTS) -> DecayProbe:
    task = LastTokenTask()
    views = [Prompt(i, str(i), (STUDENT_VIEW,), (TEACHER_VIEW,)) for i in range(prompts)]
    return DecayProbe(task, list(task.problems()), views, student, teacher, Digits(), Sampling(), 50)


def measure(teacher: Speaker, student: Speaker) -> DecayCurve:
    return make_probe(teacher, student).measure((0, 2, 4, 5, 9, 50))


def test_a_teacher_that_never_recovers_falls_at_the_decision_to_the_students_level() -> None:
    curve = measure(Speaker(error=0.0), Speaker(error=0.6))
    after = {p.prefix_tokens: p.after_student.mean for p in curve.points}
    assert after[0] == after[2] == after[4] == curve.teacher.mean == 1.0
    assert after[5] == after[9] == after[50] == curve.student.mean
    assert curve.student.mean == pytest.approx(0.4, abs=0.08)
    late = curve.points[-2]
    assert (late.after_clean.mean, late.after_wrong.mean) == (1.0, 0.0)
    assert late.after_clean.n + late.after_wrong.n == PROMPTS
    assert late.after_student.low < late.after_student.mean < late.after_student.high
    assert curve.points[-1].after_finished.n == PROMPTS
    damage = {p.prefix_tokens: p.damage for p in curve.points}
    assert [damage[n].value for n in (0, 2, 4)] == [0.0] * 3
    assert [damage[n].value for n in (5, 9, 50)] == [1.0] * 3


def test_a_teacher_that_recovers_gives_a_flat_curve_without_damage() -> None:
    curve = measure(Speaker(error=0.0, recover=True), Speaker(error=0.6))
    assert [p.after_student.mean for p in curve.points[:-1]] == [1.0] * 5
    assert [p.damage.value for p in curve.points[:-1]] == [0.0] * 5
    assert curve.points[-1].after_student == curve.student


def test_the_gift_is_the_students_accuracy_before_its_slip_and_the_teachers_after_it() -> None:
    curve = measure(Speaker(error=0.0), Speaker(error=0.6))
    gift = {p.prefix_tokens: p.gift.mean for p in curve.points}
    assert gift[0] == curve.student.mean
    assert gift[4] == pytest.approx(0.4, abs=0.08)
    assert gift[4] != gift[2]  # other draws: another prefix length is another sample
    assert gift[5] == gift[9] == gift[50] == 1.0


def test_a_weak_executor_shows_a_gift_below_the_teacher() -> None:
    probe = make_probe(Speaker(error=0.0), Speaker(error=0.3, slip=8))
    curve = probe.measure((5,))
    assert curve.points[1].gift.mean == pytest.approx(0.7, abs=0.08)
    several = probe.gifts(probe.respond("teacher", probe.prompts), 5)
    assert sum(several) / PROMPTS == pytest.approx(0.7, abs=0.03)
    assert {round(8 * share) for share in several} - {0, 8}  # several continuations a problem, each with its own draw


def test_controls_stay_where_the_speaker_is() -> None:
    curve = measure(Speaker(error=0.2), Speaker(error=0.6))
    assert [p.after_own.mean for p in curve.points] == pytest.approx([0.8] * 6, abs=0.08)
    assert [p.student_continues.mean for p in curve.points] == pytest.approx([0.4] * 6, abs=0.08)
    start, end = curve.points[0], curve.points[-1]
    assert start.after_student == start.after_own == curve.teacher == end.after_own == end.gift
    assert start.student_continues == start.gift == curve.student == end.student_continues == end.after_student


def test_a_teacher_that_is_no_better_leaves_the_damage_undefined() -> None:
    curve = measure(Speaker(error=0.6), Speaker(error=0.6))
    assert {p.damage.value for p in curve.points} == {None}


def test_no_prefix_of_a_kind_is_no_share() -> None:
    curve = measure(Speaker(error=0.0), Speaker(error=0.0))
    wrong = curve.points[-1].after_wrong
    assert (wrong.n, wrong.low, wrong.high) == (0, 0.0, 1.0)
    assert wrong.mean != wrong.mean


def test_neither_the_grid_nor_the_grouping_changes_an_outcome() -> None:
    probe = make_probe(Speaker(error=0.2), Speaker(error=0.6), prompts=40)
    students, teachers = (probe.respond(who, probe.prompts) for who in ("student", "teacher"))
    whole = probe.outcomes(students, teachers, (2, 4, 5, 9))
    parts = [o for k in range(0, 40, 7) for o in probe.outcomes(students[k : k + 7], teachers[k : k + 7], (2, 4, 5, 9))]
    assert [replace(o, seconds=0.0) for o in parts] == [replace(o, seconds=0.0) for o in whole]
    sparse = probe.outcomes(students, teachers, (4,))
    assert [o.points[1] for o in sparse] == [o.points[2] for o in whole]
    chosen = replace(probe, prompts=probe.prompts[10:20])
    assert [r.rollout for r in chosen.respond("student", chosen.prompts)] == [r.rollout for r in students[10:20]]


def test_each_model_speaks_from_its_own_view_and_never_finishes_what_has_stopped() -> None:
    teacher, student = Speaker(error=0.2), Speaker(error=0.6)
    make_probe(teacher, student, prompts=20).measure((4, 50))
    assert {ids[0] for ids, _ in student.asked} == {STUDENT_VIEW}
    assert {ids[0] for ids, _ in teacher.asked} == {TEACHER_VIEW}
    assert {len(ids) - 1 for ids, _ in teacher.asked} == {0, 4}
    assert len(teacher.asked) == 20 * (1 + 2)


def test_a_continuation_gets_what_the_prefix_left_of_the_longest_response() -> None:
    teacher, student = Speaker(error=0.0, stops=False), Speaker(error=0.6, stops=False)
    probe = replace(make_probe(teacher, student, prompts=10), max_tokens=20)
    outcomes = probe.outcomes(probe.respond("student", probe.prompts), probe.respond("teacher", probe.prompts), (4, 15))
    assert {o.generated_tokens for o in outcomes} == {2 * 20 + 2 * (16 + 5) + 2 * (16 + 5)}


def test_no_call_asks_for_more_than_the_longest_response() -> None:
    teacher, student = Speaker(error=0.2), Speaker(error=0.6)
    make_probe(teacher, student, prompts=30).measure((2, 4, 6, 8))
    for model in (teacher, student):
        assert {len(ids) + longest for ids, longest in model.asked} == {1 + 50}


@pytest.mark.parametrize(
    ("median", "grid"),
    [
        (1, (0, 4)),
        (10, (0, 4, 8)),
        (154, (0, 4, 8, 16, 32, 64, 128)),
        (512, (0, 4, 8, 16, 32, 64, 128, 256, 512)),
        (1000, (0, 4, 9, 19, 43, 94, 206, 454, 1000)),
        (3584, (0, 4, 11, 28, 74, 195, 514, 1357, 3584)),
    ],
)
def test_the_default_grid_is_dense_early_and_ends_at_the_median_response(median: int, grid: tuple[int, ...]) -> None:
    assert default_grid(median) == grid
