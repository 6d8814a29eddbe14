"""The function-calling benchmark: conformance with its public checker, its prompts, and malformed data."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headstart.errors import DataError, TemplateError
from headstart.interfaces import Task
from headstart.models.templates import View
from headstart.records import Sampling
from headstart.tasks.bfcl import CATEGORIES, BfclTask, convert_schema
from real_tokenizers import real_data, real_tokenizer
from tool_calls import RENDERINGS, Calls, hermes, llama, python, qwen_xml, reference

# ---------------------------------------------------------------- conformance with the benchmark


def _bfcl(category: str, **options: Any) -> BfclTask:
    folder = real_data("bfcl_v4/BFCL_v4_simple_python.json").parent
    return BfclTask(folder, categories=[category], **options)


def _changed(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case list():
            return [*value, *value[:1]] if value else [1]
        case dict():
            return {**value, "unheard_of": 1}
        case _:
            return "changed"


def _corruptions(calls: Calls) -> Iterator[Calls]:
    (name, arguments), *rest = calls
    key = next(iter(arguments), None)
    yield [(name + "x", arguments), *rest]
    yield rest
    yield [*calls, copy.deepcopy(calls[0])]
    yield [(name, {**arguments, "unheard_of": 1}), *rest]
    # One call of the benchmark has no parameters: its change is an argument that nobody asked for.
    yield [(name, {**arguments, key: _changed(arguments[key])} if key else {"unheard_of": 2}), *rest]


@pytest.mark.parametrize("rendering", [*RENDERINGS, qwen_xml])
@pytest.mark.parametrize("category", CATEGORIES[:4])
def test_conformance(category: str, rendering: Callable[[Calls], str]) -> None:
    task = _bfcl(category)
    accepted, corrupted, accepted_corrupted = 0, 0, []
    for problem in task.problems():
        calls = reference(problem)
        accepted += task.grade(problem, rendering(calls)).correct
        for wrong in _corruptions(calls):
            corrupted += 1
            if task.grade(problem, rendering(wrong)).correct:
                accepted_corrupted.append(problem.id)
    problems = 400 if category == "simple" else 200
    # The reference of simple_python_307 is True for a string, which the syntax without quotes cannot write.
    unwritable = int(category == "simple" and rendering is qwen_xml)
    assert (len(task.problems()), accepted, corrupted) == (problems, problems - unwritable, 5 * problems)
    assert not accepted_corrupted


def test_every_single_value_matters_unless_the_reference_allows_both() -> None:
    accepted, changes = [], 0
    for category in CATEGORIES[:4]:
        task = _bfcl(category)
        for problem in task.problems():
            calls = reference(problem)
            for place, (name, arguments) in enumerate(calls):
                for key, value in arguments.items():
                    wrong = [*calls[:place], (name, {**arguments, key: _changed(value)}), *calls[place + 1 :]]
                    changes += 1
                    if task.grade(problem, llama(wrong)).correct:
                        accepted.append(f"{problem.id} {key}")
                        assert _changed(value) in problem.meta["expected"][place][name][key]
    assert changes == 4761
    assert len(accepted) == 9
    assert accepted[0] == "simple_python_56 include_description"


def test_irrelevance_wants_no_call() -> None:
    task = _bfcl("irrelevance")
    assert len(task.problems()) == 240
    for problem in task.problems():
        name = problem.meta["functions"][0]["function"]["name"]
        assert task.grade(problem, "None of the functions can do that.").correct
        for rendering in RENDERINGS:
            assert task.grade(problem, rendering([(name, {})])).status == "wrong"


# ---------------------------------------------------------------- the task


def test_schema_conversion() -> None:
    schema = {
        "type": "dict",
        "properties": {
            "type": {"type": "float", "description": "a dict"},
            "pair": {"type": "tuple", "items": {"type": "float"}},
            "anything": {"type": "any", "default": "any"},
            "inner": {"type": "dict", "properties": {"x": {"type": "string", "enum": ["dict"]}}},
        },
        "required": ["type"],
    }
    assert convert_schema(schema) == {
        "type": "object",
        "properties": {
            "type": {"type": "number", "description": "a dict"},
            "pair": {"type": "array", "items": {"type": "number"}},
            "anything": {"default": "any"},
            "inner": {"type": "object", "properties": {"x": {"type": "string", "enum": ["dict"]}}},
        },
        "required": ["type"],
    }


def _types(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema["type"]
        for value in schema.values():
            yield from _types(value)


def test_problems_of_the_benchmark() -> None:
    task: Task = BfclTask(real_data("bfcl_v4/BFCL_v4_simple_python.json").parent, categories=CATEGORIES)
    problems = task.problems()
    assert len(problems) == len({problem.id for problem in problems}) == 1240
    assert problems[0].id == "simple_python_0"
    assert problems[0].messages is not None
    assert problems[0].messages[0]["role"] == "user"
    assert json.loads(problems[0].answer or "") == [
        {"calculate_triangle_area": {"base": [10], "height": [5], "unit": ["units", ""]}}
    ]
    kinds = {kind for p in problems for tool in p.meta["tools"] for kind in _types(tool["function"]["parameters"])}
    assert kinds == {"object", "string", "integer", "number", "array", "boolean"}
    assert (BfclTask.samples, BfclTask.max_tokens, BfclTask.sampling) == (1, 512, Sampling(temperature=0.0, top_p=1.0))


def test_the_default_is_the_published_600() -> None:
    task = BfclTask(str(real_data("bfcl_v4/BFCL_v4_simple_python.json").parent))
    assert [sum(p.meta["category"] == name for p in task.problems()) for name in CATEGORIES] == [400, 200, 0, 0, 0]


def test_prefix_states() -> None:
    problem = next(p for p in _bfcl("parallel").problems() if len(p.meta["expected"]) == 2)
    task, calls = _bfcl("parallel"), reference(problem)
    text = hermes(calls)
    assert task.prefix_state(problem, text) == "finished"
    assert task.prefix_state(problem, text[: text.index("</tool_call>")]) == "unknown"
    assert task.prefix_state(problem, python(calls)[:-1]) == "unknown"
    idle = _bfcl("irrelevance").problems()[0]
    assert task.prefix_state(idle, text) == "wrong"
    assert task.prefix_state(idle, "Sorry") == "unknown"


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5"])
def test_tools_reach_the_chat_template(family: str) -> None:
    problem, tokenizer = _bfcl("simple").problems()[0], real_tokenizer(family)
    shown = tokenizer.decode(View(tokenizer).ids(problem))
    assert '"name": "calculate_triangle_area"' in shown
    assert '"type": "object"' in shown
    assert "<tool_call>" in shown


def test_a_template_without_tools_gets_them_in_the_system_prompt() -> None:
    tokenizer = real_tokenizer("phi3_mini")
    with pytest.raises(TemplateError, match="no place for tools"):
        View(tokenizer).ids(_bfcl("simple").problems()[0])
    task = _bfcl("simple", style="prompt")
    problem = task.problems()[0]
    assert "tools" not in problem.meta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = tokenizer.decode(View(tokenizer).ids(problem))
    assert "[name(parameter=value" in shown
    assert '"name": "calculate_triangle_area"' in shown
    assert task.grade(problem, "[calculate_triangle_area(base=10, height=5)]").correct


# ---------------------------------------------------------------- bad data

QUESTION = {
    "id": "simple_python_0",
    "question": [[{"role": "user", "content": "Area?"}]],
    "function": [{"name": "area", "parameters": {"type": "dict", "properties": {"base": {"type": "integer"}}}}],
}
ANSWER = {"id": "simple_python_0", "ground_truth": [{"area": {"base": [1]}}]}


def _write(folder: Path, question: Any = QUESTION, answer: Any = ANSWER, name: str = "BFCL_v4_simple_python") -> Path:
    (folder / "possible_answer").mkdir()
    (folder / f"{name}.json").write_text(json.dumps(question) + "\n")
    (folder / "possible_answer" / f"{name}.json").write_text(json.dumps(answer) + "\n")
    return folder


def test_files_of_version_3_are_read_too(tmp_path: Path) -> None:
    task = BfclTask(_write(tmp_path, name="BFCL_v3_simple"), categories=["simple"])
    assert task.grade(task.problems()[0], "area(base=1)").correct


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": {**QUESTION, "id": 3}}, "row 1: column .id. is of type int, not str"),
        ({"question": {**QUESTION, "question": [[], []]}}, "row 1: question must be one list of messages"),
        ({"question": {**QUESTION, "question": [[{"role": "user"}]]}}, "row 1: question must be one list of messages"),
        ({"question": {**QUESTION, "function": None}}, "row 1: column .function. is missing"),
        ({"question": {**QUESTION, "function": [{"name": "f"}]}}, "row 1: a function needs a name and parameters"),
        ({"answer": {**ANSWER, "id": "simple_python_1"}}, "row 1: 'simple_python_0' has no answer in"),
        ({"answer": {**ANSWER, "ground_truth": [{"area": [1]}]}}, "row 1: every call of ground_truth must be"),
        ({"answer": {"id": "simple_python_0"}}, "row 1: column .ground_truth. is missing"),
        ({"name": "other"}, "holds no BFCL_v4_simple_python.json or BFCL_v3_simple.json"),
    ],
)
def test_malformed_data_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        BfclTask(_write(tmp_path, **change), categories=["simple"]).problems()


def test_missing_data_and_unknown_categories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"BFCL_v4_simple_python.json.*gorilla-llm/Berkeley-Function-Calling"):
        BfclTask(None)
    with pytest.raises(DataError, match="unknown category 'java'; choose from simple, multiple, parallel"):
        BfclTask("x", categories=["simple", "java"])
    with pytest.raises(DataError, match="does not exist; pass the folder"):
        BfclTask(tmp_path / "absent").problems()
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(DataError, match="is a file, not a folder"):
        BfclTask(tmp_path / "file.json").problems()

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(DataError, match="cannot load the hub dataset 'a/b': no route"):
        BfclTask("a/b").problems()


def test_the_hub_dataset_is_fetched_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(_write(tmp_path, name="BFCL_v3_simple"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    task = BfclTask("gorilla-llm/Berkeley-Function-Calling-Leaderboard", categories=["simple"])
    assert [problem.id for problem in task.problems()] == ["simple_python_0"]
    assert asked["repo_type"] == "dataset"
    assert "possible_answer/BFCL_v3_simple.json" in asked["allow_patterns"]
