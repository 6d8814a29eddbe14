"""`headstart evaluate` as a user types it."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

import quick
from real_tokenizers import real_data

KEYS = {"task", "problems", "k", "accuracy", "pass_at_k", "maj_at_k", "se", "truncated", "no_answer", "timeout",
        "grader", "sandbox"}  # fmt: skip
TINY = ("--task", "tiny", "limit=12", "samples=2", "temperature=1", "top_p=1", "max_tokens=200")


def command(*arguments: object) -> list[str]:
    return quick.command("evaluate", *arguments)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return quick.run("evaluate", *arguments)


def summary(folder: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return loaded


def test_a_model_on_a_task_and_two_results_compared(tmp_path: Path) -> None:
    for name in ("student", "teacher"):
        done = run(f"tiny:{name}", *TINY, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    student, teacher = summary(tmp_path / "student"), summary(tmp_path / "teacher")
    assert student.keys() >= KEYS
    assert student["accuracy"] < teacher["accuracy"]  # type: ignore[operator]
    recorded = {"model", "settings", "stop_ids", "template_kwargs", "chat_template_sha256", "prompts_sha256"}
    assert student.keys() >= recorded
    rows = [json.loads(line) for line in (tmp_path / "student" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert "beyond noise" in run("--compare", tmp_path / "teacher", tmp_path / "student").stdout
    assert "within noise" in run("--compare", tmp_path / "teacher", tmp_path / "teacher").stdout


def test_the_same_seed_gives_the_same_numbers_and_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    small = (*TINY[:2], "limit=20", "samples=1", *TINY[4:], "batch_size=1")
    assert run("tiny:student", *small, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen(command("tiny:student", *small, "--out", tmp_path / "cut"), stdout=subprocess.DEVNULL)
    rows = tmp_path / "cut" / "rows.jsonl"
    while not rows.exists() or rows.stat().st_size == 0:
        assert process.poll() is None, "the evaluation ended before it could be killed"
        time.sleep(0.005)
    quick.kill(process)
    process.wait()
    before = rows.read_text().splitlines()
    assert not (tmp_path / "cut" / "summary.json").exists()
    done = run("tiny:student", *small, "--out", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    assert set(before[:-1]) <= set(rows.read_text().splitlines())
    assert rows.read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()
    assert summary(tmp_path / "cut") == summary(tmp_path / "whole")
    other = run("tiny:student", *small, "seed=1", "--out", tmp_path / "cut")
    assert other.returncode == 1
    assert "holds an evaluation with other settings" in other.stderr


def test_math_responses_are_graded_without_a_model(tmp_path: Path) -> None:
    data = real_data("math/math500.jsonl")
    problems = [json.loads(line) for line in data.read_text().splitlines()]
    lines = [{"id": i, "responses": [p["solution"], "no idea"]} for i, p in enumerate(problems[:30])]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("--task", "math500", "--data", data, "--responses", file, "--out", tmp_path / "out", "--k", "1")
    assert done.returncode == 0, done.stderr
    found = summary(tmp_path / "out")
    assert found.keys() >= KEYS
    assert (found["problems"], found["samples"], found["accuracy"], found["pass_at_k"]) == (30, 2, 0.5, 0.5)
    assert found["truncated"] is None
    assert "math-verify" in str(found["grader"])
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 60


def test_code_and_tool_responses(tmp_path: Path) -> None:
    import gzip

    from headstart.tasks.grading.code import CodeRunner

    try:
        CodeRunner()
    except Exception as error:
        pytest.skip(f"no sandbox works here: {error}")
    data = real_data("humaneval/HumanEval.jsonl.gz")
    with gzip.open(data, "rt") as file:
        problems = [json.loads(line) for line in file][:6]
    lines = [{"id": p["task_id"], "responses": [p["canonical_solution"], "    return None\n"]} for p in problems]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run(
        "--task", "humaneval", "--data", data, "--responses", tmp_path / "code.jsonl", "--out", tmp_path / "code"
    )
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "code")["accuracy"] == 0.5
    assert summary(tmp_path / "code")["sandbox"] in ("bwrap", "unshare")
    (tmp_path / "tools.jsonl").write_text(
        json.dumps({"id": "simple_python_0", "responses": ["[calculate_triangle_area(base=10, height=5)]", "no"]})
    )
    folder = real_data("bfcl_v4/BFCL_v4_simple_python.json").parent
    done = run("--task", "bfcl", "--data", folder, "--responses", tmp_path / "tools.jsonl", "--out", tmp_path / "tools")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "tools")["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "which task?"),
        (("--task", "gsm8k"), 2, "which model?"),
        (("tiny:student", "--task", "gsm9k"), 2, "gsm8k"),
        (("tiny:student", "--task", "gsm8k"), 1, "needs its data: pass the hub dataset openai/gsm8k"),
        (("tiny:student", *TINY, "--k", "3"), 2, "pass@3 needs at least 3 samples"),
        (("tiny:student", *TINY, "max_tokens=5000"), 2, "context is"),
        (("tiny:student", *TINY, "sampels=2"), 2, "samples"),
        (("tiny:student", *TINY, "--k", "0"), 2, "--k"),
        (("--task", "tiny", "--responses", "missing.jsonl"), 1, "missing.jsonl does not exist"),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run(*arguments, "--out", tmp_path / "out")
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty"),
        ("{", "line 1: not valid JSON"),
        ('{"id": "tiny/dev/0"}', "row 1: field 'responses' must be"),
        ('{"id": "tiny/dev/x", "responses": ["a"]}', "no problem with id 'tiny/dev/x'; did you mean"),
        ('{"id": "tiny/dev/0", "responses": ["a"]}\n' * 2, "row 2: id 'tiny/dev/0' comes twice"),
        ('{"id": ' + "[" * 100_000, "line 1: not valid JSON"),
        ('{"id": ' + "9" * 5000 + ', "responses": ["a"]}', "line 1: not valid JSON"),
        ('{"id": "tiny/dev/0", "responses": []}', "row 1: field 'responses' must be"),
    ],
)
def test_bad_responses_name_line_and_field(tmp_path: Path, lines: str, message: str) -> None:
    from headstart.config.evaluation import TinyTask
    from headstart.errors import DataError
    from headstart.evaluation.run import evaluate_responses

    (tmp_path / "r.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        evaluate_responses(TinyTask(), tmp_path / "r.jsonl", out=tmp_path / "out")


def test_a_run_file_takes_the_settings_of_a_run() -> None:
    from headstart.cli.evaluate import _config

    config = _config(["recipe:tiny-esr", "teacher.path=elsewhere", "samples=4"], None, None, False)
    assert config.teacher.path == "elsewhere"  # type: ignore[union-attr]
    assert config.evaluation.samples == 4  # type: ignore[union-attr]


def test_a_model_folder_may_have_an_equals_sign_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart.cli.evaluate import _config

    monkeypatch.chdir(tmp_path)
    Path("lr=2e-4/model").mkdir(parents=True)
    config = _config(["lr=2e-4/model", "samples=3"], "tiny", None, without_model=False)
    assert config.student.path == "lr=2e-4/model"
    assert config.evaluation is not None
    assert config.evaluation.samples == 3
