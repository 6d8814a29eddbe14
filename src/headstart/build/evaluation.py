"""Evaluation without training: a model on a task, or responses made elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from headstart.build.pair import check_evaluation_context, pad_id
from headstart.build.tasks import grader_of, load_questions, make_task
from headstart.config.evaluation import TaskConfig
from headstart.config.schema import Config
from headstart.errors import ConfigError
from headstart.evaluate.evaluator import TaskEvaluator
from headstart.evaluate.responses import grade_file
from headstart.evaluate.run import evaluate_into, open_folder, rewrite, write_summary
from headstart.models.causal import CausalModel
from headstart.models.load import load_model, load_tokenizer
from headstart.models.templates import chat_template
from headstart.models.vocabulary import shared_vocabulary
from headstart.rollout.engine import InProcessEngine
from headstart.runtime import Runtime


def evaluate(
    config: Config,
    *,
    out: Path | str | None = None,
    k: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate `config.student` on `config.evaluation.task` into the folder `out`; the summary that is written there.

    A killed evaluation of the same settings goes on where it stopped. Raises ConfigError, DataError, ModelError,
    TemplateError or RunFolderError before generation starts.
    """
    runtime = Runtime.start(config.training.device)
    tokenizer = load_tokenizer(config.student)
    questions = load_questions(config, tokenizer)
    if k is not None and k > questions.settings.samples:
        raise ConfigError(
            f"pass@{k} needs at least {k} samples per problem (found evaluation.samples={questions.settings.samples}); "
            "use a smaller --k or more samples"
        )
    model = load_model(config.student, runtime.device)
    rows = model.get_output_embeddings().weight.shape[0]
    own = model.generation_config
    vocabulary = shared_vocabulary(tokenizer, tokenizer, own, own, rows, rows)
    student = CausalModel(model, vocabulary.size, pad_id(tokenizer))
    student.check_head(config.student.path)
    check_evaluation_context(student, questions)
    record = {
        "model": config.student.model_dump(mode="json"),
        "evaluation_task": config.evaluation.task.model_dump(mode="json") if config.evaluation else None,
        "settings": asdict(questions.settings),
        "problems": len(questions.problems),
        "stop_ids": list(vocabulary.stop_ids),
        "template_kwargs": config.prompts.template_kwargs,
        "chat_template_sha256": _digest(chat_template(tokenizer) or ""),
        "prompts_sha256": _digest(repr([prompt.token_ids for prompt in questions.prompts])),
        **grader_of(questions.task),
    }
    evaluator = TaskEvaluator(questions, InProcessEngine(student, vocabulary.stop_ids), tokenizer, runtime)
    return evaluate_into(_folder(out), evaluator, record, k=k, progress=progress)


def evaluate_responses(
    task: TaskConfig, responses: Path, *, out: Path | str | None = None, k: int | None = None
) -> dict[str, Any]:
    """Grade the responses in the JSONL file `responses` into the folder `out`; the summary that is written there."""
    made = make_task(task)
    rows = grade_file(made, responses)
    folder = _folder(out)
    record = {
        "responses": str(responses),
        "responses_sha256": _digest(responses.read_text(encoding="utf-8")),
        "evaluation_task": task.model_dump(mode="json"),
        **grader_of(made),
    }
    open_folder(folder, record)
    rewrite(folder / "rows.jsonl", rows)
    return write_summary(folder, made.name, rows, record, k)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _folder(out: Path | str | None) -> Path:
    return Path(out) if out is not None else Path("runs") / f"evaluation-{datetime.now():%Y%m%d-%H%M%S}"
