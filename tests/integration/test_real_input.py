"""GSM8K through the real Qwen2.5 and Qwen3 tokenizers and chat templates, from the command line.

The models are made on the spot: Qwen architectures with heads as wide as the real ones (151,936 rows for the student;
152,064, padded differently, for the teacher), but one narrow layer. Twenty steps take about 40 seconds on one core;
the divergence falls from 2.2 to 0.1 nats per token. The peak memory of the whole process is 1.15 GiB, of which the
libraries and both tokenizers take 0.54 GiB; a single float32 `[B, T, V]` tensor would be 2.5 GiB.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import quick
from headstart.models.quiet import quiet
from headstart.testing import Architecture, random_model
from real_tokenizers import real_data, real_tokenizer_folder
from support import beside_progress

STUDENT_ROWS, TEACHER_ROWS = 151_936, 152_064
SHARED = 151_665  # ids of the Qwen2.5 tokenizer; Qwen3's four more are the teacher's alone
END_OF_TEXT, END_OF_TURN = 151_643, 151_645
STEPS, PROMPTS, HORIZON = 20, 24, 4
SYSTEM = (
    "Solve the problem step by step. Begin with a plan of one line, then write one calculation per line, each with the "
    "unit of its result, and end with the final answer after four hashes. For example, to the question how many eggs "
    "are left when a farmer collects 16 eggs a day, eats three of them for breakfast and bakes with four, answer: "
    "Plan: subtract what is used from what is collected. 3 + 4 = 7 eggs are used. 16 - 7 = 9 eggs are left. #### 9"
)


def write_model(
    folder: Path, architecture: Architecture, tokenizer: str, rows: int, stops: list[int], **kwargs: Any
) -> Path:
    model = random_model(architecture, rows, layers=1, **kwargs)
    # Like trained embeddings, these share a direction, so that 20 steps suffice to learn what all contexts have in
    # common (independent ones would have to be learned word by word).
    model.get_input_embeddings().weight.data.add_(1.0)
    model.generation_config.eos_token_id = stops
    with quiet():
        model.save_pretrained(folder)
    for path in real_tokenizer_folder(tokenizer).iterdir():
        shutil.copy(path, folder)
    return folder


@dataclass(frozen=True)
class Finished:
    run: Path
    student: Path
    output: str

    def lines(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    train, test = real_data("gsm8k/train.jsonl.gz"), real_data("gsm8k/test.jsonl")
    folder = tmp_path_factory.mktemp("real")
    # A base model stops with one token and an instruction-tuned one with another, as in the paper's pairs.
    student = write_model(
        folder / "student", "qwen2", "qwen2_5", STUDENT_ROWS, [END_OF_TEXT], hidden=32, seed=1, scale=0.02
    )
    teacher = write_model(
        folder / "teacher", "qwen3", "qwen3", TEACHER_ROWS, [END_OF_TURN, END_OF_TEXT], hidden=48, seed=2
    )
    (folder / "run.yaml").write_text(f"""\
student: {{path: {student}}}
teacher: {{path: {teacher}}}
tuning: {{type: full}}
prompts:
  source: {train}
  column: question
  limit: 300
  system: {json.dumps(SYSTEM)}
  teacher_view: {{template_kwargs: {{enable_thinking: false}}}}
horizon: {{type: fixed, tokens: {HORIZON}}}
optimizer: {{lr: 0.01}}
schedule: {{type: constant}}
training: {{steps: {STEPS}, prompts_per_step: {PROMPTS}, device: cpu}}
evaluation:
  task: {{type: jsonl, path: {test}, column: question, answer_column: answer, grader: number}}
  limit: 4
  samples: 1
  max_tokens: 6
""")
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    done = quick.run("distill", folder / "run.yaml", "--out", folder / "run", env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert beside_progress(done.stderr) == ""
    return Finished(folder / "run", student, done.stdout)


@pytest.mark.slow
def test_the_divergence_falls(finished: Finished) -> None:
    steps = finished.lines("step")
    losses = [line["divergence"] for line in steps]
    assert len(losses) == STEPS
    assert all(line["rollouts"] == PROMPTS and line["horizon"] == HORIZON for line in steps)
    first, last = sum(losses[:3]) / 3, sum(losses[-5:]) / 5
    assert last < 0.25 * first
    assert min(losses) > 0


@pytest.mark.slow
def test_the_pair_is_understood(finished: Finished) -> None:
    """Different paddings are cut to the ids both know; different stop tokens are one class."""
    assert f"shared vocabulary {SHARED:,} ids, stop ids [{END_OF_TEXT}, {END_OF_TURN}]" in finished.output
    assert "300 prompts" in finished.output
    generation = json.loads((finished.run / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [END_OF_TEXT, END_OF_TURN]
    before, after = finished.lines("evaluation")
    assert (before["step"], after["step"]) == (0, STEPS)
    assert before["problems"] == after["problems"] == 4


@pytest.mark.slow
def test_the_exported_model_keeps_head_and_chat_template(finished: Finished) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished.run / "model")
    assert model.get_output_embeddings().weight.shape == (STUDENT_ROWS, 32)
    tokenizer, original = (AutoTokenizer.from_pretrained(path) for path in (finished.run / "model", finished.student))
    turn = [{"role": "user", "content": "Natalia sold 48 clips in April. How many are 48 / 2?"}]
    options = {"add_generation_prompt": True, "return_dict": False}
    assert tokenizer.apply_chat_template(turn, **options) == original.apply_chat_template(turn, **options)


@pytest.mark.slow
def test_peak_memory(finished: Finished, record_property: Any) -> None:
    """All of the process takes less than one float32 tensor `[B, T, V]` alone would."""
    last = finished.lines("step")[-1]
    peak = last["peak_memory_gib"]
    # Real tokens only; padding would make the forbidden tensor larger still.
    forbidden = min(line["prompt_tokens"] + line["tokens"] for line in finished.lines("step")) * SHARED * 4 / 2**30
    print(f"peak memory {peak:.2f} GiB; one [B, T, V] float32 tensor would be {forbidden:.2f} GiB")  # noqa: T201
    record_property("peak_memory_gib", peak)
    assert peak < 0.75 * forbidden
