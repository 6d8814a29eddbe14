import gzip
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.records import Problem
from headstart.tasks.overlap import RUN, overlap, question
from real_tokenizers import real_data

SENTENCE = "one two three four five six seven eight nine ten eleven twelve thirteen"


def _texts(name: str, field: str) -> list[str]:
    data = real_data(name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    rows: list[dict[str, Any]] = (
        json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    )
    return [row[field] for row in rows]


def test_exact_is_up_to_case_and_white_space_and_keeps_the_signs() -> None:
    train = ["What is  $\\frac {1}{2}+x$ ?\n", "b"]
    found = overlap(train, ["what is $\\frac{1}{2}+x$?", "What is $\\frac{1}{2}-x$?", "c"])
    assert (found.train, found.test, found.exact, found.near) == (2, 3, (0,), ())


def test_near_needs_a_whole_run_of_words() -> None:
    shorter = SENTENCE.rpartition(" ")[0]
    found = overlap([f"Start: {SENTENCE}, and so on."], [f"Before {SENTENCE.upper()}!", f"{shorter} fourteen", "x"])
    assert (found.exact, found.near) == ((), (0,))


def test_a_run_that_most_test_problems_share_is_an_instruction() -> None:
    tests = [f"{SENTENCE} then the problem number {place}" for place in range(10)]
    assert overlap([f"{SENTENCE} then something else"], tests).near == ()
    assert overlap([tests[3]], tests).exact == (3,)


def test_nothing_overlaps_with_nothing() -> None:
    assert overlap([], []).warning("t") is None
    assert overlap([], ["a"]).exact == overlap(["a"], []).exact == ()


def test_warning_tells_the_counts_and_what_to_do() -> None:
    tests = [SENTENCE + " a", SENTENCE.replace("one", "1") + " b", "c"]
    assert overlap(["c", f"x {SENTENCE}"], tests).warning("gsm8k") == (
        f"gsm8k: 1 of 3 test problems are among the 2 training prompts, 1 more share a run of {RUN} words with one; "
        "its accuracy is inflated: remove these prompts or choose another test"
    )
    near = overlap([f"x {SENTENCE}"], tests).warning("gsm8k")
    assert near is not None
    assert "0 of 3" in near
    assert "inflated" not in near


def test_question_is_what_the_user_says() -> None:
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    assert question(Problem("p", messages=turns)) == "u"
    assert question(Problem("p", text="t")) == "t"


@given(st.lists(st.text(st.sampled_from("ab 1\n"), max_size=60), max_size=8), st.randoms(use_true_random=False))
def test_every_copied_problem_is_found(tests: list[str], random: Any) -> None:
    train = [text.upper().replace(" ", "  ") for text in tests]
    random.shuffle(train)
    found = overlap(train, tests)
    assert found.exact == tuple(range(len(tests)))
    assert found.near == ()


@pytest.mark.parametrize(
    ("train", "test", "exact", "near"),
    [
        (("math/train_7474.json.gz", "problem"), ("math/math500.jsonl", "problem"), 0, 49),
        (("math/test.jsonl.gz", "problem"), ("math/math500.jsonl", "problem"), 500, 0),
        (("gsm8k/train.jsonl.gz", "question"), ("gsm8k/test.jsonl", "question"), 0, 3),
    ],
)
def test_public_training_sets(train: tuple[str, str], test: tuple[str, str], exact: int, near: int) -> None:
    texts = _texts(*train), _texts(*test)
    found = overlap(*texts)  # 0.3 to 0.5 s; comparing all pairs would take minutes
    assert (len(found.exact), len(found.near)) == (exact, near)
