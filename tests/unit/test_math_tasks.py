"""GSM8K, MATH-500, MATH test and AIME: rows, ids, prompts, gold answers, and what is said of unusable data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from headstart.errors import DataError
from headstart.interfaces import Task
from headstart.records import Sampling
from headstart.tasks.math import SYSTEM, Aime, Gsm8k, Math500, MathTask
from real_tokenizers import real_data


def write(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gsm8k_gold_is_right_for_all_1319_problems() -> None:
    path = real_data("gsm8k/test.jsonl")
    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    task: Task = Gsm8k(path)
    problems = task.problems()
    assert [problem.id for problem in problems] == [str(row) for row in range(1319)]
    as_written = [task.grade(p, s) for p, s in zip(problems, solutions, strict=True)]
    assert sum(verdict.correct for verdict in as_written) == 1319
    boxed = [
        task.grade(p, rf"so \boxed{{{s.split('####')[1].strip()}}}") for p, s in zip(problems, solutions, strict=True)
    ]
    assert sum(verdict.correct for verdict in boxed) == 1319
    shifted = [task.grade(p, s) for p, s in zip(problems, solutions[1:] + solutions[:1], strict=True)]
    same = sum(p.answer == q.answer for p, q in zip(problems, problems[1:] + problems[:1], strict=True))
    assert sum(verdict.correct for verdict in shifted) == same < 50


@pytest.mark.parametrize(
    ("kind", "file", "count", "first_id"),
    [
        (Math500, "math/math500.jsonl", 500, "0"),
        (Math500, "math/test.jsonl.gz", 5000, "0"),
        (Aime, "aime/aime24.jsonl", 30, "aime24-0"),
        (Aime, "aime/aime25.jsonl", 30, "aime25-0"),
    ],
)
def test_the_benchmark_files_are_read(kind: type[MathTask], file: str, count: int, first_id: str) -> None:
    task = kind(real_data(file))
    problems = task.problems()
    assert len(problems) == len({problem.id for problem in problems}) == count
    assert problems[0].id == first_id
    assert all(problem.answer for problem in problems)
    correct = [task.grade(problem, rf"\boxed{{{problem.answer}}}").correct for problem in problems]
    assert all(correct)


def test_math_500_and_its_source_agree_on_the_gold_answers() -> None:
    answers = {
        p.messages[1]["content"]: p.answer for p in Math500(real_data("math/test.jsonl.gz")).problems() if p.messages
    }
    for problem in Math500(real_data("math/math500.jsonl")).problems():
        assert problem.messages is not None
        assert answers[problem.messages[1]["content"]] == problem.answer


def test_prompt_and_default_sampling_are_the_papers(tmp_path: Path) -> None:
    task = Math500(write(tmp_path, {"problem": "What is $1+1$?", "answer": 2}))
    (problem,) = task.problems()
    assert problem.messages == (
        {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
        {"role": "user", "content": "What is $1+1$?"},
    )
    assert problem.answer == "2"
    assert (task.samples, task.sampling, task.max_tokens) == (4, Sampling(0.7, 0.95, 0), 2048)
    assert task.system == SYSTEM


def test_a_base_model_is_asked_in_plain_text(tmp_path: Path) -> None:
    (problem,) = Math500(write(tmp_path, {"problem": "What is $1+1$?", "answer": 2}), chat=False).problems()
    assert problem.messages is None
    assert problem.text == f"What is $1+1$?\n\n{SYSTEM}\n\n"


def test_a_prefix_is_finished_once_a_box_is_complete(tmp_path: Path) -> None:
    task = Aime(write(tmp_path, {"problem": "?", "answer": 0}))
    (problem,) = task.problems()
    assert (problem.id, problem.answer) == ("0", "0")
    assert task.prefix_state(problem, "so the answer is 7 = \\boxed{7") == "unknown"
    assert task.prefix_state(problem, "so the answer is \\boxed{7}") == "finished"


@pytest.mark.parametrize(
    ("kind", "row", "parts"),
    [
        (Gsm8k, {"question": "How many?", "answer": "no mark"}, ["row 2", "'answer'", "no mark", "#### 42"]),
        (Gsm8k, {"question": "How many?"}, ["row 2", "'answer'", "#### 42"]),
        (Gsm8k, {"problem": "How many?", "answer": "#### 4"}, ["row 2", "'question'", "problem, answer"]),
        (Math500, {"problem": "", "answer": "4"}, ["row 2", "'problem'", "math500.jsonl"]),
        (Math500, {"problem": "How many?", "solution": "4"}, ["row 2", "boxed", "problem, solution"]),
        (Aime, {"problem": 7, "answer": "4"}, ["row 2", "'problem'", "aime24.jsonl"]),
    ],
)
def test_malformed_rows_are_named(
    tmp_path: Path, kind: type[MathTask], row: dict[str, object], parts: list[str]
) -> None:
    good = {"question": "?", "problem": "?", "answer": "#### 4"}
    with pytest.raises(DataError) as error:
        kind(write(tmp_path, good, row)).problems()
    assert [part for part in parts if part not in str(error.value)] == []


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, headstart.tasks.math as m; m.Gsm8k('x'); print({'torch', 'sympy', 'datasets'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
