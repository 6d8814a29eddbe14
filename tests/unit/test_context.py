"""A teacher that is shown more than the student, and may be the student's own start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.assemble.cost import memory
from headstart.assemble.pair import open_pair
from headstart.assemble.tasks import load_questions
from headstart.checks.run import run_preflight
from headstart.config import loader
from headstart.config.prompts import PromptsConfig
from headstart.config.render import resolved
from headstart.config.schema import Config
from headstart.distillation.run import distill
from headstart.errors import ConfigError, DataError
from headstart.models.templates import build_prompts
from headstart.records import Problem
from headstart.tasks.prompts import load_problems
from headstart.teacher.informed import SPAN, leaked
from preflight_pairs import of
from small_tokenizers import CHATML, word_tokenizer
from support import make_config

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "what is two {context}"}


def shown(view: Mapping[str, Any], problem: Problem, chat: bool = True) -> tuple[str, str]:
    """What student and teacher read."""
    special = ("<|im_start|>", "<|im_end|>")
    tokenizer = word_tokenizer(special=special, template=CHATML, eos_token="<eos>")
    config = PromptsConfig(source="x", chat=chat, teacher_view=view)  # type: ignore[arg-type]
    (prompt,) = build_prompts([problem], tokenizer, tokenizer, config).prompts
    return tokenizer.decode(prompt.token_ids), tokenizer.decode(prompt.teacher_token_ids)


def asked(**more: Any) -> Problem:
    return Problem("p", (SYSTEM, {"role": "user", "content": "what is two"}), meta={"context": "four"}, **more)  # type: ignore[arg-type]


def test_the_context_stands_in_the_last_user_turn() -> None:
    view = {"context_column": "hint", "context_template": "{context} plus {prompt}"}
    mine, theirs = shown(view, asked())
    assert "four" not in mine
    assert theirs == mine.replace("what is two", "four plus what is two")


def test_or_at_the_start_of_the_assistants() -> None:
    view = {"context_column": "hint", "context_place": "assistant", "context_template": "is {context} "}
    mine, theirs = shown(view, asked())
    assert theirs.split() == [*mine.split(), "is", "four"]


@pytest.mark.parametrize(("place", "reads"), [("prompt", "two plus four"), ("assistant", "two four")])
def test_plain_text_has_it_in_the_same_places(place: str, reads: str) -> None:
    template = "{prompt} plus {context}" if place == "prompt" else " {context}"
    view = {"context_column": "hint", "context_place": place, "context_template": template}
    mine, theirs = shown(view, Problem("p", text="two", meta={"context": "four"}), chat=False)
    assert (mine, theirs) == ("two", reads)


def test_braces_of_a_question_are_its_own() -> None:
    view = {"context_column": "hint", "context_template": "{prompt} plus {context} "}
    problem = Problem("p", (USER,), meta={"context": "{prompt}"})  # type: ignore[arg-type]
    tokenizer = word_tokenizer(("{context}", "{prompt}", "plus", "what", "is", "two"), template=CHATML)
    config = PromptsConfig(source="x", teacher_view=view)  # type: ignore[arg-type]
    (prompt,) = build_prompts([problem], tokenizer, tokenizer, config).prompts
    assert "two {context} plus {prompt} " in tokenizer.decode(prompt.teacher_token_ids)


def rows(folder: Path, *contexts: Any, **more: Any) -> Path:
    path = folder / "rows.jsonl"
    lines = ({"prompt": f"w{n} w3", "hint": context, **more} for n, context in enumerate(contexts))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_where_the_context_comes_from(tmp_path: Path) -> None:
    view = {"teacher_view": {"context_column": "hint"}}
    problems = load_problems(PromptsConfig(source=str(rows(tmp_path, "a", ["b", "c"])), **view))  # type: ignore[arg-type]
    assert [p.meta["context"] for p in problems] == ["a", "b\n\nc"]
    with pytest.raises(DataError, match=r"row 1, column 'hint': the teacher's context is a dict; expected text"):
        load_problems(PromptsConfig(source=str(rows(tmp_path, {"a": 1})), **view))  # type: ignore[arg-type]
    path = str(rows(tmp_path, "a"))
    with pytest.raises(DataError, match="no column 'nothing'"):
        load_problems(PromptsConfig(source=path, teacher_view={"context_column": "nothing"}))  # type: ignore[arg-type]


def test_a_problem_without_context_is_named(tmp_path: Path) -> None:
    config = informed(tmp_path, "a", None, "c")
    with pytest.raises(DataError, match=r"1 of 3 problems have no context for the teacher .the first is 'rows/1'."):
        distill(config, out=tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def informed(folder: Path, *contexts: Any, own: bool = False, overrides: tuple[str, ...] = ()) -> Config:
    base = make_config(folder)
    path, template = rows(folder, *contexts), "{prompt} w9 {context}"
    view = f"prompts.teacher_view={{context_column: hint, context_template: '{template}'}}"
    start = [f"teacher.path={folder / 'student'}", "tuning={type: lora, r: 2, alpha: 4, dropout: 0.0}"] if own else []
    return loader.parse(base.model_dump(mode="json"), [f"prompts.source={path}", view, *start, *overrides])


REFUSED = {
    ("prompts.teacher_view.context_place=assistant",): "context_column: found null beside a place or template",
    ("prompts.teacher_view={context_column: a, context_template: '{prompt}'}",): r"\{context\} is missing in",
    ("prompts.teacher_view={context_column: a, context_template: '{context}'}",): r"\{prompt\} is missing in",
    ("prompts={source: tiny, teacher_view: {context_column: a}}",): "tiny has nothing to show but completion and plan",
}


@pytest.mark.parametrize(("overrides", "said"), REFUSED.items(), ids=lambda x: str(x)[:50])
def test_settings_that_do_not_go_together(overrides: tuple[str, ...], said: str) -> None:
    base = {"student": {"path": "a"}, "teacher": {"path": "b"}, "prompts": {"source": "x.jsonl"}}
    with pytest.raises(ConfigError, match=said):
        loader.parse(base, overrides)


def test_benchmark_problems_show_their_solution_in_evaluation_too() -> None:
    """Where the teacher continues a test's responses, as in diagnoses; the student never sees it."""
    world = {
        "source": "tiny",
        "teacher_view": {"context_column": "completion", "context_template": "{prompt} {context}"},
    }
    evaluation = {"task": {"type": "tiny"}, "limit": 3}
    config = loader.parse(
        {"student": {"path": "a"}, "teacher": {"path": "b"}, "prompts": world, "evaluation": evaluation}
    )
    tokenizer = word_tokenizer(("plan", "first", "ans"), template=CHATML)
    questions = load_questions(config, tokenizer, tokenizer)
    for prompt in questions.prompts:
        assert "plan first" in tokenizer.decode(prompt.teacher_token_ids)
        assert "plan" not in tokenizer.decode(prompt.token_ids)


def test_a_teacher_that_is_the_students_start_shares_its_weights(tmp_path: Path) -> None:
    """It stays what the student was while an adapter is trained, and its weights are counted once."""
    config = informed(tmp_path, "w1", "w2", own=True)
    assert config.teacher_is_start
    pair = open_pair(config)
    ours, theirs = (dict(model.model.named_parameters()) for model in (pair.student, pair.teacher))
    places = {p.data_ptr() for name, p in ours.items() if ".lora_" not in name}
    assert {p.data_ptr() for p in theirs.values()} <= places
    assert not any(p.requires_grad for p in theirs.values())
    assert len(pair.student.trainable()) > 0
    (prompt,) = pair.prompts([Problem("p", text="w1 w2", meta={"context": "w3"})])
    counted = memory(pair, config, [prompt], 4).weights
    other = loader.parse(config.model_dump(mode="json"), [f"teacher.path={tmp_path / 'student' / '.'}/../student"])
    assert not other.teacher_is_start
    twice = memory(open_pair(other), other, [prompt], 4).weights
    size = sum(p.numel() * p.element_size() for p in theirs.values()) / 2**30
    assert twice - counted == pytest.approx(size, rel=0.01)


def test_sharing_weights_changes_no_result(tmp_path: Path) -> None:
    """A run with shared weights, its adapter trained, ends bit-equal to one with a teacher of its own."""
    config = informed(tmp_path, "w1 w5", "w2", "w7 w7", own=True)
    first = distill(config, out=tmp_path / "shared").path
    other = loader.parse(config.model_dump(mode="json"), [f"teacher.path={tmp_path / 'student' / '.'}/../student"])
    second = distill(other, out=tmp_path / "apart").path
    a, b = ((run / "model" / "model.safetensors").read_bytes() for run in (first, second))
    assert a == b
    metrics = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "loss" in m]
    assert all(m["loss"] > 0 and m["leaked_tokens"] == 0 for m in steps), "the context changes what the start says"


@given(data=st.data())
def test_leaked_tokens_are_those_of_runs_that_only_the_teacher_sees(data: st.DataObject) -> None:
    """Against a count by brute force over a tiny vocabulary, in which runs do repeat."""
    text = st.lists(st.integers(0, 1), max_size=24).map(tuple)
    completion, shown_ids, context = data.draw(text), data.draw(text), data.draw(text)

    def has(ids: tuple[int, ...], run: tuple[int, ...]) -> bool:
        return any(ids[n : n + len(run)] == run for n in range(len(ids) - len(run) + 1))

    inside = set()
    for n in range(len(completion) - SPAN + 1):
        run = completion[n : n + SPAN]
        if has(context, run) and not has(shown_ids, run):
            inside |= set(range(n, n + SPAN))
    assert leaked(completion, shown_ids, context) == len(inside)


def test_preflight_says_what_the_teacher_sees_and_where_it_leaks(tmp_path: Path) -> None:
    (finding,) = of(run_preflight(informed(tmp_path, "w1 w2", "w4 w5"), quick=True), "teacher context")
    assert (finding.severity, finding.figures["median"]) == ("ok", 3)
    (finding,) = of(run_preflight(informed(tmp_path, "w0 w3", "w4 w5"), quick=True), "teacher context")
    assert (finding.severity, finding.figures["seen"]) == ("warning", 1)
    assert "in 1 prompts the student sees them too (the first is 'rows/0')" in finding.message


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    constant = ("schedule={type: constant, warmup: 0}",)  # of two steps the first two of four
    config = informed(tmp_path, "w1 w5", "w2", "w7 w7", own=True, overrides=constant)
    straight = distill(config, out=tmp_path / "straight").path
    fewer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 2})})
    run = distill(fewer, out=tmp_path / "run").path
    (run / "config.yaml").write_text(resolved(config))
    shutil.rmtree(run / "model")
    distill(resume=run, allow_changed=["training.steps"])
    a, b = (path / "model" / "model.safetensors" for path in (run, straight))
    assert a.read_bytes() == b.read_bytes()
