"""Token selection by experiment: the same run on full rollouts, once for each rule, at an equal token budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headstart.config.horizon import FullHorizon
from headstart.config.schema import Config, OutputConfig
from headstart.distillation.arms import arm_config, log_file, other_settings, train_arm
from headstart.errors import ConfigError
from headstart.explanation.token_selection import Arm, make_arm, rules
from headstart.files import write_json
from headstart.reports.run import read_run

_FIGURES = ("steps", "tokens_trained", "generated_tokens", "seconds")


def train_arms(
    config: Config, folder: Path, tokens: int, max_tokens: int, piece: Callable[[], None] = lambda: None
) -> list[Arm]:
    """Every rule trained with the run's steps and seed on rollouts of up to `max_tokens`, `tokens` of each selected.

    A finished arm leaves `<rule>.json` in `folder` and is not trained again while its configuration stays the same;
    one that was cut is resumed. Raises ConfigError without an evaluation to judge the arms with.
    """
    if config.evaluation is None:
        raise ConfigError("selection arms are judged by an evaluation, and the run has none; add an evaluation section")
    for rule, wanted in _configs(config, tokens, max_tokens).items():
        if _record(folder, rule, wanted) is None:
            write_json(_file(folder, rule), _train(wanted, _file(folder, rule).with_suffix(""), rule))
        piece()
    return finished_arms(config, folder, tokens, max_tokens)


def finished_arms(config: Config, folder: Path, tokens: int, max_tokens: int) -> list[Arm]:
    """The arms in `folder` that were trained with this very configuration, in the order of the rules."""
    found = {rule: _record(folder, rule, wanted) for rule, wanted in _configs(config, tokens, max_tokens).items()}
    records = {rule: record for rule, record in found.items() if record is not None}
    first = records["first"]["means"] if "first" in records else None
    return [
        make_arm(rule, record["means"], first, **{name: record[name] for name in _FIGURES})
        for rule, record in records.items()
    ]


def _configs(config: Config, tokens: int, max_tokens: int) -> dict[str, Config]:
    """The run's configuration with full rollouts and each rule's selection, nothing kept but the result."""
    base = arm_config(
        config,
        checkpoint={"keep_best": False, "keep_last": 1},
        tracking={"rollouts_every": 0, "tensorboard": False, "wandb": None},
        **({"evaluation": {"every": None}} if config.evaluation else {}),
    )
    update = {"horizon": FullHorizon(max_tokens=max_tokens), "output": OutputConfig()}
    return {rule: base.model_copy(update={**update, "selection": chosen}) for rule, chosen in rules(tokens).items()}


def _train(config: Config, path: Path, rule: str) -> dict[str, Any]:
    if other_settings(path, config):
        shutil.rmtree(path)
    train_arm(config, path)
    run = read_run(path)
    record = {
        "format": 1,
        "rule": rule,
        "config": config.model_dump(mode="json"),
        "means": run.points[-1].graded()["correct"],
        "steps": len(run.steps),
        "tokens_trained": sum(step["tokens_trained"] for step in run.steps),
        "generated_tokens": sum(step["tokens"] for step in run.steps),
        "seconds": sum(step["seconds"] for step in run.steps),
    }
    shutil.rmtree(path)
    log_file(path).unlink(missing_ok=True)
    return record


def _record(folder: Path, rule: str, config: Config) -> dict[str, Any] | None:
    """What the finished arm left; None when it is not finished or was trained with other settings."""
    path = _file(folder, rule)
    record: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return record if record is not None and record["config"] == config.model_dump(mode="json") else None


def _file(folder: Path, rule: str) -> Path:
    return folder / f"{rule.replace(' ', '-')}.json"
