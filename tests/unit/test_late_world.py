"""The late world: what its texts promise, how they are graded, and what the bundled pair makes of it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import headstart
from headstart.errors import DataError, ModelError
from headstart.models.load import resolve
from headstart.records import Problem
from headstart.tasks import late, tiny
from headstart.tasks.late import WORLDS, LateTask

BUNDLED = Path(headstart.__file__).parent / "data" / "late"
TASK = LateTask("dev", 40)
PROBLEMS = TASK.problems()
PUZZLES = [late.puzzle("dev", index) for index in range(len(PROBLEMS))]


def misread(puzzle: late.Puzzle, *legs: int) -> tuple[str, ...]:
    """The right plan with these legs' cues misread."""
    return tuple((late.MISTAKEN if leg in legs else late.MEANING)[cue] for leg, cue in enumerate(puzzle.cues))


def independent_answer(text: str) -> str:
    """The answer from the user's message alone, by another route: the words as they stand, no Puzzle."""
    words = text.split()
    value = int(words[25])
    for leg in range(5):
        cue, rounds = words[11 + 3 * leg], int(words[12 + 3 * leg][1:])
        for _ in range(rounds):
            for word in words[:9]:
                if word[0] == "ABC"[late.CUES.index(cue) % 3]:
                    value = (value + int(word[3])) % 10 if word[2] == "+" else (value * int(word[3])) % 10
    return str(value)


# --- problems --------------------------------------------------------------------------------------------------------


def test_first_problems_never_change() -> None:
    assert (
        late.puzzle("train", 0).text
        == "A1+5 A2+2 A3+2 B1+1 B2+1 B3x7 C1+1 C2+5 C3+2 ? L1 elm n5 L2 salt n3 L3 glow n3 L4 kite n3 L5 onyx n5 5"
    )
    assert (
        late.puzzle("dev", 0).text
        == "A1x7 A2+1 A3+2 B1+2 B2+1 B3x7 C1x7 C2+1 C3x7 ? L1 fir n5 L2 clay n7 L3 mist n7 L4 kite n5 L5 onyx n5 5"
    )
    assert (
        late.puzzle("test", 0).text
        == "A1x7 A2+1 A3+5 B1+2 B2+2 B3x3 C1+1 C2x3 C3x3 ? L1 fir n7 L2 salt n3 L3 rain n7 L4 lark n7 L5 jade n5 2"
    )


@given(st.sampled_from(tiny.SPLITS), st.integers(0, 10**9), st.lists(st.integers(1, 9), min_size=5, max_size=5))
def test_a_puzzle_of_a_split_belongs_to_it_whatever_its_rounds(split: str, index: int, rounds: list[int]) -> None:
    puzzle = late.puzzle(split, index)
    other = late.Puzzle(puzzle.operations, puzzle.cues, tuple(rounds), puzzle.start)
    assert late.split_of(puzzle) == late.split_of(other) == split


@given(st.sampled_from(tiny.SPLITS), st.integers(0, 10**9), st.data())
def test_texts_have_the_promised_words_and_decisions_where_they_are_said_to_be(
    split: str, index: int, data: st.DataObject
) -> None:
    puzzle = late.puzzle(split, index)
    plan = tuple(data.draw(st.sampled_from(options)) for options in puzzle.options)
    words = puzzle.response(plan)
    assert late.parse(puzzle.text) == puzzle
    assert len(puzzle.text.split()) == 26
    assert len(words) == 13 + 7 * sum(puzzle.rounds)
    assert 118 <= len(words) <= 258
    assert tuple(words[place] for place in puzzle.decisions) == plan
    assert [words[place - 1] for place in puzzle.decisions] == list(late.LEGS)
    assert {*puzzle.text.split(), *words} <= set(late.VOCABULARY)


def test_decisions_sit_at_varying_places_and_most_are_late() -> None:
    places = list(
        zip(*(puzzle.decisions for puzzle in (late.puzzle("dev", index) for index in range(2000))), strict=True)
    )
    assert [(min(leg), max(leg)) for leg in places] == [(2, 2), (25, 53), (48, 104), (71, 155), (94, 206)]


def test_answers_agree_with_an_independent_calculation() -> None:
    assert [problem.answer for problem in PROBLEMS] == [independent_answer(puzzle.text) for puzzle in PUZZLES]


def test_an_error_of_value_is_never_repaired_by_right_legs() -> None:
    spoiled = 0
    for index in range(300):
        puzzle = late.puzzle("dev", index)
        right = puzzle.response(puzzle.plan)
        words = puzzle.response(misread(puzzle, 1))
        after = puzzle.decisions[2] - 2  # the value at the end of leg 2
        assert (words[-1] == right[-1]) == (words[after] == right[after])
        spoiled += words[-1] != right[-1]
    assert spoiled > 240


def test_the_student_writes_a_right_plan_as_often_as_its_knowledge_says() -> None:
    rng, right, arrived = Random(0), 0, 0
    for index in range(1500):
        puzzle = late.puzzle("dev", index)
        plan = puzzle.student_plan(rng)
        right += plan == puzzle.plan
        arrived += puzzle.response(plan)[-1] == puzzle.answer
    knows = list(late.STUDENT_KNOWS.values())
    expected = 1.0
    for leg in range(5):
        expected *= sum(knows[3 * leg : 3 * leg + 3]) / 3
    assert abs(right / 1500 - expected) < 0.03
    assert abs(arrived / 1500 - expected - 0.12 * (1 - expected)) < 0.04  # a wrong plan arrives by chance


def test_one_error_misleads_the_teacher_for_good() -> None:
    puzzle = PUZZLES[0]
    assert puzzle.misled(puzzle.plan) == puzzle.plan
    assert puzzle.misled(misread(puzzle, 4)) == puzzle.plan
    assert puzzle.misled(misread(puzzle, 1)) == puzzle.misled(misread(puzzle, 1, 3)) == misread(puzzle, 2, 3, 4)
    assert puzzle.misled(misread(puzzle, 0, 1, 2, 3, 4)) == misread(puzzle, 1, 2, 3, 4)


def swapped(text: str, place: int, word: str) -> str:
    words = text.split()
    words[place] = word
    return " ".join(words)


@pytest.mark.parametrize(
    ("place", "word"), [(11, "salt"), (11, "pine"), (12, "n0"), (12, "3"), (10, "L2"), (0, "A1+3"), (9, "!"), (25, "x")]
)
def test_parse_refuses_another_word(place: int, word: str) -> None:
    with pytest.raises(DataError, match="late world"):
        late.parse(swapped(PUZZLES[0].text, place, word))


# --- grading ---------------------------------------------------------------------------------------------------------


def test_the_right_response_is_correct_and_clean_until_its_answer() -> None:
    for problem, puzzle in zip(PROBLEMS, PUZZLES, strict=True):
        words = puzzle.response(puzzle.plan)
        verdict = TASK.grade(problem, " ".join(words))
        assert (verdict.correct, verdict.status) == (True, "correct")
        assert verdict.details == {"plan_right": True, "faithful": True}
        assert states(problem, words) == ["clean"] * len(words) + ["finished"]


def states(problem: Problem, words: list[str]) -> list[str]:
    return [TASK.prefix_state(problem, " ".join(words[:length])) for length in range(len(words) + 1)]


@pytest.mark.parametrize("leg", range(5))
def test_a_misread_cue_spoils_every_later_prefix_and_stays_faithful(leg: int) -> None:
    correct = 0
    for problem, puzzle in zip(PROBLEMS, PUZZLES, strict=True):
        words = puzzle.response(misread(puzzle, leg))
        verdict = TASK.grade(problem, " ".join(words))
        assert verdict.details == {"plan_right": False, "faithful": True}
        correct += verdict.correct
    assert correct < len(PROBLEMS) / 3
    clean = puzzle.decisions[leg] + 1
    assert states(problem, words) == ["clean"] * clean + ["wrong"] * (len(words) - clean) + ["finished"]


# --- bundled models --------------------------------------------------------------------------------------------------


def decision_logprobs(name: str, plans: list[tuple[str, ...]]) -> torch.Tensor:
    """Log-probability of the reading `misled` at each leg, `[problems, legs]`, in responses with `plans`."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / name)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype=torch.float32).eval()
    rows = []
    for problem, puzzle, plan in zip(PROBLEMS, PUZZLES, plans, strict=False):
        prompt = tokenizer.apply_chat_template(list(problem.messages or ()), add_generation_prompt=True)["input_ids"]
        words = puzzle.response(plan)
        ids = [*prompt, *tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]]
        assert (len(prompt), len(ids)) == (28, 28 + len(words))
        with torch.no_grad():
            logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        said = tokenizer.convert_tokens_to_ids(list(puzzle.misled(plan)))
        rows.append(logprobs_TV[torch.tensor(puzzle.decisions) + 27, torch.tensor(said)])
    return torch.stack(rows)


def test_the_teacher_is_right_on_its_path_and_confidently_wrong_off_it() -> None:
    on = decision_logprobs("teacher", [puzzle.plan for puzzle in PUZZLES[:12]])
    off = decision_logprobs("teacher", [misread(puzzle, 0) for puzzle in PUZZLES[:12]])
    returned = decision_logprobs("teacher", [misread(puzzle, 0, 2) for puzzle in PUZZLES[:12]])
    assert on.exp().mean() > 0.98
    assert off.exp().mean() > 0.95
    assert returned.exp().mean() > 0.9  # legs 2, 4 and 5 are written rightly: one error misleads for good


def test_the_student_reads_cues_as_it_was_taught_whatever_came_before() -> None:
    on = decision_logprobs("student", [puzzle.plan for puzzle in PUZZLES[:12]])
    knows = torch.tensor([[late.STUDENT_KNOWS[cue] for cue in puzzle.cues] for puzzle in PUZZLES[:12]])
    assert (on.exp() - knows).abs().mean() < 0.1
    off = decision_logprobs("student", [misread(puzzle, 0) for puzzle in PUZZLES[:12]])
    assert (off[:, 1:].exp() - (1 - knows[:, 1:])).abs().mean() < 0.1


def test_the_pair_is_named_small_and_of_the_world() -> None:
    assert {"tiny": tiny.TinyTask, "late": LateTask} == WORLDS
    assert resolve("late:student") == str(BUNDLED / "student")
    with pytest.raises(ModelError, match=r"late:nobody.*late:student, late:student-both, late:teacher"):
        resolve("late:nobody")
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) <= 2.5e6
    for name in ("teacher", "student"):
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED / name)
        assert [tokenizer.convert_ids_to_tokens(place) for place in range(len(tokenizer))] == list(late.VOCABULARY)
