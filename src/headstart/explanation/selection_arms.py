"""Token selection by experiment: the same run on full rollouts, once for each rule, at an equal token budget."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from headstart.config.horizon import FullHorizon
from headstart.config.schema import Config
from headstart.distillation.arms import ArmRun, bare_config
from headstart.distillation.run import Loaded, load
from headstart.errors import ConfigError
from headstart.explanation.token_selection import Arm, make_arm, rules
from headstart.ranks.runtime import Runtime
from headstart.reports.run import failure_file, read_run


def train_arms(
    config: Config, folder: Path, tokens: int, max_tokens: int, piece: Callable[[str], None] = lambda text: None
) -> list[Arm]:
    """Every rule trained with the run's steps and seed on rollouts of up to `max_tokens`, `tokens` of each selected.

    Each arm is an ordinary run in `folder/<rule>`. A finished one is not trained again while its configuration stays
    the same; one that was cut is resumed. Raises ConfigError without an evaluation to judge the arms with.
    """
    if config.evaluation is None:
        raise ConfigError("selection arms are judged by an evaluation, and the run has none; add an evaluation section")
    runs, shared = _runs(config, folder, tokens, max_tokens), None
    for run in runs.values():
        piece(f"training {run.name}")
        if run.other_settings():
            shutil.rmtree(run.folder)
            failure_file(run.folder).unlink(missing_ok=True)
        if not run.finished:
            shared = shared or _load(run.config)
            run.share_start(runs.values())
            run.train(shared)
        run.clear()
        if run.failed:
            warnings.warn(f"{run.name} is left out: {read_run(run.folder).failure}", stacklevel=2)
    return finished_arms(config, folder, tokens, max_tokens)


def finished_arms(config: Config, folder: Path, tokens: int, max_tokens: int) -> list[Arm]:
    """The arms in `folder` that were trained with this very configuration, in the order of the rules."""
    runs = _runs(config, folder, tokens, max_tokens)
    done = {rule: run for rule, run in runs.items() if run.finished and not run.failed and not run.other_settings()}
    results = {rule: read_run(run.folder) for rule, run in done.items()}
    means = {rule: run.points[-1].graded()["correct"] for rule, run in results.items()}
    return [
        make_arm(
            rule,
            means[rule],
            means.get("first"),
            steps=len(run.steps),
            tokens_trained=sum(step["tokens_trained"] for step in run.steps),
            generated_tokens=sum(step["tokens"] for step in run.steps),
            seconds=sum(step["seconds"] for step in run.steps),
        )
        for rule, run in results.items()
    ]


def _runs(config: Config, folder: Path, tokens: int, max_tokens: int) -> dict[str, ArmRun]:
    """The run of each rule: the run's configuration with full rollouts and the rule's selection."""
    base = bare_config(config, **({"evaluation": {"every": None}} if config.evaluation else {}))
    return {
        rule: ArmRun(
            f"selection arm {rule}",
            folder / rule.replace(" ", "-"),
            base.model_copy(update={"horizon": FullHorizon(max_tokens=max_tokens), "selection": selection}),
        )
        for rule, selection in rules(tokens).items()
    }


def _load(config: Config) -> Loaded:
    return load(config, Runtime.start(config.training.device)).shared()
