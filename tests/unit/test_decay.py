"""Teacher decay in constructed worlds with known answers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from headstart.diagnose.decay import DecayCurve, DecayProbe
from headstart.numerics.streams import uniforms
from headstart.records import PrefixState, Problem, Prompt, Rollout, Sampling, Verdict

GOOD, BAD, STOP = 3, 4, 1
LENGTH, PROMPTS = 10, 400


class Speaker:
    """Says GOOD until the end, except that the token at `slip` is BAD with probability `error`; a speaker that does
    not `recover` goes on with BAD after a BAD prefix. The first prompt token is the prompt itself."""

    def __init__(self, error: float, slip: int = 4, recover: bool = False) -> None:
        self.error, self.slip, self.recover = error, slip, recover

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int,
        sampling: Sampling,
        key: tuple[int, str, int],
        batch_size: int | None = None,
    ) -> list[Rollout]:
        draws = uniforms(key, [(p.index, 0) for p in prompts], 0, 1)[:, 0]
        return [self._speak(p, float(u)) for p, u in zip(prompts, draws, strict=True)]

    def _speak(self, prompt: Prompt, draw: float) -> Rollout:
        said = list(prompt.token_ids[1:])
        start = len(said)
        while len(said) < LENGTH:
            spoiled = BAD in said and not self.recover
            slips = len(said) == self.slip and draw < self.error
            said.append(BAD if spoiled or slips else GOOD)
        return Rollout(prompt, 0, (*said[start:], STOP), stopped=True)


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


def measure(teacher: Speaker, student: Speaker) -> DecayCurve:
    task = LastTokenTask()
    prompts = [Prompt(i, str(i), (0,), (0,)) for i in range(PROMPTS)]
    probe = DecayProbe(task, list(task.problems()), prompts, student, teacher, Digits(), Sampling(), 50)
    return probe.measure((0, 2, 4, 5, 9, 50))


def test_a_teacher_that_never_recovers_falls_at_the_decision_to_the_students_level() -> None:
    curve = measure(Speaker(error=0.0), Speaker(error=0.6))
    after = {p.prefix_tokens: p.after_student.mean for p in curve.points}
    assert after[0] == after[2] == after[4] == 1.0
    assert after[5] == after[9] == after[50] == curve.student.mean
    assert curve.student.mean == pytest.approx(0.4, abs=0.08)
    late = curve.points[-1]
    assert late.after_own.mean == 1.0
    assert (late.after_clean.mean, late.after_wrong.mean) == (1.0, 0.0)
    assert late.after_clean.n + late.after_wrong.n == PROMPTS
    assert late.after_student.low < late.after_student.mean < late.after_student.high


def test_a_teacher_that_recovers_gives_a_flat_curve() -> None:
    curve = measure(Speaker(error=0.0, recover=True), Speaker(error=0.6))
    assert [p.after_student.mean for p in curve.points[:-1]] == [1.0] * 5


def test_a_teacher_with_errors_of_its_own_shows_them_at_length_zero() -> None:
    curve = measure(Speaker(error=0.3), Speaker(error=0.6))
    assert curve.points[0].after_student.mean == pytest.approx(0.7, abs=0.08)
    assert curve.points[0].after_own.mean == curve.points[0].after_student.mean


def test_no_prefix_of_a_kind_is_no_share() -> None:
    curve = measure(Speaker(error=0.0), Speaker(error=0.0))
    wrong = curve.points[-1].after_wrong
    assert (wrong.n, wrong.low, wrong.high) == (0, 0.0, 1.0)
    assert wrong.mean != wrong.mean
