"""Tasks by name: how each asks, samples and is trained for; what `headstart evaluate` makes of its arguments."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, get_args

import pytest

from headstart import __version__
from headstart.assemble.plugins import TASK_METHODS
from headstart.assemble.tasks import _warn_of_unread_calls, evaluation_settings, grader_of, make_task
from headstart.cli.evaluate import _config
from headstart.config.evaluation import Benchmark, EvaluationConfig, MathBenchmark, MbppBenchmark, TinyTask
from headstart.errors import ConfigError
from headstart.records import Sampling
from headstart.tasks.code import Mbpp
from headstart.testing import byte_tokenizer
from real_tokenizers import real_tokenizer

ROOT = Path(__file__).parents[2]
NAMES = [(kind, name) for kind in get_args(Benchmark) for name in get_args(kind.model_fields["type"].annotation)]


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_a_benchmark_says_how_it_samples_and_what_to_train_on(kind: Any, name: str) -> None:
    task: Any = make_task(kind(type=name, data="x.jsonl"))
    assert task.name == name
    settings = evaluation_settings(EvaluationConfig(task=kind(type=name, data="x.jsonl")), task)
    if kind is MathBenchmark:
        assert (settings.samples, settings.sampling, settings.max_tokens) == (4, Sampling(0.7, 0.95, 0), 2048)
    else:
        assert (settings.samples, settings.sampling, settings.max_tokens) == (1, Sampling(0.0, 1.0, 0), 512)
    assert all("/" in source for source in task.training)
    table = (ROOT / "docs" / "reference" / "tasks.md").read_text()
    assert f"| `{name}` |" in table
    assert all(hub in table for hub in getattr(task, "hub", ()) if hub != "DigitalLearningGmbH/MATH-lighteval")


def test_mbpp_takes_a_split() -> None:
    task = make_task(MbppBenchmark(data="x.jsonl", split="train"))
    assert isinstance(task, Mbpp)
    assert task.split == "train"


def test_the_class_of_the_how_to_is_a_task() -> None:
    page = (ROOT / "docs" / "how-to" / "own-task.md").read_text()
    namespace: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], namespace)
    task = namespace["Sums"]()
    problem = task.problems()[3]
    assert all(callable(getattr(task, name)) for name in TASK_METHODS)
    assert [task.grade(problem, said).correct for said in ("it is 6", "5", "")] == [True, False, False]
    assert (evaluation_settings(EvaluationConfig(task=TinyTask()), task).max_tokens) == 32


def test_the_graders_version_is_named() -> None:
    assert grader_of(make_task(TinyTask()))["grader"] == f"headstart {__version__} tiny world"


def test_keys_without_a_section_belong_to_the_evaluation() -> None:
    config = _config(["M", "samples=8", "student.dtype=float32"], "gsm8k", "x.jsonl", without_model=False)
    evaluation = config.evaluation
    assert evaluation is not None
    assert (config.student.path, config.student.dtype, evaluation.samples) == ("M", "float32", 8)
    assert evaluation.task == MathBenchmark(data="x.jsonl")
    assert evaluation.limit is None, "a benchmark is measured whole"
    assert evaluation.batch_size is None


def test_a_runs_configuration_brings_its_evaluation() -> None:
    recipe = "recipe:tiny-esr"
    own = _config([recipe, "limit=3"], None, None, without_model=False).evaluation
    assert own is not None
    assert (own.task, own.limit, own.samples) == (TinyTask(split="test"), 3, 4)
    other = _config([recipe], "gsm8k", "x.jsonl", without_model=False).evaluation
    assert other is not None
    assert other.task == MathBenchmark(data="x.jsonl")


def test_no_task_or_no_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="which task"):
        _config(["M"], None, None, without_model=False)
    with pytest.raises(ConfigError, match="which model"):
        _config([], "gsm8k", None, without_model=False)


CALLS = {
    "qwen": '<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }} }</tool_call>',
    "llama": '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }} }',
    "xml": "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments | items %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
    "unread": "CALL {{ f.name }} WITH {{ f.arguments | tojson }}",
    "left out": "",
    "refused": "{{ f.arguments + 'text' }}",
    "no arguments": '<tool_call>{"name": "{{ f.name }}", "arguments": {} }</tool_call>',
}


@pytest.mark.parametrize(("syntax", "read"), [(name, name in ("qwen", "llama", "xml")) for name in CALLS])
def test_one_call_goes_through_the_template_before_function_calls_are_graded(syntax: str, read: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + CALLS[syntax] + "{% endfor %}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _warn_of_unread_calls(tokenizer, {})
    told = [str(w.message) for w in caught if "function calls" in str(w.message)]
    assert read == (not told)
    assert all("set evaluation.task.style=prompt" in text for text in told)


@pytest.mark.parametrize(("name", "arguments"), [("qwen2_5", {}), ("qwen3", {}), ("qwen3", {"enable_thinking": False})])
def test_the_calls_of_real_templates_are_read(name: str, arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_unread_calls(real_tokenizer(name), arguments)
