"""recipes/lm-eval: the bridge gives lm-eval our grader's verdict on a row of either benchmark."""

import importlib.util
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "recipes/lm-eval"


@pytest.mark.parametrize(
    ("row", "response", "expected"),
    [
        ({"answer": "9*2=18\n#### 18"}, r"so \boxed{18}", (1.0, 0.0)),
        ({"answer": r"\frac{1}{2}"}, r"\boxed{0.5}", (1.0, 0.0)),
        ({"answer": "#### 18"}, r"\boxed{19}", (0.0, 0.0)),
        ({"answer": "#### 18"}, "I do not know the answer", (0.0, 1.0)),
    ],
)
def test_verdicts(row, response, expected):
    spec = importlib.util.spec_from_file_location("grade", FOLDER / "grade.py")
    grade = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grade)
    found = grade.graded(row, [response])
    assert (found["accuracy"], found["no_answer"]) == expected


@pytest.mark.parametrize("task", ["gsm8k", "math500"])
def test_the_tasks_ask_our_prompt(task):
    from headstart.tasks.math import SYSTEM

    text = (FOLDER / f"headstart_{task}.yaml").read_text().replace("!function ", "")
    assert yaml.safe_load(text)["description"] == SYSTEM
