"""The same question asked by lm-eval: a model folder measured by the public harness, on our prompts, with our grader.

lm-eval (the extra `harness`) runs as a subprocess without network, on a YAML task of `harness_tasks/` and the problems
that our own task reads. What differs from `headstart evaluate` is everything between prompt and text: loading,
tokenisation, batching, decoding. So the two figures check each other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from headstart.config.schema import ModelConfig
from headstart.errors import ConfigError, HeadstartError, ModelError, RunFolderError
from headstart.files import make_folder, write_atomic, write_json
from headstart.models.load import load_tokenizer, resolve
from headstart.models.templates import shown_turns
from headstart.records import Problem
from headstart.tasks.grading.math import shared_grader
from headstart.tasks.math import Aime, Gsm8k, Math500, MathTask

TASKS: dict[str, type[MathTask]] = {"gsm8k": Gsm8k, "math500": Math500, "aime": Aime}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class HarnessAnswer:
    """One answer of lm-eval's: the prompt it rendered, the text it decoded, what the grader said."""

    problem_id: str
    prompt: str
    response: str
    correct: bool


@dataclass(frozen=True, slots=True)
class HarnessResult:
    """lm-eval's figures, shares in 0..1, and its answers in the order of the problems."""

    accuracy: float
    standard_error: float
    no_answer: float
    version: str
    answers: tuple[HarnessAnswer, ...]


def run_harness(
    model: Path | str,
    task: str,
    *,
    data: Path | str | None,
    out: Path,
    limit: int | None = None,
    max_tokens: int = 2048,
    batch_size: int = 16,
    device: str = "cpu",
    dtype: str = "auto",
) -> HarnessResult:
    """Let lm-eval answer the first `limit` problems of `task` (gsm8k, math500, aime) greedily with `model`, a folder.

    `out` keeps the problems, the task, the settings (`lm_eval run --config OUT/run.yaml` repeats it), lm-eval's own
    results and its log. Raises ConfigError when lm-eval is not installed or the task unknown, DataError for `data`,
    ModelError when `model` is no folder or a prompt does not fit its context, RunFolderError when `out` holds something
    already, HeadstartError with lm-eval's last words when it fails.
    """
    if task not in TASKS:
        raise ConfigError(f"the harness knows {', '.join(TASKS)}, not {task!r}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed; add it with: pip install 'headstart[harness]'")
    folder = resolve(str(model))
    if not Path(folder).is_dir():
        raise ModelError(f"the harness runs without network and needs a model folder, not the hub name {folder!r}")
    tokenizer = load_tokenizer(ModelConfig(path=folder))
    rows = [_row(problem, tokenizer) for problem in TASKS[task](data).problems()[:limit]]
    if out.exists() and any(out.iterdir()):
        raise RunFolderError(f"{out} is not empty; choose another folder")
    settings = {
        "model": "hf",
        # The rendered chat template brings its own first token, if the model has one.
        "model_args": {"pretrained": folder, "dtype": dtype, "add_bos_token": False},
        "tasks": [f"headstart_{task}"],
        "include_path": str((out / "task").resolve()),
        "apply_chat_template": True,
        "gen_kwargs": {"max_gen_toks": max_tokens},
        "batch_size": batch_size,
        "device": device,
        "output_path": str((out / "lm-eval").resolve()),
        "log_samples": True,
    }
    _write(out, task, rows, settings)
    _run(out)
    return _read(out / "lm-eval", f"headstart_{task}")


def graded(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """What lm-eval calls with a problem and the one text it decoded: our verdict on it."""
    verdict = shared_grader().grade(doc["gold"], results[0])
    return {"accuracy": float(verdict.correct), "no_answer": float(verdict.status == "no_answer")}


def _row(problem: Problem, tokenizer: Any) -> dict[str, Any]:
    """A problem as lm-eval reads it. It drops a system turn that the chat template refuses, so none is given then."""
    *system, user = (turn["content"] for turn in shown_turns(problem, tokenizer))
    return {"id": problem.id, "system": "".join(system), "question": user, "gold": problem.answer}


def _write(out: Path, task: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Problems, task and settings as files. JSON is YAML, too."""
    make_folder(out / "task")
    path = (out / "problems.jsonl").resolve()
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    shipped = Path(str(files("headstart"))) / "evaluate" / "harness_tasks" / f"{task}.yaml"
    own = {
        "include": str(shipped),
        "task": f"headstart_{task}",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
    }
    write_json(out / "task" / f"{task}.yaml", own)
    write_json(out / "run.yaml", settings)


def _run(out: Path) -> None:
    """Run lm-eval, its words in `lm-eval.log`; raise when it fails or did what nobody asked for."""
    log = out / "lm-eval.log"
    environment = os.environ | OFFLINE | {"HF_DATASETS_CACHE": str((out / "cache").resolve())}
    command = [sys.executable, "-m", "lm_eval", "run", "--config", str(out / "run.yaml")]
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    text = log.read_text(encoding="utf-8", errors="replace")
    if code != 0:
        # A progress bar may come after the exception.
        lines = [line for line in text.splitlines() if line.strip()]
        last = ([line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines or ["no output"])[-1]
        raise HeadstartError(f"lm-eval ended with exit code {code}: {last}. Its whole output is in {log}")
    if "Left truncation applied" in text:
        raise ModelError(
            f"lm-eval cut prompts that do not fit the model's context beside max_tokens; lower max_tokens. See {log}"
        )


def _read(folder: Path, task: str) -> HarnessResult:
    """lm-eval's results file and its samples, each named after model and time."""
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob(f"samples_{task}_*.jsonl")
    record = json.loads(results.read_text(encoding="utf-8"))
    figures = record["results"][task]
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").split("\n") if line]
    rows.sort(key=lambda row: int(row["doc_id"]))
    return HarnessResult(
        accuracy=float(figures["accuracy,none"]),
        standard_error=_number(figures["accuracy_stderr,none"]),
        no_answer=float(figures["no_answer,none"]),
        version=str(record["lm_eval_version"]),
        answers=tuple(
            HarnessAnswer(
                problem_id=row["doc"]["id"],
                prompt=row["arguments"]["gen_args_0"]["arg_0"],
                response=row["filtered_resps"][0],
                correct=bool(row["accuracy"]),
            )
            for row in rows
        ),
    )


def _number(value: float | str) -> float:
    """lm-eval writes "N/A" where a single problem has no standard error."""
    return float("nan") if isinstance(value, str) else float(value)
