"""Whole evaluations in this process: batches that fit, kills, progress, records, function calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from headstart import __version__
from headstart.assemble.speed import Speed
from headstart.assemble.tasks import evaluation_settings, load_questions, make_task
from headstart.config import loader
from headstart.config.evaluation import BfclTask, EvaluationConfig, JsonlTask, MbppBenchmark
from headstart.config.schema import Config
from headstart.errors import ConfigError, DataError, RunFolderError, TemplateError
from headstart.evaluation.readings import by_category
from headstart.evaluation.run import evaluate, evaluate_responses
from headstart.evaluation.store import compare, read_rows
from headstart.records import GradedResponse, Problem, Prompt, Verdict
from headstart.tasks.grading.math import shared_grader
from headstart.testing import byte_tokenizer
from real_tokenizers import real_data, real_tokenizer

PROBLEMS, SAMPLES = 10, 2


def config(**evaluation: Any) -> Config:
    settings = {"task": {"type": "tiny"}, "limit": PROBLEMS, "samples": SAMPLES, "temperature": 1, "max_tokens": 200}
    models = {"student": {"path": "tiny:student"}, "teacher": {"path": "tiny:teacher"}, "prompts": {"source": "tiny"}}
    return loader.parse({**models, "evaluation": {**settings, **evaluation}})


def fitting(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """From now on `rows` fit; how many prompts each question was about."""
    asked: list[int] = []

    def fit(model: Any, prompts: Sequence[Prompt], max_tokens: int) -> int:
        asked.append(len(prompts))
        return rows

    monkeypatch.setattr("headstart.rollout.engine.fitting_batch", fit)
    return asked


def killed_after(responses: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == responses:
            raise KeyboardInterrupt

    return progress


def test_within_minutes_it_asks_the_first_problems_and_keeps_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.evaluation.run.timed", lambda *_: Speed(0.01, 0.0, 0.0))  # a second a response
    said: list[str] = []
    asked = config(batch_size=2, limit=40)
    found = evaluate(asked, out=tmp_path, minutes=0.2, say=said.append)
    assert re.match(r"In the time given: (9|10) problems x 1 of at most 200 tokens, then more problems", said[0])
    assert "In full: 40 problems x 2 of at most 200 tokens: at most 16,000 tokens" in said[0]
    assert 9 <= found["problems"] <= 40
    assert found["samples"] == 1
    again = evaluate(asked, out=tmp_path, minutes=3, say=said.append)
    assert (again, len(said)) == (found, 1)
    with pytest.raises(RunFolderError, match=r"minutes: 0\.2 -> .absent."):
        evaluate(asked, out=tmp_path)


def test_a_killed_evaluation_goes_on_when_another_batch_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fitting(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(), out=tmp_path / "cut", progress=killed_after(7))
    left = (tmp_path / "cut" / "rows.jsonl").read_text().splitlines()
    assert len(left) >= 7, "every graded response must be on disk"
    fitting(monkeypatch, 1)
    heard: list[tuple[int, int]] = []
    cut = evaluate(config(), out=tmp_path / "cut", progress=lambda done, total: heard.append((done, total)))
    assert heard[0][0] > 0, "graded problems must not be repeated"
    assert heard[-1] == (PROBLEMS * SAMPLES, PROBLEMS * SAMPLES)
    assert asked == [PROBLEMS], "what fits is found out once per evaluation"
    whole = evaluate(config(batch_size=64), out=tmp_path / "whole")
    assert (tmp_path / "cut" / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()
    assert cut == whole
    assert cut["mean_tokens"] > 40


def test_a_response_ends_in_front_of_a_stop_string(tmp_path: Path) -> None:
    """It counts as stopped, also where the tokens ran out behind it; the settings say so."""
    plain = evaluate(config(max_tokens=60, limit=4), out=tmp_path / "plain")
    whole = [row.response for row in read_rows(tmp_path / "plain" / "rows.jsonl")]
    stops = (whole[0][9:12], "\nnever seen")
    found = evaluate(config(max_tokens=60, limit=4, stop_strings=stops), out=tmp_path / "stopped")
    rows = read_rows(tmp_path / "stopped" / "rows.jsonl")
    assert [row.response for row in rows] == [text.partition(stops[0])[0] for text in whole]
    assert all(row.stopped for row, text in zip(rows, whole, strict=True) if stops[0] in text)
    assert not all(row.stopped for row in read_rows(tmp_path / "plain" / "rows.jsonl"))
    assert found["settings"]["stop_strings"] == stops
    assert "stop_strings" not in plain["settings"]
    with pytest.raises(ConfigError, match="stop_strings"):
        config(stop_strings=[""])


def test_base_models_stop_where_the_task_says(tmp_path: Path) -> None:
    row = {"task_id": 11, "text": "Add one.", "code": "def f(x): return x + 1", "test_list": ["assert f(1) == 2"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(row))
    task = MbppBenchmark(data=str(tmp_path / "mbpp.jsonl"))
    own = evaluation_settings(EvaluationConfig(task=task), make_task(task, chat=False)).stop_strings
    assert "\nprint(" in own
    assert evaluation_settings(EvaluationConfig(task=task), make_task(task, chat=True)).stop_strings == ()
    chosen = EvaluationConfig(task=task, stop_strings=("\ndef ",))
    assert evaluation_settings(chosen, make_task(task, chat=False)).stop_strings == ("\ndef ",)
    none = EvaluationConfig(task=task, stop_strings=())
    assert evaluation_settings(none, make_task(task, chat=False)).stop_strings == ()


def test_the_documented_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "tasks.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert (tmp_path / "runs" / "tiny-student" / "summary.json").exists()
    assert "[" in capsys.readouterr().out


class Faulty:
    """A task whose grader fails at the third response."""

    name = "faulty"
    graded = 0

    def problems(self) -> list[Problem]:
        return [Problem(id=str(i), text=f"w{i}") for i in range(100)]

    def grade(self, problem: Problem, response: str) -> Verdict:
        type(self).graded += 1
        if self.graded > 2:
            raise ZeroDivisionError("a fault of the grader")
        return Verdict(correct=True, status="correct")

    def prefix_state(self, problem: Problem, prefix: str) -> str:
        return "unknown"


def test_a_grader_that_fails_ends_the_evaluation_soon(tmp_path: Path) -> None:
    task = {"type": "custom", "path": f"{__name__}:Faulty"}
    with pytest.raises(ZeroDivisionError):
        evaluate(config(task=task, limit=100, max_tokens=20, batch_size=2), out=tmp_path / "out")
    assert Faulty.graded < 50, "the remaining responses are not waited for"


def test_every_result_says_what_it_depends_on(tmp_path: Path) -> None:
    """GRADERS.md's list, in what `headstart evaluate` writes."""
    found = evaluate(config(top_k=20, seed=3), out=tmp_path / "out")
    assert found["settings"] == {
        "samples": SAMPLES,
        "sampling": {"temperature": 1.0, "top_p": 0.95, "top_k": 20},
        "max_tokens": 200,
        "seed": 3,
    }
    assert (found["template_kwargs"], found["stop_ids"], found["problems"]) == ({}, [1], PROBLEMS)
    assert all(len(found[name]) == 16 for name in ("prompts_sha256", "chat_template_sha256"))
    assert {"truncated", "no_answer", "timeout", "mean_tokens", "grader"} <= found.keys()


# ---------------------------------------------------------------- responses made elsewhere


def own_file(folder: Path, grader: Any = "math") -> JsonlTask:
    rows = [{"id": str(i), "prompt": f"{i}/2?", "answer": rf"\frac{{{i}}}{{2}}"} for i in range(6)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        {"id": "1", "responses": ["the answer is 0.5", "the answer is 0.5", "\u2028 \x85 #### 7"]},
        {"id": "3", "responses": [r"\boxed{1.5}", r"\boxed{3/2} \ud83d", "nothing at all"]},
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).replace("\ud83d", r"\ud83d")
    (folder / "r.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    return JsonlTask(path=folder / "own.jsonl", grader=grader)


def test_a_file_of_ones_own_with_the_math_grader_and_strange_characters(tmp_path: Path) -> None:
    found = evaluate_responses(own_file(tmp_path), tmp_path / "r.jsonl", out=tmp_path / "out")
    assert (found["problems"], found["accuracy"], found["maj_at_k"]) == (2, 2 / 3, 1.0)
    assert "math-verify" in found["grader"]
    statuses = [row.verdict.status for row in read_rows(tmp_path / "out" / "rows.jsonl")]
    assert statuses == ["correct", "correct", "wrong", "correct", "correct", "no_answer"]


def test_killed_grading_of_responses_goes_on_without_repeating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, file = own_file(tmp_path), tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_responses(task, file, out=tmp_path / "cut", progress=killed_after(4))
    assert not (tmp_path / "cut" / "summary.json").exists()
    asked = []
    real = shared_grader().grade
    monkeypatch.setattr(shared_grader(), "grade", lambda gold, text: asked.append(text) or real(gold, text))
    cut = evaluate_responses(task, file, out=tmp_path / "cut")
    assert len(asked) == 3, "only the problem that was cut short is graded again"
    assert cut == evaluate_responses(task, file, out=tmp_path / "whole")
    assert (tmp_path / "cut" / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()


def test_bad_wishes_are_refused_before_responses_are_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, file = own_file(tmp_path), tmp_path / "r.jsonl"
    monkeypatch.setattr(shared_grader(), "grade", lambda *_: pytest.fail("graded"))
    with pytest.raises(ConfigError, match="pass@4 needs at least 4 samples per problem"):
        evaluate_responses(task, file, out=tmp_path / "out", k=4)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunFolderError, match="is not empty and holds no evaluation"):
        evaluate_responses(task, file, out=tmp_path)


@pytest.mark.parametrize("summary", ["", "{}", "[]", "{"])
def test_a_damaged_summary_is_named(tmp_path: Path, summary: str) -> None:
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(DataError, match="not the summary of an evaluation"):
        compare(tmp_path, tmp_path)


# ---------------------------------------------------------------- function calls


def bfcl(style: str, **prompts: Any) -> Config:
    data = str(real_data("bfcl_v4/BFCL_v4_simple_python.json").parent)
    task = {"type": "bfcl", "data": data, "style": style}
    models = {"student": {"path": "x"}, "teacher": {"path": "x"}, "prompts": {"source": "tiny", **prompts}}
    return loader.parse({**models, "evaluation": {"task": task, "limit": 3}})


def test_auto_asks_through_the_template_where_it_takes_tools() -> None:
    with_tools, without = real_tokenizer("qwen3"), byte_tokenizer()
    for style, tokenizer, same in (("auto", with_tools, "template"), ("auto", without, "prompt")):
        assert load_questions(bfcl(style), tokenizer).prompts == load_questions(bfcl(same), tokenizer).prompts
    auto, prompt = (load_questions(bfcl(style), with_tools).prompts[0] for style in ("auto", "prompt"))
    assert "<tool_call>" in with_tools.decode(auto.token_ids)
    assert "<tool_call>" not in with_tools.decode(prompt.token_ids)
    with pytest.raises(TemplateError, match="no place for tools"):
        load_questions(bfcl("template"), without)
    with pytest.raises(ConfigError, match=r"prompts\.chat=true"):
        load_questions(bfcl("auto", chat=False), without)


def test_the_categories_of_function_calls_are_reported(tmp_path: Path) -> None:
    folder = real_data("bfcl_v4/BFCL_v4_simple_python.json").parent
    right = "[calculate_triangle_area(base=10, height=5)]"
    rows = [
        {"id": "simple_python_0", "responses": [right, "no"]},
        {"id": "simple_python_1", "responses": ["no", "no"]},
        {"id": "irrelevance_0", "responses": ["I cannot.", "I cannot."]},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Responses made elsewhere may be of any category; a model is asked the published two unless told otherwise.
    found = evaluate_responses(BfclTask(data=str(folder)), tmp_path / "r.jsonl", out=tmp_path / "out")
    with pytest.raises(DataError, match="no problem with id 'irrelevance_0'"):
        evaluate_responses(BfclTask(data=str(folder), categories=("simple",)), tmp_path / "r.jsonl")
    assert found["categories"] == {
        "simple": {"problems": 2, "accuracy": 0.25},
        "irrelevance": {"problems": 1, "accuracy": 1.0},
    }
    assert found["grader"] == f"headstart {__version__} function-call checker"


def test_without_categories_there_is_nothing_to_report() -> None:
    row = GradedResponse("a", 0, "", None, None, Verdict(correct=True, status="correct"))
    assert by_category([row], [Problem(id="a", text="?")]) == {}
