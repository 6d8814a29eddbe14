"""The part of the schema that says where rollouts stop: one section per horizon policy, and what probes may ask.

Sources and formulas: docs/explanation/horizons/. Lengths are completion tokens. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from headstart.config.section import Count, Section, Share

PRESETS = {"code": 50, "math": 100, "tools": 150}
"""Horizons of the paper's three kinds of task (arXiv 2605.27028)."""

Grid = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class _Horizon(Section):
    @property
    def longest(self) -> int | None:
        """Longest rollout (tokens) that the policy can ask for; None where only a custom policy knows."""
        tokens: int | None = getattr(self, "max_tokens", None) or getattr(self, "tokens", None)
        return tokens


class _Bounded(_Horizon):
    min_tokens: PositiveInt = 16
    """Shortest horizon the policy may choose."""
    max_tokens: PositiveInt = 3584
    """Longest horizon the policy may choose."""


class FixedHorizon(_Horizon):
    type: Literal["fixed"] = "fixed"
    tokens: PositiveInt = 100
    """Completion tokens sampled per rollout (the paper: 100; code 50, function calling 150)."""
    preset: Literal["code", "math", "tools"] | None = None
    """Takes the paper's horizon for this kind of task in place of tokens."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        # The number itself is kept in tokens, so that everything else reads one field.
        if isinstance(data, dict) and "tokens" not in data and data.get("preset") in PRESETS:
            return {**data, "tokens": PRESETS[data["preset"]]}
        return data


class FractionHorizon(_Bounded):
    type: Literal["fraction"] = "fraction"
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Horizon as a share of the student's median length, which is measured once, on the first step (full rollouts)."""


class FullHorizon(_Horizon):
    type: Literal["full"] = "full"
    max_tokens: PositiveInt = 3584
    """Longest full rollout (the paper's baseline: 3,584)."""


class DiagnosedHorizon(_Horizon):
    type: Literal["diagnosed"] = "diagnosed"
    folder: Path | None = None
    """Folder of a finished `headstart diagnose`; null diagnoses at the start of the run, into its own folder."""
    max_tokens: PositiveInt = 3584
    """Longest rollout the diagnosis looks at, and the horizon where it supports no shorter one."""


class ProbedHorizon(_Bounded):
    type: Literal["damage", "recoverability"] = "damage"
    """damage: the smallest N with D(N) >= target. recoverability: the largest N with R(N) >= target * R(0)."""
    tokens: PositiveInt = 100
    """Horizon until the first probes."""
    target: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Share of the damage that is to be done within the horizon, or of R(0) that is to be left at its end."""
    grid: Grid | None = None
    """Horizons to choose from; null doubles from min_tokens up to max_tokens."""
    memory: PositiveInt = 64
    """Most recent probed problems that a decision is based on."""


class MixedHorizon(_Horizon):
    type: Literal["mixed"] = "mixed"
    tokens: PositiveInt = 100
    """Horizon of most steps."""
    max_tokens: PositiveInt = 3584
    """Horizon of the others, which also train what the short ones never reach."""
    every: Annotated[int, Field(ge=2)] = 5
    """Interval k: every k-th step is long; weighted, each step is long with probability 1 / k."""
    weighted: bool = False
    """Weight positions past tokens by every: the expected loss is that of full rollouts. Needs denominator sum."""


class RouletteHorizon(_Horizon):
    type: Literal["roulette"] = "roulette"
    tokens: PositiveInt = 100
    """Shortest horizon; every step reaches it."""
    max_tokens: PositiveInt = 3584
    """Longest horizon."""
    exponent: PositiveFloat = 1.0
    """A draw reaches t > tokens with probability (tokens / t) ** exponent."""
    weighted: bool = False
    """Weight position t by 1 / P(H >= t): the expected loss is that of full rollouts. Needs denominator sum."""


class ScheduledHorizon(_Horizon):
    type: Literal["scheduled"] = "scheduled"
    shape: Literal["linear", "steps", "exponential"] = "steps"
    """How the horizon grows from tokens to max_tokens."""
    tokens: PositiveInt = 256
    """Horizon of the first step."""
    max_tokens: PositiveInt = 3584
    """Longest horizon."""
    steps: PositiveInt | None = None
    """Training steps that linear and exponential growth takes; null is the whole run."""
    increment: PositiveInt = 256
    """Tokens that shape steps adds at a time."""
    every: PositiveInt = 10
    """Training steps between two additions of shape steps."""
    gate: Literal["recoverability", "overlap"] | None = None
    """Growth also needs this reading at the new edge and a clean stop audit, else it holds or shrinks; null is none."""
    threshold: Share = 0.9
    """Recoverability: R(N) as a share of R(0). Overlap: mean overlap of the two top-16 sets at the new edge."""


class OverlapHorizon(_Bounded):
    type: Literal["overlap"] = "overlap"
    tokens: PositiveInt = 100
    """Horizon of the first step."""
    threshold: Share = 0.5
    """A position drifts when less than this share of the two models' top-16 sets is common."""
    decay: Share = 0.9
    """Each drifting position multiplies the weight of all later ones by this."""
    slack: Annotated[float, Field(gt=1.0)] = 1.25
    """The horizon moves towards the mean effective length times this, so it grows where nothing drifts."""
    rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """How fast it moves: share of the way in a step."""


class KLCoverageHorizon(_Bounded):
    type: Literal["kl_coverage"] = "kl_coverage"
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.45
    """Horizon: the first tokens that hold this share of all divergence on the first step (full rollouts)."""


class CustomHorizon(_Horizon):
    type: Literal["custom"] = "custom"
    path: str = Field(examples=["my_package.horizons:MyHorizon"])
    """Your class, as package.module:Name; it must fit headstart.interfaces.HorizonPolicy."""
    arguments: dict[str, Any] = {}
    """Keyword arguments it is made with; an argument max_tokens is taken for its longest rollout."""

    @property
    def longest(self) -> int | None:
        tokens = self.arguments.get("max_tokens")
        return tokens if isinstance(tokens, int) else None


Horizon = Annotated[
    FixedHorizon
    | FullHorizon
    | FractionHorizon
    | DiagnosedHorizon
    | ProbedHorizon
    | MixedHorizon
    | RouletteHorizon
    | ScheduledHorizon
    | OverlapHorizon
    | KLCoverageHorizon
    | CustomHorizon,
    Field(discriminator="type"),
]


class ProbesConfig(Section):
    every: Count | None = None
    """Steps between long probes, the first step included; 0 never; null is 50 where the horizon needs them, else 0."""
    prompts: PositiveInt = 16
    """Rollouts of the step that a probe finishes, over all ranks together."""
    max_tokens: PositiveInt | None = None
    """Longest finished rollout; null is horizon.max_tokens, else 3,584."""
    label_free: bool = False
    """Judge by agreement with the teacher's own majority answer (diagnosis.votes) instead of reference answers."""


def needs_probes(horizon: Horizon) -> bool:
    """Whether the policy cannot work without long probes."""
    return isinstance(horizon, ProbedHorizon) or (isinstance(horizon, ScheduledHorizon) and horizon.gate is not None)


def is_graded(horizon: Horizon) -> bool:
    """Whether the policy's probes need graded responses."""
    return needs_probes(horizon) and not (isinstance(horizon, ScheduledHorizon) and horizon.gate == "overlap")


def problems_of(horizon: Horizon, probes: ProbesConfig) -> Iterator[str]:
    """What is wrong with these two sections together, one line each."""
    if isinstance(horizon, FixedHorizon) and horizon.preset and horizon.tokens != PRESETS[horizon.preset]:
        yield (
            f"horizon.tokens: found {horizon.tokens}, but horizon.preset {horizon.preset} is "
            f"{PRESETS[horizon.preset]}; leave out one of them"
        )
    low, high = getattr(horizon, "min_tokens", 1), getattr(horizon, "max_tokens", None)
    first = getattr(horizon, "tokens", low)
    if high is not None and low > high:
        yield f"horizon.max_tokens: found {high}, less than horizon.min_tokens={low}; raise it"
    elif high is not None and not low <= first <= high:
        yield f"horizon.tokens: found {first}, not between {low} and horizon.max_tokens={high}; set it in between"
    if needs_probes(horizon) and probes.every == 0:
        yield f"probes.every: found 0, but horizon {horizon.type} goes by probes; leave it out or set it above 0"
    if probes.every and probes.max_tokens is None and horizon.longest is None:
        yield "probes.max_tokens: found null, and this custom horizon has no argument max_tokens; set it"
