"""Reference answers by vote: the majority, and that a perfect teacher's vote is the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from headstart.config import evaluation
from headstart.diagnosis.ledger import Store
from headstart.diagnosis.measure import Listener, Plan, measure
from headstart.diagnosis.probes import DecayProbe, majority, vote, with_references
from headstart.errors import DataError
from headstart.records import Problem, Prompt, Rollout, Sampling
from headstart.streams import uniforms
from headstart.tasks.jsonl import JsonlTask

PROBLEMS, STOP = 200, 9


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["7", "7", "3", None], "7"),
        (["7", "7", "3", "3"], None),
        (["7", "3", "5", None], None),
        ([None] * 4, None),
        (["7", "3", "3", "3"], "3"),
    ],
)
def test_a_majority_needs_two_votes_and_no_equal(answers: list[str | None], expected: str | None) -> None:
    assert majority(answers) == expected


@dataclass
class Adder:
    """Problem i has the answer i: says "0 0 0 0 i" and, with probability `error` at the second word, goes on to i + 1.
    The first two ids of its prompt are the problem's."""

    error: float

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
        draws = iter(uniforms(key, [(p.index, s) for p in prompts for s in range(samples)], 0, 1)[:, 0])
        said = [self._speak(p, s, float(next(draws))) for p in prompts for s in range(samples)]
        for rollout in said:
            finished(rollout)
        return said

    def _speak(self, prompt: Prompt, sample: int, draw: float) -> Rollout:
        answer, said = prompt.token_ids[1], list(prompt.token_ids[2:])
        start = len(said)
        slipped = said[1:2] == [1] or (len(said) < 2 and draw < self.error)
        text = [0, int(slipped), 0, 0, 100 + answer + slipped]
        return Rollout(prompt, sample, (*text[start:], STOP), stopped=True)


class Numbers:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(i) if i < 100 else str(100 * (i - 100)) for i in ids)


def make_probe(teacher: Adder, student: Adder) -> DecayProbe:
    """The reference answers are 0, 100, 200 ...: multiples of 100, which a decimal likes to write as 1E+2."""
    prompts = [Prompt(i, str(i), (5, i), (6, i)) for i in range(PROBLEMS)]
    problems = [Problem(str(i), text="?") for i in range(PROBLEMS)]
    reader = JsonlTask(evaluation.JsonlTask(path=Path("made.jsonl"), grader="number"))
    return DecayProbe(reader, problems, prompts, student, teacher, Numbers(), Sampling(), 10)


def test_with_a_perfect_teacher_the_vote_gives_the_labelled_curve(tmp_path: Path) -> None:
    probe = make_probe(Adder(0.0), Adder(0.5))
    answered = [replace(p, answer=str(100 * i)) for i, p in enumerate(probe.problems)]
    labelled = replace(probe, problems=answered).measure((1, 2, 4))
    found = measure(probe, Plan((1, 2, 4), 4, "number", 0), Store(tmp_path, {}), Listener())
    assert found.curve.points == labelled.points
    assert (found.curve.student, found.curve.teacher) == (labelled.student, labelled.teacher)
    assert not found.curve.labelled
    assert found.curve.left_out == 0
    assert found.curve.generated_tokens == labelled.generated_tokens + 4 * 6 * PROBLEMS
    assert labelled.student.mean == pytest.approx(0.5, abs=0.12)
    assert [p.damage.value for p in labelled.points] == [0.0, 0.0, 1.0, 1.0]


def test_problems_on_which_the_teacher_does_not_agree_with_itself_are_left_out(tmp_path: Path) -> None:
    probe = make_probe(Adder(0.5), Adder(0.5))
    answers = vote(probe, 4, "number").answers
    kept = with_references(probe, answers).prompts
    split = sum(answer is None for answer in answers.values())
    assert split == pytest.approx(PROBLEMS * 6 / 16, abs=25)
    assert len(kept) == PROBLEMS - split
    found = measure(probe, Plan((2,), 4, "number", 1), Store(tmp_path, {}), Listener())
    assert (found.curve.prompts, found.curve.left_out) == (PROBLEMS - split, 1 + split)


def test_votes_that_a_kill_interrupts_are_not_cast_again_and_the_cost_is_said_first(tmp_path: Path) -> None:
    probe = replace(make_probe(Adder(0.3), Adder(0.5)), batch_size=20)
    plan = Plan((2,), 4, "number", 0)
    whole = measure(probe, plan, Store(tmp_path / "whole", {}), Listener()).curve
    said: list[str] = []

    def stop(done: int, total: int, text: str) -> None:
        if text == "the teacher's votes" and done == 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(probe, plan, Store(tmp_path / "cut", {}), Listener(progress=stop, say=said.append))
    kept = Store(tmp_path / "cut", {}).references
    assert len(kept.answers) == 60, "three blocks of 80 votes"
    again = measure(probe, plan, Store(tmp_path / "cut", {}), Listener(say=said.append)).curve
    assert replace(again, seconds=0.0) == replace(whole, seconds=0.0)
    measure(probe, plan, Store(tmp_path / "cut", {}), Listener(say=said.append))
    assert len(said) == 2, "said before the first generation, again when it goes on, not when nothing is left"
    assert "at most 3,600 generations" in said[0]  # 200 x (2 own + 4 votes + 4 continuations + 8 gifts)


def test_no_readable_answer_at_all_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    probe = make_probe(Adder(0.0), Adder(0.5))
    boxed = JsonlTask(evaluation.JsonlTask(path=Path("made.jsonl"), grader="boxed"))
    with pytest.raises(DataError, match=r"no problem can be judged.*diagnosis\.grader"):
        measure(replace(probe, task=boxed), Plan((2,), 4, "boxed", 0), Store(tmp_path, {}), Listener())
