"""The bundled world: what its texts promise, how they are graded, and that the bundled models speak them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import headstart
from headstart.errors import ConfigError, DataError
from headstart.models.load import resolve
from headstart.records import Problem
from headstart.tasks import tiny
from headstart.tasks.tiny import TinyTask

BUNDLED = Path(headstart.__file__).parent / "data" / "tiny"
MODELS = ("teacher", "student", "student-weak")
TASK = TinyTask("dev", 40)
PROBLEMS = TASK.problems()


def shown(problem: Problem) -> tiny.Puzzle:
    assert problem.messages is not None
    return tiny.parse(problem.messages[0]["content"])


def right_words(problem: Problem) -> list[str]:
    puzzle = shown(problem)
    return puzzle.response(puzzle.plan)


def wrong_plan(puzzle: tiny.Puzzle) -> tuple[str, ...]:
    return (tiny.MISTAKEN[puzzle.cues[0]], *puzzle.plan[1:])


def independent_answer(problem: Problem) -> str:
    """The answer from the user's message alone, by another route: the words as they stand, no Puzzle."""
    assert problem.messages is not None
    words = problem.messages[0]["content"].split()
    value = int(words[13])
    for _ in range(int(words[14][1:])):
        for cue in words[10:13]:
            for word in words[:9]:
                if word[0] == "ABC"[tiny.CUES.index(cue) // 3]:
                    value = (value + int(word[3])) % 10 if word[2] == "+" else (value * int(word[3])) % 10
    return str(value)


# --- problems --------------------------------------------------------------------------------------------------------


def test_first_problems_never_change() -> None:
    def first(split: str) -> str:
        return TinyTask(split, 1).problems()[0].messages[0]["content"]  # type: ignore[index]

    assert first("train") == "A1+1 A2x3 A3+5 B1x3 B2+5 B3+5 C1x7 C2+2 C3x7 ? flint dusk reed 9 n9"
    assert first("dev") == "A1+5 A2x7 A3+7 B1+5 B2+1 B3+7 C1+7 C2+7 C3+2 ? amber moss fern 3 n9"
    assert first("test") == "A1+5 A2+7 A3+1 B1+1 B2+2 B3+2 C1+5 C2+7 C3+1 ? fern tide slate 1 n9"


def test_growing_a_split_keeps_the_earlier_problems() -> None:
    assert tuple(TinyTask("dev", 60).problems())[:40] == tuple(PROBLEMS)
    assert [problem.id for problem in PROBLEMS[:2]] == ["tiny/dev/0", "tiny/dev/1"]


def test_splits_share_no_problem_even_with_other_rounds() -> None:
    seen = {split: {replace(tiny.puzzle(split, index), rounds=0).text for index in range(800)} for split in tiny.SPLITS}
    assert all(len(texts) == 800 for texts in seen.values())
    assert len(seen["train"] | seen["dev"] | seen["test"]) == 2400


@given(st.sampled_from(tiny.SPLITS), st.integers(0, 10**9), st.integers(1, 9))
def test_a_puzzle_of_a_split_belongs_to_it_whatever_its_rounds(split: str, index: int, rounds: int) -> None:
    assert tiny.split_of(replace(tiny.puzzle(split, index), rounds=rounds)) == split


@given(st.sampled_from(tiny.SPLITS), st.integers(0, 10**9))
def test_texts_have_the_promised_length_and_words(split: str, index: int) -> None:
    puzzle = tiny.puzzle(split, index)
    response = puzzle.response(puzzle.plan)
    assert len(puzzle.text.split()) == 15
    assert len(response) + 1 == {7: 154, 9: 192}[puzzle.rounds]
    assert tuple(response[place] for place in tiny.DECISIONS) == puzzle.plan
    assert set(puzzle.text.split()) | set(response) <= set(tiny.VOCABULARY)
    assert tiny.parse(puzzle.text) == puzzle


def test_answers_agree_with_an_independent_calculation() -> None:
    assert [problem.answer for problem in PROBLEMS] == [independent_answer(problem) for problem in PROBLEMS]


def test_the_vocabulary_has_no_doubles_and_both_rounds_occur() -> None:
    assert len(set(tiny.VOCABULARY)) == len(tiny.VOCABULARY) == 101
    assert {shown(problem).rounds for problem in PROBLEMS} == {7, 9}


def test_a_wrong_plan_is_right_by_chance_one_time_in_ten() -> None:
    rng, right, wrong = Random(0), 0, 0
    for index in range(1500):
        puzzle = tiny.puzzle("dev", index)
        plan = puzzle.student_plan(rng)
        if plan != puzzle.plan:
            wrong += 1
            right += puzzle.response(plan)[-1] == puzzle.answer
    assert 0.07 < right / wrong < 0.14
    assert abs(wrong / 1500 - 0.598) < 0.04  # one minus the cube of the mean cue probability


def test_the_student_misreads_three_cues_more_often_than_not() -> None:
    assert sum(share < 0.5 for share in tiny.STUDENT_KNOWS.values()) == 3
    assert all(tiny.MEANING[cue] != tiny.MISTAKEN[cue] for cue in tiny.CUES)


@pytest.mark.parametrize(("split", "size"), [("validation", 3), ("dev", 0)])
def test_a_wrong_split_or_size_is_refused(split: str, size: int) -> None:
    with pytest.raises(ConfigError, match=r"validation|0"):
        TinyTask(split, size)


# --- grading ---------------------------------------------------------------------------------------------------------


def test_the_right_response_is_correct_in_every_reading() -> None:
    for problem in PROBLEMS:
        verdict = TASK.grade(problem, " ".join(right_words(problem)))
        assert verdict.correct
        assert verdict.status == "correct"
        assert verdict.details == {"plan_right": True, "faithful": True}


def test_a_wrong_plan_carried_out_well_is_faithful() -> None:
    verdicts = []
    for problem in PROBLEMS:
        puzzle = shown(problem)
        response = puzzle.response(wrong_plan(puzzle))
        verdict = TASK.grade(problem, " ".join(response))
        assert verdict.details == {"plan_right": False, "faithful": True}
        assert verdict.correct == (response[-1] == problem.answer)
        verdicts.append(verdict.correct)
    assert sum(verdicts) < len(verdicts) / 3


@given(st.sampled_from(PROBLEMS), st.data())
def test_any_changed_execution_word_is_unfaithful(problem: Problem, data: st.DataObject) -> None:
    words = right_words(problem)
    place = data.draw(st.integers(17, len(words) - 3))
    words[place] = data.draw(st.sampled_from([word for word in tiny.VOCABULARY if word not in (words[place], "ans")]))
    verdict = TASK.grade(problem, " ".join(words))
    assert verdict.details == {"plan_right": True, "faithful": False}
    assert verdict.correct


def test_a_changed_answer_is_wrong_and_unfaithful() -> None:
    for problem in PROBLEMS:
        words = right_words(problem)
        words[-1] = str((int(words[-1]) + 1) % 10)
        verdict = TASK.grade(problem, " ".join(words))
        assert (verdict.correct, verdict.status) == (False, "wrong")
        assert verdict.details == {"plan_right": True, "faithful": False}


@pytest.mark.parametrize("cut", [0, 3, 17, 100, -1])
def test_a_response_without_an_answer_is_no_answer(cut: int) -> None:
    verdict = TASK.grade(PROBLEMS[0], " ".join(right_words(PROBLEMS[0])[:cut]))
    assert (verdict.correct, verdict.status) == (False, "no_answer")
    assert verdict.details == {"plan_right": cut in (17, 100, -1), "faithful": False}


def test_words_after_the_answer_do_not_change_it_but_are_unfaithful() -> None:
    verdict = TASK.grade(PROBLEMS[0], " ".join([*right_words(PROBLEMS[0]), "ans", "x"]))
    assert verdict.correct
    assert not verdict.details["faithful"]


# --- prefixes --------------------------------------------------------------------------------------------------------


def states(problem: Problem, words: list[str]) -> list[str]:
    return [TASK.prefix_state(problem, " ".join(words[:length])) for length in range(len(words) + 1)]


def test_every_prefix_of_the_right_response_is_clean_until_the_answer() -> None:
    for problem in PROBLEMS[:8]:
        words = right_words(problem)
        assert states(problem, words) == ["clean"] * len(words) + ["finished"]


@pytest.mark.parametrize("decision", [0, 1, 2])
def test_a_wrong_decision_spoils_every_later_prefix(decision: int) -> None:
    for problem in PROBLEMS[:8]:
        puzzle = shown(problem)
        plan = list(puzzle.plan)
        plan[decision] = tiny.MISTAKEN[puzzle.cues[decision]]
        words = puzzle.response(plan)
        clean = tiny.DECISIONS[decision] + 1
        assert states(problem, words) == ["clean"] * clean + ["wrong"] * (len(words) - clean) + ["finished"]


@given(st.sampled_from(PROBLEMS), st.data())
@settings(max_examples=20)
def test_a_wrong_running_value_spoils_every_later_prefix(problem: Problem, data: st.DataObject) -> None:
    words = right_words(problem)
    values = [place for place in range(18, len(words) - 2) if words[place] in tiny.DIGITS]
    place = data.draw(st.sampled_from(values))
    words[place] = str((int(words[place]) + data.draw(st.integers(1, 9))) % 10)
    expected = ["clean"] * (place + 1) + ["wrong"] * (len(words) - place - 1) + ["finished"]
    assert states(problem, words) == expected


# --- hostile text ----------------------------------------------------------------------------------------------------

babble = st.lists(st.one_of(st.sampled_from([*tiny.VOCABULARY, "ans"]), st.text(max_size=4)), max_size=60).map(" ".join)


@given(st.sampled_from(PROBLEMS), st.one_of(st.text(), babble))
@settings(max_examples=300)
def test_no_text_makes_grading_raise(problem: Problem, text: str) -> None:
    verdict = TASK.grade(problem, text)
    assert verdict.status in ("correct", "wrong", "no_answer")
    assert verdict.correct == (verdict.status == "correct")
    assert TASK.prefix_state(problem, text) in ("clean", "wrong", "finished")
    assert (verdict.status == "no_answer") == (TASK.prefix_state(problem, text) != "finished")


@given(st.one_of(st.text(), babble))
def test_parse_refuses_what_is_no_problem_of_this_world(text: str) -> None:
    with pytest.raises(DataError, match="tiny world"):
        tiny.parse(text)


# --- bundled models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    return BUNDLED / str(request.param)


def test_the_tokenizer_renders_a_prompt_of_17_tokens_and_reads_responses_back(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.convert_ids_to_tokens(place) for place in range(len(tokenizer))] == list(tiny.VOCABULARY)
    for problem in PROBLEMS[:10]:
        ids = tokenizer.apply_chat_template(list(problem.messages or ()), add_generation_prompt=True)["input_ids"]
        assert len(ids) == 17
        assert tokenizer.decode(ids) == f"<user> {shown(problem).text} <asst>"
        response = " ".join(right_words(problem))
        ids = tokenizer(f"{response} <eos>", add_special_tokens=False)["input_ids"]
        assert len(ids) in (154, 192)
        assert tokenizer.decode(ids, skip_special_tokens=True) == response
        assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_the_chat_template_refuses_a_system_message(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "plan"}, {"role": "user", "content": shown(PROBLEMS[0]).text}]
    with pytest.raises(Exception, match="roles user and assistant only"):
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def test_the_model_loads_and_speaks_the_world(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [list(problem.messages or ()) for problem in PROBLEMS[:16]]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    words = [tokenizer.decode(row).split() for row in ids[:, 17:]]
    filler = tiny.PLAN.replace("{} ", "").split()
    planned = [[word for place, word in enumerate(row[:17]) if place not in tiny.DECISIONS] for row in words]
    assert planned == [filler] * 16
    assert [row[17] for row in words] == [str(shown(problem).start) for problem in PROBLEMS[:16]]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.tie_word_embeddings
    plans = [tuple(row[place] for place in tiny.DECISIONS) for row in words]
    right = sum(plan == shown(problem).plan for plan, problem in zip(plans, PROBLEMS, strict=False))
    assert right == 16 if folder.name == "teacher" else right < 12


# --- the bundled teacher with a tokenizer of its own ------------------------------------------------------------------


@pytest.fixture(scope="module")
def cross() -> Path:
    return Path(resolve("tiny:teacher-cross"))


@pytest.fixture(scope="module")
def cross_tokenizer(cross: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(cross)


def test_the_cross_teacher_is_small_and_may_be_read_by_everyone(cross: Path) -> None:
    assert cross == BUNDLED / "teacher-cross"
    assert sum(file.stat().st_size for file in cross.iterdir()) < 1.5e6
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in cross.iterdir())


def test_the_cross_tokenizer_keeps_every_byte_of_a_conversation(cross_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = cross_tokenizer
    for problem in PROBLEMS:
        user = list(problem.messages or ())
        words = right_words(problem)
        response = "".join(f" {word}" for word in words)
        prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True)["input_ids"]
        ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        answer = {"role": "assistant", "content": " ".join(words)}
        whole = tokenizer.apply_chat_template([*user, answer])["input_ids"]
        assert whole == [*prompt, *ids, tokenizer.eos_token_id]
        assert tokenizer.decode(whole) == f"<user> {shown(problem).text}<asst>{response}<eos>"
        assert tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True) == response


@given(st.text(max_size=40))
def test_the_cross_tokenizer_keeps_any_text(cross_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assume(not any(special in text for special in tiny.SPECIAL))
    assert cross_tokenizer.decode(cross_tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_cross_tokenizer_splits_and_joins_words(cross_tokenizer: PreTrainedTokenizerBase) -> None:
    words, starting, alone = 0, 0, 0
    for problem in PROBLEMS:
        spaced = [f" {word}" for word in right_words(problem)]
        ids = cross_tokenizer("".join(spaced), add_special_tokens=False)["input_ids"]
        tokens = set(places(cross_tokenizer.convert_ids_to_tokens(ids)))
        starts = {start for start, _ in tokens}
        words += len(spaced)
        starting += sum(start in starts for start, _ in places(spaced))
        alone += sum(place in tokens for place in places(spaced))
    assert 0.7 < starting / words < 0.9
    assert 0.3 < alone / words < 0.5


def places(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Where each piece of a text starts and ends."""
    return list(pairwise(accumulate(map(len, pieces), initial=0)))


def test_the_cross_tokenizer_has_the_special_tokens_under_ids_of_its_own(
    cross_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = cross_tokenizer
    specials = [special for special in tiny.SPECIAL if special != tiny.UNKNOWN]
    ids = tokenizer.convert_tokens_to_ids(specials)
    assert set(ids) == set(tokenizer.all_special_ids) == set(range(len(tokenizer) - 4, len(tokenizer)))
    assert [tokenizer(special, add_special_tokens=False)["input_ids"] for special in specials] == [[id_] for id_ in ids]


def test_the_cross_teacher_answers_rightly(cross: Path, cross_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = cross_tokenizer
    model = AutoModelForCausalLM.from_pretrained(cross)
    messages = [list(problem.messages or ()) for problem in PROBLEMS[:16]]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=320)
    responses = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [TASK.grade(problem, response).correct for problem, response in zip(PROBLEMS, responses, strict=False)]
    assert sum(right) >= 15
    assert all(response.startswith(" plan first we use ") for response in responses)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_the_models_together_are_small() -> None:
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) <= 8 * 2**20
