"""What a run leaves beside its metrics: the exported model, and the record of what its figures and its inputs were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.assemble.pair import Pair
from headstart.assemble.tasks import Questions
from headstart.config.schema import Config, ModelConfig
from headstart.models.export import export_model, model_card, written_dtype
from headstart.models.hub import push
from headstart.models.load import stored_dtype
from headstart.models.lora import unwrap
from headstart.progress import doing, first_rank
from headstart.records import EvalReport
from headstart.tracking import ConsoleTracker
from headstart.train.inputs import SOURCES, Inputs, digest, model_parts
from headstart.train.loop import RunResult
from headstart.version import __version__


def exporter(config: Config, pair: Pair) -> Callable[[Any, Path, int, EvalReport | None], None]:
    """Writes the final model into a folder; its card says how many tokens were generated."""
    stops, form, stored = pair.vocabulary.stop_ids, config.output.format, stored_dtype(config.student)

    def export(model: Any, path: Path, tokens: int, after: EvalReport | None) -> None:
        trained = unwrap(model).dtype
        dtype = trained if form == "adapter" else written_dtype(model, config.output.dtype, stored)
        weights = str(dtype).removeprefix("torch.")
        if dtype != trained:
            weights += f"; trained and evaluated in {str(trained).removeprefix('torch.')}"
        card = model_card(config, __version__, tokens, after, stops, weights)
        export_model(model, pair.tokenizer, path, format=form, stop_ids=stops, card=card, dtype=dtype)

    return export


def published(result: RunResult, config: Config) -> RunResult:
    """`result`, once its model is uploaded where `output.push` asks for it."""
    folder = result.path / "model"  # empty where several runs share their models
    if config.output.push and first_rank() and any(folder.iterdir()):
        with doing(f"uploading the model to {config.output.push}"):
            place = push(folder, config.output)
        if place is not None:
            ConsoleTracker(result.progress.step).message(f"model pushed to {place}")
    return result


def files_of(config: Config) -> dict[str, str]:
    """Digests of the files that both models are loaded from, as parts of the inputs."""
    named: dict[str, Any] = {f"teacher/{teacher.name}": teacher for teacher in config.teachers}
    named = named or {"teacher": config.teacher}
    found = model_parts("student", config.student)
    for who, teacher in named.items():
        found |= model_parts(who, teacher) if isinstance(teacher, ModelConfig) else {}
    return found


def served_parts(pair: Pair) -> dict[str, str]:
    """What is known of a teacher at a URL, as parts of the inputs."""
    pairs = {f"/{name}": one for name, one in pair.pairs.items()} or {"": pair}
    return {
        f"teacher{name}/served": f"{found.model}, {found.level}, texts split as {found.tokenizer}"
        for name, one in pairs.items()
        if (found := one.endpoint) is not None
    }


def measured(questions: Questions, record: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    """What the figures of an evaluation depend on, beside the trained weights."""
    task = inputs.config["evaluation"]["task"]
    data = Path(str(task.get("path") or task.get("data")))
    student = {key: value for key, value in inputs.config["student"].items() if f"student.{key}" not in SOURCES}
    files = {name: text for name, text in inputs.parts.items() if name.startswith("student/")}
    return {
        **asdict(questions.settings) | {"batch_size": None},
        **record,
        "evaluation_task": {key: value for key, value in task.items() if value != str(data) or not data.is_file()},
        "data_sha256": digest(data.read_bytes()) if data.is_file() else None,
        "student_sha256": digest(repr((files, student, inputs.config["tuning"], inputs.config["training"]["device"]))),
    }
