"""What a run leaves beside its metrics: the exported model, and the record of what its figures and its inputs were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.assemble.pair import Pair
from headstart.assemble.tasks import Questions
from headstart.config.schema import Config, ModelConfig
from headstart.models.export import export_model, model_card
from headstart.records import EvalReport
from headstart.train.inputs import SOURCES, Inputs, digest, model_parts


def export(config: Config, pair: Pair, model: Any, path: Path, tokens: int, after: EvalReport | None) -> None:
    """Write the final model into the folder `path`; its card says that `tokens` were generated."""
    from headstart.version import __version__

    stops, form = pair.vocabulary.stop_ids, config.output.format
    card = model_card(config, __version__, tokens, after, stops)
    export_model(model, pair.tokenizer, path, format=form, stop_ids=stops, card=card)


def files_of(config: Config) -> dict[str, str]:
    """Digests of the files that both models are loaded from, as parts of the inputs."""
    teacher = config.teacher
    here = model_parts("teacher", teacher) if isinstance(teacher, ModelConfig) else {}
    return model_parts("student", config.student) | here


def served_parts(pair: Pair) -> dict[str, str]:
    """What is known of a teacher at a URL, as parts of the inputs."""
    found = pair.endpoint
    return (
        {} if found is None else {"teacher/served": f"{found.model}, {found.level}, texts split as {found.tokenizer}"}
    )


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
