"""The schema of a study: one base run, arms that change a knob each, seeds, and what they are compared at."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from headstart.config.evaluation import TaskConfig
from headstart.config.section import Section, Share


def slug(name: str) -> str:
    """An arm's name as a folder."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", name).strip("-.") or "arm"


_Seeds = Annotated[tuple[int, ...], Field(min_length=1)]


class StudyTuning(Section):
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)] = Field(examples=[[1e-4, 3e-4, 1e-3]])
    """Learning rates that every arm tries, so that each has the same budget; the run's own steps each."""
    task: TaskConfig = Field(examples=[{"type": "tiny", "split": "dev"}])
    """Development problems that choose the rate and the checkpoint; never those that are reported."""
    seeds: _Seeds = (1000,)
    """Seeds of the trial runs, apart from those of the study."""


class StudyBudgets(Section):
    steps: tuple[PositiveInt, ...] = ()
    """Optimizer steps to compare at; empty takes the most that every run reached."""
    tokens: tuple[PositiveInt, ...] = ()
    """Generated tokens to compare at; empty takes the most that every run reached."""
    seconds: tuple[PositiveFloat, ...] = ()
    """Seconds of training to compare at; empty takes the most that every run reached."""


class StudyConfig(Section):
    """A whole study."""

    question: str = ""
    """The question of the study, in a sentence; the title of its page."""
    base: str | dict[str, Any] = Field(examples=["recipe:tiny-esr"])
    """The run that all arms share: a configuration, or the path of its YAML file."""
    arms: dict[str, dict[str, Any]] = Field(examples=[{"N = 16": {"horizon.tokens": 16}, "full": {"horizon": {}}}])
    """Name of each arm and what it changes: dotted keys of the base with their values."""
    reference: str | None = None
    """The arm that the others are tested against; null is the first."""
    seeds: _Seeds = (0, 1, 2)
    """Every arm runs once with each; runs with equal seeds see the same prompts."""
    tuning: StudyTuning | None = None
    """How each arm's learning rate and checkpoint are chosen; null keeps the arm's own rate and its last step."""
    budgets: StudyBudgets = StudyBudgets()
    """Costs at which the arms are compared."""
    target: Share | None = None
    """Accuracy whose cost is reported; null is one standard error below the reference's last accuracy."""

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        problems = []
        if len(self.arms) < 2:
            problems.append(f"arms: found {len(self.arms)}; a comparison needs at least two")
        folders = {slug(name): name for name in reversed(self.arms)}
        clashes = [(folders[slug(name)], name) for name in self.arms if folders[slug(name)] != name]
        problems += [f"arms: {first} and {second} would share a folder; rename one" for first, second in clashes]
        if self.reference is not None and self.reference not in self.arms:
            close = get_close_matches(self.reference, self.arms, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f'reference: found "{self.reference}"; allowed: {", ".join(self.arms)}{hint}')
        trials = self.tuning.seeds if self.tuning else ()
        for name, seeds in (("seeds", self.seeds), ("tuning.seeds", trials)):
            if len(set(seeds)) < len(seeds):
                problems.append(f"{name}: found {list(seeds)}; a seed that stands twice is no second run")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def first(self) -> str:
        """The reference arm."""
        return self.reference or next(iter(self.arms))
