"""`headstart init` writes a file that is a run; recipes are found by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from headstart.cli import init
from headstart.cli.main import app
from headstart.config.loader import load
from headstart.config.recipes import recipes
from headstart.errors import ConfigError
from headstart.tasks.math import SYSTEM

TINY = Path(init.__file__).parents[1] / "data" / "tiny"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a GPU, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init.shutil, "which", lambda name: None)


def write_rows(path: Path, **columns: str) -> Path:
    path.write_text("".join(json.dumps({k: f"{v} {i}" for k, v in columns.items()}) + "\n" for i in range(3)))
    return path


def run(*options: str, answers: str = "") -> Result:
    return CliRunner().invoke(app, ["init", *options], input=answers)


def test_a_terminal_is_asked_and_a_wrong_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    done = run(answers="./nowhere\n\n\n\n\n")
    assert done.exit_code == 0, done.output
    assert "there is no model folder ./nowhere" in done.output
    assert "headstart preflight run.yaml" in done.output
    config = load("run.yaml")
    assert (config.student.path, config.prompts.source, config.tuning.type) == ("tiny:student", "tiny", "full")
    assert config.evaluation is not None
    assert (config.evaluation.limit, config.evaluation.max_tokens) == (32, 200)
    assert 15 <= len(Path("run.yaml").read_text().splitlines()) <= 25


def test_what_is_given_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", id="p", Question="what", solution="four")
    for name in ("student", "teacher"):
        shutil.copytree(TINY / "student", tmp_path / name)
    tokenizer, template = tmp_path / "teacher/tokenizer.json", tmp_path / "teacher/chat_template.jinja"
    monkeypatch.setattr(init, "SMALL", 1)  # as for a large model

    def written(name: str, task: str, *options: str) -> str:
        models = ("--student", "student", "--teacher", "teacher", "--prompts", str(prompts))
        done = run(*models, "--task", task, *options, "--out", name)
        assert done.exit_code == 0, done.output
        return Path(name).read_text()

    assert "its tokenizer is the student's" in written("a.yaml", "none")
    config = load("a.yaml")
    assert (config.prompts.column, config.prompts.answer_column, config.prompts.chat) == ("Question", "solution", True)
    assert config.tuning.type == "lora"
    assert config.evaluation is None

    tokenizer.write_text(tokenizer.read_text() + "\n")
    template.write_text("{% if enable_thinking %}{% endif %}" + template.read_text())
    own = written("b.yaml", "jsonl", "--data", str(prompts))
    assert "file is not the student's" in own
    assert "the problems of the task" in own
    config = load("b.yaml")
    assert config.prompts.teacher_view.template_kwargs == {"enable_thinking": False}
    assert not config.prompts.template_kwargs
    assert config.evaluation is not None
    task = config.evaluation.task.model_dump()
    assert (task["path"], task["column"], task["answer_column"]) == (prompts, "Question", "solution")
    assert (task["grader"], config.diagnosis.grader) == ("exact", "boxed")
    prompts.write_text('{"question": "what", "answer": "-1,000.5"}\n')
    written("n.yaml", "jsonl", "--data", str(prompts))
    config = load("n.yaml")
    assert config.evaluation is not None
    assert (config.evaluation.task.model_dump()["grader"], config.diagnosis.grader) == ("number", "number")

    monkeypatch.setattr(init.shutil, "which", lambda name: "/bin/nvidia-smi")
    written("c.yaml", "gsm8k", "--data", "openai/gsm8k")
    config = load("c.yaml")
    assert config.prompts.system == SYSTEM
    assert config.evaluation is not None
    assert (config.training.steps, config.evaluation.limit) == (200, 200)
    assert config.evaluation.max_tokens == 128, "half of the student's context"

    (tmp_path / "student/chat_template.jinja").unlink()
    written("d.yaml", "gsm8k", "--data", "openai/gsm8k")
    config = load("d.yaml")
    assert (config.prompts.chat, config.prompts.system) == (False, None)

    (tmp_path / "student/config.json").rename(tmp_path / "student/adapter_config.json")
    assert "max_tokens: 2048" in written("e.yaml", "gsm8k", "--data", "openai/gsm8k")


def test_a_benchmark_is_asked_as_its_test_is() -> None:
    models = ("--student", "a/b", "--teacher", "c/d", "--prompts", "gsm8k")
    for task, data in (("gsm8k", "mine.jsonl"), ("math500", "openai/gsm8k")):
        Path("mine.jsonl").write_text('{"question": "what", "answer": "#### 4"}\n')
        done = run(*models, "--task", task, "--data", "mine.jsonl", "--out", f"{task}.yaml")
        assert done.exit_code == 0, done.output
        prompts = load(f"{task}.yaml").prompts.model_dump()
        assert (prompts["source"], prompts["data"], prompts["system"]) == ("gsm8k", data, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--student": None}, "--student is missing, and there is no terminal to ask on"),
        ({"--task": "gsm8k"}, "--data is missing, .* such as openai/gsm8k"),
        ({"--task": "gsm"}, "'gsm' is no task here; choose one of gsm8k"),
        ({"--teacher": "./nowhere"}, "no model folder ./nowhere"),
        ({"--teacher": "tiny:nobody"}, "no model folder tiny:nobody"),
        ({"--teacher": "."}, r"\. holds no config.json"),
        ({"--prompts": "gone.jsonl"}, "gone.jsonl does not exist"),
        ({"--prompts": "odd.jsonl"}, "odd.jsonl has the columns x, y, and the one with the question should be called"),
        ({"--data": "tiny"}, "data"),
        ({"--out": "there.yaml"}, "there.yaml exists already"),
        ({"--out": "no/run.yaml"}, "its folder does not exist"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    tmp_path: Path, options: dict[str, str | None], message: str
) -> None:
    Path("there.yaml").write_text("kept")
    write_rows(tmp_path / "odd.jsonl", x="a", y="b")
    usual = {"--student": "tiny:student", "--teacher": "tiny:teacher", "--prompts": "tiny", "--task": "tiny"}
    arguments = [text for pair in (usual | options).items() if pair[1] is not None for text in pair]
    done = run(*map(str, arguments))
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(str(done.exception))
    assert not Path("run.yaml").exists()
    assert Path("there.yaml").read_text() == "kept"


def test_recipes_are_listed_printed_and_loaded_by_name() -> None:
    listed = CliRunner().invoke(app, ["recipes"]).stdout
    assert len(listed.splitlines()) == len(recipes()) == 13
    assert re.search(r"^tiny-esr +Early stopping on the bundled tiny pair", listed, flags=re.MULTILINE)
    printed = CliRunner().invoke(app, ["recipes", "recipe:tiny-esr"]).stdout
    Path("copy.yaml").write_text(printed)
    assert load("copy.yaml") == load("recipe:tiny-esr")
    resolved = CliRunner().invoke(app, ["config", "recipe:tiny-esr", "training.steps=7"]).stdout
    assert "steps: 7" in resolved
    with pytest.raises(ConfigError, match="recipe:tiny-est: no such recipe; did you mean tiny-esr"):
        load("recipe:tiny-est")
