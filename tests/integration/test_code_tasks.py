"""HumanEval, MBPP, their plus variants, and what all benchmarks share: references are right, bad data is named."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from headstart.errors import DataError, SandboxError
from headstart.records import Problem, Verdict
from headstart.tasks.benchmark import Benchmark
from headstart.tasks.code import CodeTask, HumanEval, HumanEvalPlus, Mbpp, MbppPlus
from headstart.tasks.math import Aime, Gsm8k, Math500
from real_tokenizers import real_data

HUMANEVAL = "humaneval/HumanEval.jsonl.gz"
MINI = "humaneval/HumanEvalPlus-Mini.jsonl.gz"
SANITIZED = "mbpp/sanitized-mbpp.json"
FULL = "mbpp/mbpp.jsonl"
PLUS = "mbpp/MbppPlus.jsonl.gz"


def fenced(problem: Problem) -> str:
    return f"Here is the program:\n\n```python\n{problem.answer}\n```\n\nIt passes the tests."


def need_sandbox(task: CodeTask) -> None:
    try:
        assert task.sandbox in ("bwrap", "unshare")
    except SandboxError as error:
        pytest.skip(str(error))


def grade(task: CodeTask, problems: Sequence[Problem], respond: Callable[[Problem], str]) -> dict[str, Verdict]:
    """Verdicts by problem, graded from two threads as an evaluation does."""
    need_sandbox(task)
    with ThreadPoolExecutor(2) as pool:
        verdicts = pool.map(lambda problem: task.grade(problem, respond(problem)), problems)
        return {problem.id: verdict for problem, verdict in zip(problems, verdicts, strict=True)}


def wrong(verdicts: dict[str, Verdict]) -> dict[str, str]:
    return {name: verdict.status for name, verdict in verdicts.items() if not verdict.correct}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "file", "count"), [(HumanEval, HUMANEVAL, 164), (HumanEvalPlus, MINI, 164), (Mbpp, SANITIZED, 427)]
)
def test_references_are_right(kind: type[CodeTask], file: str, count: int) -> None:
    task = kind(real_data(file))
    verdicts = grade(task, task.problems(), fenced)
    assert (len(verdicts), wrong(verdicts)) == (count, {})


@pytest.mark.slow
def test_humaneval_return_none() -> None:
    """The continuation of a base model: 0 of 164."""
    task = HumanEval(real_data(HUMANEVAL), chat=False)
    verdicts = grade(task, task.problems(), lambda problem: "    return None\n")
    assert len(verdicts) == 164
    assert {verdict.status for verdict in verdicts.values()} == {"wrong"}


def test_mbpp_plus_references() -> None:
    """A seeded sample, and the problems whose types or comparison are unusual. All 378 pass (see the docs)."""
    task = MbppPlus(real_data(PLUS))
    unusual = (2, 7, 56, 124, 164, 222, 252, 278, 295, 580, 722, 737, 769, 791, 794, 803)
    chosen = {f"Mbpp/{number}" for number in unusual}
    slow = {f"Mbpp/{number}" for number in (123, 255, 271, 389, 392, 583, 589, 592, 599, 603, 630)}
    problems = task.problems()
    names = [problem.id for problem in problems if problem.id not in slow]
    chosen |= set(random.Random(3).sample(names, 12))
    verdicts = grade(task, [problem for problem in problems if problem.id in chosen], fenced)
    assert len(verdicts) >= 25
    assert wrong(verdicts) == {}


def test_plus_catches_what_the_base_tests_miss() -> None:
    """The original reference of HumanEval/95 fails only on added inputs."""
    base, plus = HumanEval(real_data(HUMANEVAL)), HumanEvalPlus(real_data(MINI))
    problem = next(problem for problem in base.problems() if problem.id == "HumanEval/95")
    counterpart = next(problem for problem in plus.problems() if problem.id == "HumanEval/95")
    need_sandbox(base)
    assert base.grade(problem, fenced(problem)).correct
    assert not plus.grade(counterpart, fenced(problem)).correct
    assert plus.grade(counterpart, fenced(counterpart)).correct


def test_helpers_are_the_prompts_own() -> None:
    """HumanEval/38 is tested with `encode_cyclic` of the prompt; a response cannot replace it by the identity."""
    task = HumanEval(real_data(HUMANEVAL))
    problem = task.problems()[38]
    cheat = "```python\ndef encode_cyclic(s):\n    return s\n\ndef decode_cyclic(s):\n    return s\n```"
    need_sandbox(task)
    assert task.grade(problem, cheat).status == "wrong"
    assert task.grade(problem, fenced(problem)).correct


def test_statuses() -> None:
    task = HumanEval(real_data(HUMANEVAL), timeout=0.5)
    problem = task.problems()[0]
    need_sandbox(task)
    cases = {
        "": "no_answer",
        "I do not know.": "no_answer",
        "```python\nwhile True: pass\n```": "timeout",  # no function, so it continues the prompt
        "```python\ndef has_close_elements(numbers, threshold):\n    while True: pass\n```": "timeout",
        "```python\ndef has_close_elements(numbers, threshold):\n    return 1 / 0\n```": "wrong",
        "```python\ndef has_close_elements(numbers, threshold:\n```": "wrong",
        problem.answer or "": "correct",
    }
    assert {response: task.grade(problem, response).status for response in cases} == cases
    assert task.prefix_state(problem, "def has_close_elements") == "unknown"


def test_problems_and_prompts() -> None:
    task = HumanEval(real_data(HUMANEVAL))
    first = task.problems()[0]
    assert first.id == "HumanEval/0"
    assert first.messages is not None
    assert "def has_close_elements(" in first.messages[0]["content"]
    assert (task.samples, task.sampling.temperature, task.max_tokens) == (1, 0.0, 512)
    bare = HumanEval(real_data(HUMANEVAL), chat=False).problems()[0]
    assert bare.text is not None
    assert bare.text.startswith("from typing import List")
    assert bare.messages is None


def test_splits_of_mbpp() -> None:
    """Ids 11-510 are the test split, 601-974 the training prompts; the sanitized file counts whole."""
    path = real_data(FULL)
    test, train = Mbpp(path).problems(), Mbpp(path, split="train").problems()
    assert (test[0].id, test[-1].id, len(test)) == ("11", "510", 500)
    assert (train[0].id, train[-1].id, len(train)) == ("601", "974", 374)
    assert len(Mbpp(path, split="all").problems()) == 974
    assert len(Mbpp(real_data(SANITIZED)).problems()) == 427
    assert len(Mbpp(real_data(SANITIZED), split="test").problems()) == 257
    assert test[0].messages is not None
    assert "assert remove_Occ(" in test[0].messages[0]["content"]


def test_mbpp_with_setup_classes_and_shadowed_builtins() -> None:
    """Tests that build the program's own objects, and one whose function is called `sum`."""
    task = Mbpp(real_data(FULL), split="all")
    chosen = {"1", "126", "367", "533", "596", "601", "927"}
    problems = [problem for problem in task.problems() if problem.id in chosen]
    assert wrong(grade(task, problems, fenced)) == {}
    assert wrong(grade(task, problems, lambda problem: problem.answer or "")) == {}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


ROW = {
    "task_id": "T/0",
    "prompt": "def f(x):\n    '''Adds one.'''\n",
    "entry_point": "f",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}


@pytest.mark.parametrize("task", [HumanEval, HumanEvalPlus, Mbpp, MbppPlus, Gsm8k, Math500, Aime])
def test_without_data_the_message_says_what_to_pass(task: type[Benchmark]) -> None:
    with pytest.raises(DataError, match=rf"task {task.name} needs its data: pass .*json") as error:
        task(None)
    assert all(f"the hub dataset {name}" in str(error.value) for name in task.hub)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry_point": None}, "row 2: column 'entry_point' is missing"),
        ({"test": 3}, "row 2: column 'test' is of type int"),
        ({"prompt": "def f(x:\n"}, "row 2: not valid Python"),
        ({"task_id": "T/0"}, "row 2: the task_id 'T/0' is already that of an earlier row"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "data.jsonl.gz", ROW, {**ROW, "task_id": "T/1", **change})
    with pytest.raises(DataError, match=message):
        HumanEval(path).problems()


def test_no_row_of_the_split(tmp_path: Path) -> None:
    row = {"task_id": 700, "text": "Add one.", "code": "def f(x): return x + 1", "test_list": ["assert f(1) == 2"]}
    path = write(tmp_path / "mbpp.jsonl.gz", row)
    assert len(Mbpp(path, split="train").problems()) == 1
    with pytest.raises(DataError, match="no row that belongs to task mbpp"):
        Mbpp(path).problems()


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which configuration and splits are asked of the hub."""
    asked = []
    rows = [
        {"task_id": number, "text": "t", "code": "def f(): return 1", "test_list": ["assert f()"]}
        for number in (20, 700)
    ]

    def read(source: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((source, options["subset"], options["split"]))
        return [ROW] if "humaneval" in source else rows

    monkeypatch.setattr("headstart.tasks.benchmark.read_rows", read)
    name = "google-research-datasets/mbpp"
    assert [problem.id for problem in Mbpp(name).problems()] == ["20"]
    assert [problem.id for problem in Mbpp(name, split="train").problems()] == ["700"]
    assert [problem.id for problem in Mbpp(name, split="all").problems()] == ["20", "700"]
    assert [problem.id for problem in HumanEval("openai/openai_humaneval").problems()] == ["T/0"]
    rows = [{"question": "?", "problem": "?", "answer": "#### 4"}]
    for task in (Gsm8k("openai/gsm8k"), Aime("HuggingFaceH4/aime_2024"), Math500("someone/copy-of-mbpp")):
        assert len(task.problems()) == 1
    assert asked == [
        (name, "full", "test"),
        (name, "full", "train"),
        (name, "full", "prompt+test+validation+train"),
        ("openai/openai_humaneval", None, "test"),
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("someone/copy-of-mbpp", None, "test"),
    ]


def test_a_sandbox_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the response's fault nor a crash of the evaluation."""
    task = HumanEval(write(tmp_path / "data.jsonl.gz", ROW), sandbox="unsafe")
    problem = task.problems()[0]
    assert task.sandbox == "unsafe"
    assert task.grade(problem, "    return x + 1\n").correct
    monkeypatch.setattr("headstart.tasks.grading.sandbox.command", lambda *rest: ["/nonexistent"])
    assert task.grade(problem, "    return x + 1\n").status == "error"
