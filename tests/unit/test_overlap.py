import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.config.schema import PromptsConfig
from headstart.records import Problem
from headstart.tasks import code, math
from headstart.tasks.overlap import EXCERPT, RUN, SOLUTION, WHOLE, Overlap, overlap
from headstart.tasks.prompts import load_problems
from real_tokenizers import real_data

SENTENCE = "one two three four five six seven eight nine ten eleven twelve thirteen"
QUESTION = "How many of the 12 apples does Ann keep?"
CODE = (
    "def keep(apples, given):\n    left = apples\n    for one in given:\n        left -= one\n    return max(left, 0)\n"
)


def asks(*questions: str, answer: str | None = None, **meta: Any) -> list[Problem]:
    turns = [({"role": "system", "content": "s"}, {"role": "user", "content": question}) for question in questions]
    return [Problem(f"p{place}", messages=turn, answer=answer, meta=meta) for place, turn in enumerate(turns)]  # type: ignore[arg-type]


def found(train: list[Problem], test: list[Problem]) -> list[tuple[str, str, str]]:
    return [(match.kind, match.test, match.train) for match in overlap(train, test).matches]


def test_the_same_question_whatever_the_layout() -> None:
    train = asks(
        "What is  $\\dfrac {1}{2}+x$ ?\n",
        "b",
        "“How many” of the 12  APPLES does Ann keep…",
        "On 1,000 \N{MINUS SIGN} x = 2",
    )
    tests = asks("what is $\\frac{1}{2}+x$?", "What is $\\frac{1}{2}-x$?", QUESTION, "c", "on $1000-x=2$")
    assert found(train, tests) == [("same", "p0", "p0"), ("same", "p2", "p2"), ("same", "p4", "p3")]


@pytest.mark.parametrize("sign", ["+", "*", "/", "<"])
def test_signs_tell_formulas_apart(sign: str) -> None:
    first, other = (f"Let a {s} b be the number of the pages that Ann reads and find it" for s in ("-", sign))
    assert found(asks(first), asks(first)) == [("same", "p0", "p0")]
    assert [kind for kind, *_ in found(asks(other), asks(first))] == ["near"] * (sign != "-")


def test_a_question_inside_a_longer_prompt_or_a_prompt_inside_a_test() -> None:
    wrapped = f"Please solve this. {QUESTION} Think step by step!"
    assert found(asks(wrapped), asks(QUESTION)) == [("inside", "p0", "p0")]
    assert found(asks(QUESTION), asks(wrapped)) == [("inside", "p0", "p0")]
    assert found(asks("What?", answer=f"I was asked: {QUESTION}"), asks(QUESTION)) == [("inside", "p0", "p0")]
    assert found(asks(wrapped), asks("x", question=QUESTION)) == [("inside", "p0", "p0")]
    assert found(asks(f"Ann has {WHOLE} apples, keep?"), asks("apples, keep?")) == []


def test_two_instructions_around_the_same_questions() -> None:
    questions = [QUESTION, "Where do all the boats on the river go at night?", "Why is the sky above us so blue today?"]
    train = asks(*(f"Solve this problem. {question} Think." for question in questions), "x")
    tests = asks(*(f"Q: {question} Answer with one word." for question in questions))
    assert found(train[:3], tests) == [("same", f"p{i}", f"p{i}") for i in range(3)]
    assert found(train, tests) == [("inside", f"p{i}", f"p{i}") for i in range(3)]  # x has not their beginning


def test_a_short_question_is_a_line_of_its_own() -> None:
    assert found(asks("Think step by step.\n\n Solve x + 1 = 2 \n"), asks("Solve $x+1=2$.")) == [("same", "p0", "p0")]
    assert found(asks("Think step by step. Solve x + 1 = 2"), asks("Solve x + 1 = 2")) == []


def test_an_instruction_that_many_tests_hold_is_no_copy() -> None:
    instruction = "Answer with the whole program in one python block."
    tests = asks(*(f"Task {place}. {instruction}" for place in range(10)))
    assert found(asks(instruction), tests) == []
    assert found(asks(f"{SENTENCE} then else"), asks(*(f"{SENTENCE} then {place}" for place in range(10)))) == []


def test_a_reference_solution_in_text_or_answer() -> None:
    other = Problem("q", text="Other", answer="4", meta={"references": [CODE, "x"]})
    tests = [*asks("Write it.", answer=CODE), other]
    expected = [("solution", "p0", "p0"), ("solution", "q", "p0")]
    assert found(asks(f"Explain this:\n```python\n{CODE.upper()}```"), tests) == expected
    assert found(asks("Do it", answer=CODE), tests) == expected
    short = " ".join(CODE.split()[: SOLUTION - 8])
    assert found(asks("Explain 4", answer="4"), [Problem("q", text="Other", answer="4")]) == []
    assert found(asks("Do it", answer=short), [Problem("q", text="Other", answer=short)]) == []


def test_a_worked_solution_without_the_calculator_of_gsm8k() -> None:
    worked = "Ann gives 2*3=<<2*3=6>>6 apples away. So she has 12-6=<<12-6=6>>6 apples and keeps all of them.\n#### 6"
    plain = worked.replace("<<2*3=6>>", "").replace("<<12-6=6>>", "")
    assert found(asks("x", answer=plain), asks("y", answer="6", references=[worked])) == [("solution", "p0", "p0")]


def test_near_needs_a_whole_run_of_words() -> None:
    shorter = SENTENCE.rpartition(" ")[0]
    tests = asks(f"Before {SENTENCE.upper()}!", f"{shorter} fourteen", "x")
    assert found(asks(f"Start: {SENTENCE}, and so on."), tests) == [("near", "p0", "p0")]


def test_each_counts_once_as_the_surest() -> None:
    tests = asks(QUESTION, answer=CODE)
    train = [*asks("x", answer=CODE), *asks(f"Now. {QUESTION}"), *asks(QUESTION)]
    assert [kind for kind, *_ in found(train, tests)] == ["same"]
    assert overlap(train, tests).counts == {"same": 1, "inside": 0, "solution": 0, "near": 0}


def test_nothing_overlaps_with_nothing() -> None:
    assert overlap([], []).warning("t") is None
    assert overlap([], asks("a")).matches == overlap(asks("a"), []).matches == ()


def test_warning_tells_the_counts_examples_and_what_to_do() -> None:
    tests = asks(SENTENCE + " a", SENTENCE.replace("one", "1") + " b", "c", QUESTION)
    start = SENTENCE[: EXCERPT - 2]
    assert overlap(asks("c", f"x {SENTENCE}", f"Now: {QUESTION}"), tests).warning("gsm8k") == (
        "gsm8k: 2 of 4 test problems are among the 3 training prompts (1 as the same question, 1 with something "
        f"around it), 1 more share a run of {RUN} words with one; its accuracy is inflated: remove these prompts or "
        f"choose another test. For example test problem p2 (“c”) in prompt p0; test problem p3 (“{QUESTION}”) in "
        f"prompt p2 (“Now: {QUESTION}”); test problem p0 (“{start}el…”) in prompt p1 (“x {start}…”)"
    )
    near = overlap(asks(f"x {SENTENCE}"), tests).warning("gsm8k")
    assert near is not None
    assert "0 of 4" in near
    assert "inflated" not in near


WORDS = st.lists(st.text("abcdefg", min_size=1, max_size=3), max_size=20)


@given(st.lists(st.text("hijklm", min_size=1, max_size=5), min_size=WHOLE, max_size=30), WORDS, WORDS, st.booleans())
def test_a_wrapped_question_is_found_and_another_is_not(
    question: list[str], before: list[str], after: list[str], train_is_wrapped: bool
) -> None:
    bare, wrapped = asks(" ".join(question)), asks(" ".join([*before, *question, *after]))
    pair = (wrapped, bare) if train_is_wrapped else (bare, wrapped)
    assert [kind for kind, *_ in found(*pair)] in (["same"], ["inside"])
    other = asks(" ".join(["n", *question[1:-1], "n"]))
    pair = (wrapped, other) if train_is_wrapped else (other, wrapped)
    assert [kind for kind, *_ in found(*pair)] in ([], ["near"])


@given(st.lists(st.text(st.sampled_from("ab 1\n"), max_size=60), max_size=8), st.randoms(use_true_random=False))
def test_every_copied_problem_is_found(tests: list[str], random: Any) -> None:
    train = [text.upper().replace(" ", "  ") for text in tests]
    random.shuffle(train)
    result = overlap([Problem(f"p{i}", text=t) for i, t in enumerate(train)], [Problem("t", text=t) for t in tests])
    assert [match.kind for match in result.matches] == ["same"] * len(tests)


def test_time_is_linear_where_all_share_an_instruction() -> None:
    instruction = "You are a helpful assistant and answer each of these questions with great care: "
    train = asks(*(f"{instruction}what is number {i} of the first list?" for i in range(3000)))
    tests = asks(*(f"{instruction}what is number {i} of the other list?" for i in range(3000)))
    start = time.process_time()
    assert overlap(train, tests).copies == 0
    assert time.process_time() - start < 5  # 0.6 s; comparing all pairs would take minutes


# --- public data sets, as far as they lie on this machine ------------------------------------------------------------


def _rows(name: str, column: str, answer: str | None = None) -> list[Problem]:
    return load_problems(PromptsConfig(source=str(real_data(name)), column=column, answer_column=answer))


@pytest.mark.parametrize(
    ("train", "test", "same", "inside", "near"),
    [
        (("math/train_7474.json.gz", "problem"), "math/math500.jsonl", 0, 0, 49),
        (("math/test.jsonl.gz", "problem"), "math/math500.jsonl", 500, 0, 0),
    ],
)
def test_public_training_sets(train: tuple[str, str], test: str, same: int, inside: int, near: int) -> None:
    result = overlap(_rows(*train), math.Math500(real_data(test)).problems())
    assert result.counts == {"same": same, "inside": inside, "solution": 0, "near": near}


def test_gsm8k_train_and_test_share_three_variants() -> None:
    train, tests = _rows("gsm8k/train.jsonl.gz", "question"), math.Gsm8k(real_data("gsm8k/test.jsonl")).problems()
    start = time.process_time()
    assert overlap(train, tests).counts == {"same": 0, "inside": 0, "solution": 0, "near": 3}
    assert time.process_time() - start < 10  # 0.8 s


def _mbpp() -> list[Problem]:
    return list(code.Mbpp(real_data("mbpp/mbpp.jsonl")).problems())


def test_all_of_mbpp_holds_its_test_split() -> None:
    bare = _rows("mbpp/mbpp.jsonl", "text")
    assert overlap(bare, _mbpp()).counts["same"] == 500
    chatty = [
        Problem(p.id, text=f"{i} Please: {p.messages[0]['content']} Go {i}!") for i, p in enumerate(bare) if p.messages
    ]
    assert overlap(chatty, _mbpp()).counts["inside"] == 500
    programs = _rows("mbpp/mbpp.jsonl", "code")
    assert overlap(programs, _mbpp()).counts == {"same": 0, "inside": 0, "solution": 430, "near": 0}


def test_mbpp_train_and_humaneval_hold_little_of_it() -> None:
    train = _rows("mbpp/mbpp.jsonl", "text", "code")[600:]
    assert overlap(train, _mbpp()).counts == {"same": 3, "inside": 4, "solution": 2, "near": 8}
    humaneval = _rows("humaneval/HumanEval.jsonl.gz", "prompt", "canonical_solution")
    assert overlap(humaneval, _mbpp()) == Overlap(164, 500)
