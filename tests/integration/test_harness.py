"""lm-eval and our own evaluation agree: same model, same prompts, greedy, the same answers to the letter."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.build import evaluate_with_harness
from headstart.build.tasks import task_prompts
from headstart.config import loader
from headstart.config.schema import Config
from headstart.errors import ConfigError, HeadstartError, ModelError, RunFolderError
from headstart.evaluate.harness import HarnessResult, _row, run_harness
from headstart.evaluate.responses import grade_responses, read_responses
from headstart.models.causal import CausalModel
from headstart.models.collate import completion_text
from headstart.models.load import load_model, load_tokenizer
from headstart.models.templates import render
from headstart.models.vocabulary import shared_vocabulary
from headstart.records import Prompt, Sampling
from headstart.rollout.engine import InProcessEngine
from headstart.tasks.math import Gsm8k
from headstart.testing import byte_tokenizer, random_model, write_checkpoint
from real_tokenizers import real_data

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'headstart[harness]')"
)
PROBLEMS = 20
MAX_TOKENS = 40
HIDDEN = 256


def answers(gold: list[str]) -> list[str]:
    """What the model is made to say: right and wrong in every form an answer takes, and some that never end."""
    forms = (
        r"so \boxed{%s}",
        "steps\n\n#### %s",  # lm-eval would stop at the empty line, were it not told otherwise
        r"\boxed{1} no, \boxed{%s}",
        "The answer is %s.",
        r"so \boxed{%s",
        "well",
    )
    texts = [form % number if "%" in form else form for form, number in zip(itertools.cycle(forms), gold, strict=False)]
    return [r"\boxed{7}" if place % 7 == 3 else text for place, text in enumerate(texts)]


def memorising_model(folder: Path, data: Path) -> Path:
    """A random Llama whose head is solved for (least squares) so that it greedily says `answers` to the problems.

    Every fifth answer goes on after its text without an end that was ever taught. The checkpoint's generation settings
    ask for sampling and a repetition penalty, as Qwen's do; neither belongs in a greedy measurement.
    """
    task = Gsm8k(data)
    tokenizer = byte_tokenizer()
    texts = answers([problem.answer or "" for problem in task.problems()])
    tokenizer.add_tokens([r"\boxed{", "The answer is", "steps", "no, ", "well", "#### "])
    model = random_model("llama", len(tokenizer), hidden=HIDDEN)
    model.config.max_position_embeddings = 2048
    prompts = prompts_of(data, tokenizer)
    hidden, targets = [], []
    for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        said = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * (place % 5 != 4)
        with torch.no_grad():
            states = model.model(torch.tensor([[*prompt.token_ids, *said]])).last_hidden_state[0].double()
        hidden.append(states[len(prompt.token_ids) - 1 : -1])
        targets.append(torch.nn.functional.one_hot(torch.tensor(said), len(tokenizer)).double())
    states_MD, wanted_MV = torch.cat(hidden), torch.cat(targets)
    assert len(states_MD) <= HIDDEN, "more positions than the head has room for"
    head = torch.nn.Linear(HIDDEN, len(tokenizer), bias=False)
    head.weight.data = torch.linalg.lstsq(states_MD, wanted_MV).solution.T.float().contiguous()
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = True, 0.9, 1.5
    return write_checkpoint(folder, model, tokenizer)


def prompts_of(data: Path, tokenizer: Any) -> tuple[Prompt, ...]:
    task = {"type": "gsm8k", "data": str(data)}
    config = loader.parse(
        {
            "student": {"path": "x"},
            "teacher": {"path": "x"},
            "prompts": {"source": "tiny"},
            "evaluation": {"task": task},
        }
    )
    return task_prompts(config, list(Gsm8k(data).problems()), tokenizer, own_system=True)


def our_answers(model: Path, data: Path) -> tuple[list[str], list[str]]:
    """Our prompts as text, and what the in-process engine answers."""
    config = loader.parse({"student": {"path": str(model)}, "teacher": {"path": "x"}, "prompts": {"source": "tiny"}})
    tokenizer = load_tokenizer(config.student)
    loaded = load_model(config.student, torch.device("cpu"))
    rows = loaded.get_output_embeddings().weight.shape[0]
    vocabulary = shared_vocabulary(tokenizer, tokenizer, loaded.generation_config, loaded.generation_config, rows, rows)
    prompts = prompts_of(data, tokenizer)
    rollouts = InProcessEngine(CausalModel(loaded, vocabulary.size, 0), vocabulary.stop_ids).generate(
        prompts, samples=1, max_tokens=MAX_TOKENS, sampling=Sampling(0.0, 1.0), key=(0, "evaluation", 0), batch_size=6
    )
    texts = [tokenizer.decode(list(prompt.token_ids)) for prompt in prompts]
    return texts, [completion_text(tokenizer, rollout) for rollout in rollouts]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, HarnessResult]:
    folder = tmp_path_factory.mktemp("harness")
    lines = real_data("gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    data = folder / "gsm8k.jsonl"
    data.write_text("".join(lines[:PROBLEMS]), encoding="utf-8")
    model = memorising_model(folder / "model", data)
    result = run_harness(model, "gsm8k", data=data, out=folder / "out", max_tokens=MAX_TOKENS, batch_size=7)
    return model, data, result


@needs_lm_eval
def test_lm_eval_gives_exactly_our_answers_and_our_figure(asked: Any, tmp_path: Path) -> None:
    model, data, result = asked
    prompts, responses = our_answers(model, data)
    assert [answer.prompt for answer in result.answers] == prompts
    assert [answer.response for answer in result.answers] == responses
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "responses": [r]}) + "\n" for i, r in enumerate(responses)))
    task = Gsm8k(data)
    problems = task.problems()[:PROBLEMS]
    rows = grade_responses(task, problems, read_responses(path, {problem.id: problem for problem in problems}))
    assert [answer.correct for answer in result.answers] == [row.verdict.correct for row in rows]
    assert result.accuracy == pytest.approx(sum(row.verdict.correct for row in rows) / PROBLEMS)
    assert result.no_answer == pytest.approx(sum(row.verdict.status == "no_answer" for row in rows) / PROBLEMS)
    assert result.version == "0.4.13"
    # The agreement means something: answers of every kind, several of them unending.
    statuses = {row.verdict.status for row in rows}
    assert statuses == {"correct", "wrong", "no_answer"}
    assert 0.3 < result.accuracy < 0.8
    assert len(set(responses)) > 12
    assert sum("\n\n" in response for response in responses) >= 2


@needs_lm_eval
def test_the_command_prints_the_same_figure(asked: Any, tmp_path: Path) -> None:
    model, data, result = asked
    out = tmp_path / "out"
    sizes = ("limit=4", f"max_tokens={MAX_TOKENS}", "batch_size=4")
    command = [sys.executable, "-m", "headstart", "evaluate", model, "--task", "gsm8k", "--data", data, "--harness"]
    done = subprocess.run([*command, "--out", out, *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    right = sum(answer.correct for answer in result.answers[:4])
    assert 0 < right < 4
    for part in ("lm-eval 0.4.13", "accuracy", "standard error", "no answer", f"{right / 4:.1%}", str(out)):
        assert part in done.stdout
    assert json.loads((out / "run.yaml").read_text())["model_args"]["dtype"] == "float32"


def config_of(*settings: str) -> Config:
    models = {"student": {"path": "tiny:teacher"}, "teacher": {"path": "x"}, "prompts": {"source": "tiny"}}
    return loader.parse({**models, "evaluation": {"task": {"type": "gsm8k", "data": "x.jsonl"}}}, list(settings))


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("evaluation.temperature=0.7", "temperature"),
        ("evaluation.samples=4", "samples"),
        ("evaluation.top_p=0.9", "top_p"),
        ("evaluation.top_k=20", "top_k"),
        ("prompts.chat=false", "prompts.chat"),
        ("prompts.template_kwargs={enable_thinking: false}", "prompts.template_kwargs"),
        ("student.adapter=some/adapter", "student.adapter"),
    ],
)
def test_settings_that_the_harness_cannot_honour_are_refused(setting: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot honour {name}; leave it out"):
        evaluate_with_harness(config_of(setting), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_the_harness_can_honour_reach_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("headstart.build.evaluation.run_harness", lambda *args, **more: given.update(more, args=args))
    greedy = ("evaluation.temperature=0", "evaluation.samples=1", "evaluation.top_p=1", "training.device=cpu")
    evaluate_with_harness(config_of(*greedy, "evaluation.max_tokens=99", "evaluation.limit=null"), out=tmp_path)
    assert given == {
        "args": ("tiny:teacher", "gsm8k"),
        "data": "x.jsonl",
        "out": tmp_path,
        "limit": None,
        "max_tokens": 99,
        "device": "cpu",
        "dtype": "float32",
    }


@pytest.mark.parametrize("system_role", [True, False])
def test_the_instruction_is_not_lost_where_the_template_has_no_system_role(system_role: bool, tmp_path: Path) -> None:
    """lm-eval leaves out a system turn that a template refuses; ours then stands in front of the question."""
    (tmp_path / "data.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    tokenizer = byte_tokenizer(system_role=system_role)
    (problem,) = Gsm8k(tmp_path / "data.jsonl").problems()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = _row(problem, tokenizer)
        ours = render(problem, tokenizer, chat=True, system=None, template_kwargs={})
    roles = [("system", row["system"])] * bool(row["system"]) + [("user", row["question"])]
    turns = [{"role": role, "content": content} for role, content in roles]
    assert len(turns) == 1 + system_role
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] == ours


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, int], HarnessResult]:
    """A harness whose lm-eval prints a text and ends with an exit code."""
    data = tmp_path / "gsm8k.jsonl"
    data.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def run(text: str, code: int) -> HarnessResult:
        stub = tmp_path / "stub" / "lm_eval"
        stub.mkdir(parents=True)
        (stub / "__init__.py").touch()
        (stub / "__main__.py").write_text(f"import sys\nprint({text!r})\nsys.exit({code})\n")
        monkeypatch.setenv("PYTHONPATH", str(stub.parent))
        return run_harness("tiny:teacher", "gsm8k", data=data, out=tmp_path / "out")

    return run


def test_a_prompt_that_does_not_fit_gives_no_figure(made_up: Any) -> None:
    with pytest.raises(ModelError, match="lm-eval cut prompts"):
        made_up("Left truncation applied. Original sequence length was 700, truncating to last 10 tokens.", 0)


def test_what_lm_eval_says_when_it_fails_is_passed_on(made_up: Any, tmp_path: Path) -> None:
    with pytest.raises(HeadstartError, match=r"exit code 3: OSError: no disk\. .*lm-eval\.log"):
        made_up("Traceback\nOSError: no disk\nrequests:   0%| | 0/1", 3)
    assert (tmp_path / "out" / "lm-eval.log").read_text().startswith("Traceback")


def test_a_missing_lm_eval_comes_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'headstart\[harness\]'"):
        run_harness("tiny:teacher", "gsm8k", data="x.jsonl", out=tmp_path)


def test_bad_input_ends_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    data = tmp_path / "gsm8k.jsonl"
    data.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    with pytest.raises(ConfigError, match="knows gsm8k, math500, aime, not 'humaneval'"):
        run_harness("tiny:teacher", "humaneval", data=data, out=tmp_path / "out")
    with pytest.raises(ModelError, match="needs a model folder"):
        run_harness("owner/name", "gsm8k", data=data, out=tmp_path / "out")
    with pytest.raises(RunFolderError, match="is not empty"):
        run_harness("tiny:teacher", "gsm8k", data=data, out=tmp_path)
    assert not (tmp_path / "out").exists()
