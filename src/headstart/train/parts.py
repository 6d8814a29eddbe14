"""Everything a run is made of, assembled by `headstart.distillation` and used by the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headstart.config.schema import Config
from headstart.interfaces import Evaluator, HorizonPolicy, Probe, RolloutEngine, Teacher, TokenFactors, Tracker
from headstart.losses.selection import EVERY_TOKEN, Selector
from headstart.models.causal import CausalModel
from headstart.models.vocabulary import SharedVocabulary
from headstart.ranks.runtime import Runtime
from headstart.records import EvalReport, Prompt, Rollout
from headstart.train.folder import RunFolder
from headstart.train.micro import Budget


@dataclass(frozen=True, slots=True)
class Parts:
    """One run, ready to start."""

    config: Config
    runtime: Runtime
    folder: RunFolder | None
    """None on ranks other than 0, which write nothing."""
    prompts: tuple[Prompt, ...]
    vocabulary: SharedVocabulary
    student: CausalModel
    teacher: Teacher
    engine: RolloutEngine
    horizon: HorizonPolicy
    optimizer: torch.optim.Optimizer
    evaluator: Evaluator | None
    tracker: Tracker
    decode: Callable[[tuple[int, ...]], list[str]]
    """Token ids -> one string per token, for the saved sample rollouts."""
    export: Callable[[Any, Path, int, EvalReport | None], None]
    """Write the final model, whole, into a folder, given the generated tokens and the last evaluation."""
    judge: Callable[[Rollout], str] = lambda rollout: ""
    """What a saved sample rollout is worth, in a word or two (`SampleRollout.verdict`)."""
    selector: Selector = EVERY_TOKEN
    """Which sampled tokens are trained; all by default."""
    factors: TokenFactors | None = None
    """The loss side of the horizon, where it has one."""
    reads_overlap: bool = False
    """Whether the horizon goes by the overlap of both models' top tokens at every sampled position."""
    prober: Callable[[int, list[Rollout]], Probe | None] = lambda step, rollouts: None
    """Opens a probe on the rollouts of a step, where one is due."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What the figures of an evaluation depend on, beside the weights; JSON."""
    budget: Budget = field(default_factory=Budget)
    """What a micro-batch may take of the memory."""
