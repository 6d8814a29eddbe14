"""Token selection by experiment: the same run on full rollouts, once for each rule, at an equal token budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from headstart.config import loader
from headstart.config.horizon import FullHorizon
from headstart.config.schema import Config, OutputConfig, Selection
from headstart.distillation.run import distill
from headstart.errors import ConfigError
from headstart.explanation.token_selection import Arm, make_arm, rules
from headstart.files import write_json
from headstart.train.folder import RunFolder

_FIGURES = ("steps", "tokens_trained", "generated_tokens", "seconds")


def train_arms(
    config: Config, folder: Path, tokens: int, max_tokens: int, piece: Callable[[], None] = lambda: None
) -> list[Arm]:
    """Every rule trained with the run's steps and seed on rollouts of up to `max_tokens`, `tokens` of each selected.

    A finished arm leaves `<rule>.json` in `folder` and is not trained again while its configuration stays the same;
    one that was cut goes on where it stopped. Raises ConfigError without an evaluation to judge the arms with.
    """
    if config.evaluation is None:
        raise ConfigError("selection arms are judged by an evaluation, and the run has none; add an evaluation section")
    folder.mkdir(parents=True, exist_ok=True)
    for rule, selection in rules(tokens).items():
        wanted = arm_config(config, selection, max_tokens)
        if _finished(folder, rule, wanted) is None:
            write_json(_file(folder, rule), _train(wanted, _file(folder, rule).with_suffix(""), rule))
        piece()
    return finished_arms(config, folder, tokens, max_tokens)


def finished_arms(config: Config, folder: Path, tokens: int, max_tokens: int) -> list[Arm]:
    """The arms in `folder` that were trained with this very configuration, in the order of the rules."""
    wanted = {rule: arm_config(config, selection, max_tokens) for rule, selection in rules(tokens).items()}
    records = {rule: record for rule in wanted if (record := _finished(folder, rule, wanted[rule])) is not None}
    first = records["first"]["means"] if "first" in records else None
    return [
        make_arm(rule, record["means"], first, **{name: record[name] for name in _FIGURES})
        for rule, record in records.items()
    ]


def arm_config(config: Config, selection: Selection, max_tokens: int) -> Config:
    """The run's configuration with full rollouts and this selection, nothing kept but the result."""
    return config.model_copy(
        update={
            "horizon": FullHorizon(max_tokens=max_tokens),
            "selection": selection,
            "evaluation": config.evaluation.model_copy(update={"every": None}) if config.evaluation else None,
            "checkpoint": config.checkpoint.model_copy(update={"keep_best": False, "keep_last": 1}),
            "tracking": config.tracking.model_copy(update={"rollouts_every": 0, "tensorboard": False, "wandb": None}),
            "output": OutputConfig(),
        }
    )


def _train(config: Config, path: Path, rule: str) -> dict[str, Any]:
    folder = RunFolder(path)
    if path.exists() and not (folder.config.exists() and loader.load(folder.config) == config):
        shutil.rmtree(path)  # a start that was cut, or an arm of other settings
    if not folder.model.exists():
        with (
            path.with_suffix(".log").open("a", encoding="utf-8", errors="backslashreplace") as log,
            redirect_stdout(log),
        ):
            distill(resume=path) if path.exists() else distill(config, out=path)
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").split("\n")[:-1]]
    steps = [line for line in lines if line["event"] == "step"]
    record = {
        "format": 1,
        "rule": rule,
        "config": config.model_dump(mode="json"),
        "means": _means(folder.eval / f"step_{config.training.steps:06d}.jsonl"),
        "steps": len(steps),
        "tokens_trained": sum(line["tokens_trained"] for line in steps),
        "generated_tokens": sum(line["tokens"] for line in steps),
        "seconds": sum(line["seconds"] for line in steps),
    }
    shutil.rmtree(path)
    path.with_suffix(".log").unlink(missing_ok=True)
    return record


def _finished(folder: Path, rule: str, config: Config) -> Mapping[str, Any] | None:
    path = _file(folder, rule)
    record: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return record if record is not None and record["config"] == config.model_dump(mode="json") else None


def _file(folder: Path, rule: str) -> Path:
    return folder / f"{rule.replace(' ', '-')}.json"


def _means(rows: Path) -> dict[str, float]:
    """Share of right responses of each problem, from an evaluation's graded responses."""
    outcomes: dict[str, list[bool]] = {}
    for line in rows.read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        outcomes.setdefault(row["problem_id"], []).append(row["verdict"]["correct"])
    return {problem: sum(right) / len(right) for problem, right in outcomes.items()}
