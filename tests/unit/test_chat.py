"""`headstart chat`: what answers, in which form the line is asked, and where answers end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from headstart.cli.main import app
from headstart.config.schema import ModelConfig
from headstart.distillation.run import distill
from headstart.errors import ConfigError, DataError, RunFolderError
from headstart.explanation.run import trained_model
from headstart.models.collate import completion_text
from headstart.models.load import load_model, load_tokenizer
from headstart.models.templates import View
from headstart.records import Problem, Prompt, Rollout
from headstart.train.folder import RunFolder
from support import make_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run that leaves an adapter; a system prompt of its own, another for the teacher."""
    folder = tmp_path_factory.mktemp("chat")
    tuning = "tuning={type: lora, r: 4, alpha: 64, dropout: 0.0}"
    prompts = ("prompts.system=w7", "prompts.teacher_view.system=w9 w9")
    config = make_config(folder, tuning, "output.format=adapter", "optimizer.lr=0.1", *prompts)
    distill(config, out=folder / "run")
    return folder / "run"


def chat(*arguments: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments), "--max-tokens", "6"], input=typed)


def greedy(source: ModelConfig, text: str, system: str | None) -> str:
    """The answer of transformers' own forward passes."""
    tokenizer, model = load_tokenizer(source), load_model(source, torch.device("cpu"))
    ask = Problem("x", messages=({"role": "user", "content": text},))
    ids = View(tokenizer, chat=True, system=system).ids(ask)
    prompt, answer, stop = Prompt(0, "x", tuple(ids), tuple(ids)), [], model.generation_config.eos_token_id
    while len(answer) < 6 and stop not in answer:
        with torch.no_grad():
            answer.append(int(model(torch.tensor([[*ids, *answer]])).logits[0, -1].argmax()))
    return completion_text(tokenizer, Rollout(prompt, 0, tuple(answer), stop in answer))


def test_before_after_and_teacher_answer_as_the_run_asks(run: Path) -> None:
    result = chat(run, "--prompt", "w1 w3", "--teacher")
    assert result.exit_code == 0, result.exception
    config = make_config(run.parent, "output.format=adapter", "tuning.type=lora")
    assert isinstance(config.teacher, ModelConfig)
    expected = {
        "before": greedy(config.student, "w1 w3", "w7"),
        "after": greedy(trained_model(config, RunFolder(run)), "w1 w3", "w7"),
        "teacher": greedy(config.teacher, "w1 w3", "w9 w9"),
    }
    assert len(set(expected.values())) == 3
    blocks = result.stdout.strip().split("\n\n")
    assert [block.split(" (")[0] for block in blocks] == list(expected)
    assert [block.partition(":\n")[2].strip() or block.rpartition(":")[2] for block in blocks] == [*expected.values()]


def test_every_line_is_a_question_of_its_own(run: Path) -> None:
    both = chat(run / ".." / "student", typed="w1\n\nw2\nexit\nw3\n").stdout
    alone = [chat(run / ".." / "student", "--prompt", line).stdout for line in ("w1", "w2")]
    assert both == "".join(alone)


def test_a_model_without_a_chat_template_continues_the_text() -> None:
    result = chat("tiny:student", "--prompt", "hello")
    assert result.exit_code == 0, result.exception
    assert "tiny:student (cut at 6 tokens)" in result.stdout


def test_what_cannot_answer_is_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert isinstance(chat(tmp_path, "--prompt", "w1").exception, RunFolderError)
    assert isinstance(chat("tiny:student", "--prompt", "w1", "--teacher").exception, ConfigError)
    long = chat(run / ".." / "student", "--prompt", "w1 " * 2000)
    assert isinstance(long.exception, DataError)
    assert "leaves" in str(long.exception)
