import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.config import evaluation
from headstart.errors import DataError
from headstart.interfaces import Task
from headstart.tasks.grading.answers import has_answer_mark, last_boxed
from headstart.tasks.grading.text import grade_boxed, grade_exact, grade_number
from headstart.tasks.jsonl import JsonlTask
from real_tokenizers import real_data

GRADERS = (grade_exact, grade_number, grade_boxed)
HOSTILE = st.text(st.sampled_from("\\boxed{} {}$,.-+#0123456789\n\u2028é"), max_size=200) | st.text(max_size=200)


@pytest.mark.parametrize(
    ("response", "gold", "status"),
    [
        ("so 18.", "18", "correct"),
        ("It is $1,234.50", "1234.5", "correct"),
        ("18.00 dollars", "#### 18", "correct"),
        ("first 3 then 4", "3", "wrong"),
        ("the list 1,2", "2", "correct"),
        ("10,000,000", "10000000", "correct"),
        ("3-4", "4", "correct"),
        ("x = -4", "-4", "correct"),
        ("-$5", "-5", "correct"),
        ("it is \N{MINUS SIGN}7", "-7", "correct"),
        ("10{,}000", "10000", "correct"),
        (".5", "0.5", "correct"),
        ("-. nothing", "1", "no_answer"),
        ("none", "1", "no_answer"),
        ("7", "no number", "wrong"),
        ("12", "She has 5 + 7 = 12.\n#### 12", "correct"),
        ("5", "She has 5 + 7 = 12.\n#### 12", "wrong"),
        ("<think>12</think>\n15", "15", "correct"),
        ("The answer is 5 or 7.", "7", "no_answer"),
        ("The answer is not 18.", "18", "no_answer"),
        ("The answer is 40% of 50, i.e. 20.", "20", "correct"),
        (r"\boxed{18} eggs, of which 3 are left", "18", "correct"),
        (r"\boxed{7}, no, \boxed{8", "7", "no_answer"),
        (r"\boxed{3} and \boxed{5}", "5", "no_answer"),
        (r"\boxed{x > 18}", "18", "no_answer"),
        (r"\boxed{5\text{ cm}^2}", "5", "correct"),
        ("#### 42\nin 3 ways", "42", "correct"),
        ("#### Step 1: 5 eggs\n#### Step 2: 3\nSo we get 18", "18", "correct"),
        (r"10\,080", "10080", "correct"),
        ("1.6e-19", "1.6e-19", "correct"),
        (r"\boxed{1.6\times 10^{-19}}", "1.6e-19", "correct"),
        ("0.00000012", "0.00000034", "wrong"),
    ],
)
def test_number(response: str, gold: str, status: str) -> None:
    assert grade_number(response, gold).status == status


@pytest.mark.parametrize(
    ("response", "gold", "status"),
    [
        (r"\boxed{4}", "4", "correct"),
        (r"\boxed{4} no, \boxed{5}", "5", "correct"),
        (r"\boxed{4} and \boxed{5", "4", "no_answer"),
        (r"\boxed{3} and \boxed{5}", "3, 5", "correct"),
        (r"\fbox{42}", "42", "correct"),
        (r"$\boxed\frac12$", r"\frac{1}{2}", "correct"),
        (r"<think>\boxed{4}</think>\boxed{5}", "5", "correct"),
        (r"<think>\boxed{4}</think>5", "4", "no_answer"),
        (r"\boxed{10\,080}", "10080", "correct"),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", "correct"),
        (r"\boxed{3 \tfrac{1}{2}}", r"\frac{7}{2}", "correct"),
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac {1} {2}}", "correct"),
        (r"\boxed{\left\{ 1 \right\}}", r"\left\{1\right\}", "correct"),
        (r"\boxed{\}}", r"\}", "correct"),
        (r"\boxed{1 2}", "12", "wrong"),
        (r"\boxed{1,000.0}", "1000", "correct"),
        (r"\boxed{\$5}", "5", "correct"),
        (r"\\boxed{7}", "7", "correct"),
        (r"\boxed {7}", "7", "correct"),
        (r"\boxed{}", "7", "no_answer"),
        ("7", "7", "no_answer"),
        (r"\boxed{42}", "six times seven\n#### 42", "correct"),
    ],
)
def test_boxed(response: str, gold: str, status: str) -> None:
    assert grade_boxed(response, gold).status == status


def test_boxed_tells_first_last_and_open_boxes_apart() -> None:
    verdict = grade_boxed(r"\boxed{4} wait \boxed{5} and again \boxed{4", "4")
    assert not verdict.correct
    assert verdict.details == {"first_box": True, "open_box": True}
    assert grade_boxed("nothing", "4").details == {"first_box": False, "open_box": False}


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("#### 18", True),
        ("so #### 5", True),
        ("#### Answer: 5", True),
        ("#### -3 dollars", True),
        (r"#### $\frac{1}{2}$", True),
        (r"\fbox{3}", True),
        (r"<think>a</think>\boxed{5}", True),
        ("#### Step 1: eggs", False),
        ("#### Step 2", False),
        ("#### 1. Eggs", False),
        ("#### 3) money", False),
        ("#### 2nd step", False),
        ("##### 5", False),
        ("### 5", False),
        ("the answer is 5", False),
        (r"<think>\boxed{5}", False),
        (r"<think>\boxed{5}</think>", False),
        ("<think>#### 5", False),
        (r"\boxed{5}, or \boxed{", False),
    ],
)
def test_an_answer_is_marked_outside_of_thoughts_and_headings(text: str, marked: bool) -> None:
    assert has_answer_mark(text) == marked


def test_exact() -> None:
    assert grade_exact("<think>no</think>\nyes", "yes").correct
    assert grade_exact("<think>yes", "yes").status == "no_answer"
    assert grade_exact(" yes\n", "yes").correct
    assert grade_exact("Yes", "yes").status == "wrong"
    assert grade_exact(" \n", "yes").status == "no_answer"


@given(HOSTILE, HOSTILE)
def test_graders_never_raise(response: str, gold: str) -> None:
    for grade in GRADERS:
        verdict = grade(response, gold)
        assert verdict.correct == (verdict.status == "correct")
    has_answer_mark(response)


@given(st.text(st.sampled_from("ab1{}\\ "), max_size=30), st.text(max_size=30))
def test_a_balanced_box_is_found_whatever_stands_before_it(content: str, before: str) -> None:
    inner = content.replace("\\", "").replace("}", "}x").count("{")
    content = content.replace("\\", "").replace("{", "").replace("}", "") + "{}" * inner
    assert last_boxed(before.replace("\\", "") + r"\boxed{" + content + "}") == content


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" * 30_000, "{" * 100_000, r"\boxed{" * 20_000 + "}" * 20_000, "9" * 200_000, r"\boxed" + " " * 100_000,
     "1,111" * 30_000, "-" * 100_000, "\\" * 100_000],
)  # fmt: skip
def test_long_hostile_text_is_graded_in_one_pass(text: str) -> None:
    # Anything quadratic would take minutes here.
    for grade in GRADERS:
        assert not grade(text, "42").correct


def test_gsm8k_and_math_references_are_accepted() -> None:
    gsm8k = [json.loads(line) for line in real_data("gsm8k/test.jsonl").read_text().split("\n") if line]
    assert all(grade_number(row["answer"], row["answer"]).correct for row in gsm8k)
    math = [json.loads(line) for line in real_data("math/math500.jsonl").read_text().split("\n") if line]
    assert all(grade_boxed(row["solution"], row["answer"]).correct for row in math)
    shifted = [grade_boxed(a["solution"], b["answer"]).correct for a, b in zip(math, math[7:], strict=False)]
    assert sum(shifted) <= 10  # answers like 2 are shared by chance


def _task(folder: Path, rows: list[object], **options: object) -> JsonlTask:
    path = folder / "sums.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return JsonlTask(evaluation.JsonlTask.model_validate({"path": path, **options}))


def test_jsonl_task_asks_and_grades(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2?", "answer": 4}, {"prompt": "3+3?", "answer": "6"}]
    task: Task = _task(tmp_path, rows, grader="number")
    first, second = task.problems()
    assert (task.name, first.id, second.id) == ("sums", "sums/0", "sums/1")
    assert first.messages == ({"role": "user", "content": "2+2?"},)
    assert task.grade(first, "it is 4").correct
    assert not task.grade(second, "it is 4").correct
    assert task.prefix_state(first, "it is 4") == "unknown"
    assert task.prefix_state(first, "so\n#### 4") == "finished"
    assert task.prefix_state(first, r"so \boxed{4} because") == "finished"
    exact = _task(tmp_path, rows)
    assert exact.prefix_state(first, r"\boxed{4}") == "unknown"
    assert exact.grade(first, "4\n").correct


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a", "answer": "1"}, {"prompt": "b"}], {}, "row 2: column 'answer' has no answer"),
        ([{"prompt": "a", "answer": " "}], {}, "row 1: column 'answer' has no answer"),
        ([{"prompt": "a", "answer": "x"}], {"grader": "number"}, "holds no number"),
        ([{"prompt": "a", "answer": "1", "id": 3}] * 2, {}, "row 2: the id '3' is already that of row 1"),
        ([{"prompt": "a", "answr": "1"}], {}, "no column 'answer'; did you mean 'answr'?"),
    ],
)
def test_jsonl_task_refuses_rows_it_cannot_grade(
    tmp_path: Path, rows: list[object], options: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        _task(tmp_path, rows, **options).problems()


def test_jsonl_task_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown file type"):
        JsonlTask(evaluation.JsonlTask(path=tmp_path / "sums.csv")).problems()
