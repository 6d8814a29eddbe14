"""Resuming a run with other settings than it was started with: more steps, above all."""

from __future__ import annotations

import re
from collections.abc import Sequence

from headstart.config import loader
from headstart.config.render import resolved
from headstart.config.schema import Config
from headstart.errors import CheckpointError, ConfigError
from headstart.files import write_atomic
from headstart.train.folder import RunFolder, truncate_metrics
from headstart.train.loop import RunResult, finished


def resumed_config(place: RunFolder, overrides: Sequence[str]) -> Config:
    """The run's configuration with `overrides` on top. Steps that `training.steps=400` or `training.steps=+200` adds
    are a leg of their own: the learning rate of the steps that were planned stays as it was.

    Raises ConfigError for fewer steps, and for a change of a complete run that adds none.
    """
    config = loader.load(place.require().config)
    complete, steps, texts = place.model.exists(), config.training.steps, list(overrides)
    for at, text in enumerate(texts):
        if found := re.fullmatch(r"\s*training\.steps\s*=\s*(\+?)(\d+)\s*", text):
            total = int(found[2]) + (steps if found[1] else 0)
            if found[1] and not complete:
                raise ConfigError(
                    f"{text}: steps are added to a complete run, and {place.path} is still on its way to step {steps}; "
                    f"finish it with --resume {place.path}, or write how many steps it shall have in all"
                )
            if total < steps:
                raise ConfigError(f"{text}: the run is of {steps} steps and can only be extended; write +200 for more")
            texts[at] = f"training.steps={total}"
            if total > steps:
                texts.append(f"schedule.restarts={[*config.schedule.restarts, steps]}")
    made = loader.load(place.config, texts)
    if complete and made != config and made.training.steps == steps:
        raise ConfigError(
            f"the run in {place.path} is complete, so {', '.join(overrides)} would change nothing; only more steps "
            "extend it: training.steps=+200"
        )
    return made


def complete(place: RunFolder, steps: int) -> tuple[RunResult, str]:
    """What a complete run left, and the words that say that it is left as it is."""
    result, more = finished(place, steps), ""
    if steps > (at := result.progress.step):
        more = f". To train on to step {steps}, put training.steps back to {at} in config.yaml and resume with "
        more += f"training.steps={steps}"
    return result, f"the run in {place.path} is complete: its model is in {place.model}; nothing to resume{more}"


def check_reach(place: RunFolder, steps: int, reached: int | None, extends: bool) -> None:
    """Raise CheckpointError where the newest checkpoint, of step `reached`, is nothing to continue from."""
    if extends and reached is None:
        raise CheckpointError(
            f"{place.checkpoints} holds no checkpoint to extend the run from; start a new run from its model with "
            f"student.path={place.model}"
        )
    if (reached or 0) > steps:
        raise CheckpointError(
            f"the newest checkpoint in {place.checkpoints} is of step {reached}, but config.yaml asks for "
            f"training.steps={steps}; set {reached} or more, or start a new run with --out"
        )


def rewrite(place: RunFolder, config: Config, reached: int) -> list[str]:
    """Make the folder that of `config` from step `reached` on; returns what is to be said of it.

    The model is moved first: a kill between the two leaves the run as it was, its model to be written again.
    """
    notes, old = [], loader.load(place.config)
    if dropped := truncate_metrics(place.metrics, reached):
        notes.append(f"metrics.jsonl: {dropped} lines dropped that come after step {reached} or cannot be read")
    if place.model.exists():
        kept = place.keep_model(old.training.steps)
        notes.append(f"the model of step {old.training.steps} is kept in {kept}")
    if config.legs != old.legs:
        notes.append(last_leg(config))
    if config != old:
        write_atomic(place.config, resolved(config))
    return notes


def last_leg(config: Config) -> str:
    """What the schedule does in the steps that were added last."""
    first, last = (0, *config.legs)[-2:]
    kind, warmup = config.schedule.type, round(config.schedule.warmup * (last - first))
    rate = f"the learning rate stays at {config.learning_rate:g}"
    if kind != "constant":
        rate = f"warm-up over {warmup} of them to {config.learning_rate:g} again, then {kind} to zero"
    return f"extended: steps {first + 1} to {last} are a leg of their own: {rate}"
