"""The horizon of a run: as configured, as a diagnosis recommends it, or the user's own policy."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headstart.assemble.pair import Pair
from headstart.assemble.plugins import HORIZON_METHODS, load_plugin
from headstart.config import loader
from headstart.config.horizon import (
    CustomHorizon,
    DiagnosedHorizon,
    FixedHorizon,
    FractionHorizon,
    FullHorizon,
    KLCoverageHorizon,
    MixedHorizon,
    OverlapHorizon,
    ProbedHorizon,
    RouletteHorizon,
    ScheduledHorizon,
    is_graded,
    needs_probes,
)
from headstart.config.models import IN_MEMORY
from headstart.config.schema import Config
from headstart.diagnosis.measure import Listener
from headstart.diagnosis.probes import DecayProbe
from headstart.diagnosis.recommend import FORMAT
from headstart.diagnosis.run import ProbeQuestions, diagnose_pair, response_tokens
from headstart.distillation.step_probe import ProbeSchedule
from headstart.errors import ConfigError, DataError, RunFolderError
from headstart.files import locked
from headstart.horizon import fixed
from headstart.horizon.fixed import DrawnHorizon
from headstart.horizon.measured import OverlapBudget, measured_once
from headstart.horizon.probed import ProbedPolicy
from headstart.horizon.scheduled import ScheduledPolicy
from headstart.interfaces import HorizonPolicy, Probe, TokenFactors
from headstart.models.sharded import led
from headstart.records import Problem, Rollout
from headstart.tasks.training import training_task, usable
from headstart.train.signals import interruptible

EVERY = 50
"""Steps between the probes of a policy that cannot do without."""


def make_horizon(config: Config) -> HorizonPolicy | None:
    """The horizon policy; None where the run has to diagnose itself first."""
    h = config.horizon
    match h:
        case FixedHorizon(tokens=tokens) | FullHorizon(max_tokens=tokens):
            return fixed.FixedHorizon(tokens)
        case DiagnosedHorizon(folder=folder):
            return None if folder is None else fixed.FixedHorizon(stored_horizon(config, folder))
        case FractionHorizon() | KLCoverageHorizon():
            return measured_once(h)
        case ProbedHorizon():
            return ProbedPolicy(h)
        case MixedHorizon() | RouletteHorizon():
            return DrawnHorizon(h, config.training.seed)
        case ScheduledHorizon():
            return ScheduledPolicy(h, config.legs[0])  # an extended run stays where the plan ended
        case OverlapHorizon():
            return OverlapBudget(h)
        case CustomHorizon(path=path, arguments=arguments):
            policy: HorizonPolicy = load_plugin(path, arguments, "horizon.path", HORIZON_METHODS)
            return policy


def loss_side(policy: HorizonPolicy | None) -> TokenFactors | None:
    """The policy again where it also weighs tokens; a custom one does so by having `signals` and `factors`."""
    if isinstance(policy, DrawnHorizon) and not policy.config.weighted:
        return None
    factors: Any = policy
    if not (hasattr(policy, "signals") and callable(getattr(policy, "factors", None))):
        return None
    unknown = set(factors.signals) - {"gap", "margin"}
    if unknown:
        raise ConfigError(
            f"horizon.path: {type(policy).__name__}.signals has {', '.join(sorted(unknown))}; choose gap or margin"
        )
    found: TokenFactors = factors
    return found


def probe_every(config: Config) -> int:
    """Steps between long probes; 0 for none."""
    every = config.probes.every
    return (EVERY if needs_probes(config.horizon) else 0) if every is None else every


def probe_tokens(config: Config) -> int:
    """The longest response of a probe."""
    return config.probes.max_tokens or config.horizon.longest or FullHorizon().max_tokens


def make_prober(
    config: Config, pair: Pair, problems: Sequence[Problem]
) -> Callable[[int, list[Rollout]], Probe | None]:
    """Opens the probes of a run. `problems` are those it trains on; only usable answers are judged.

    Raises DataError where a policy judges responses and no answer can be used.
    """
    every, d, free = probe_every(config), config.diagnosis, config.probes.label_free
    if not every:
        return lambda step, rollouts: None
    judged = {problem.id: problem for problem in problems if free or usable(config.prompts, problem, d.grader)}
    if is_graded(config.horizon) and not judged:
        raise DataError(
            f"none of {len(problems)} answers in prompts.answer_column={config.prompts.answer_column!r} can be used by "
            f"diagnosis.grader={d.grader!r}; set another grader, or probes.label_free true"
        )
    base = DecayProbe(
        task=training_task(config, len(problems)),
        problems=(),
        prompts=(),
        student=pair.engine("student"),
        teacher=pair.engine("teacher"),
        tokenizer=pair.tokenizer,
        aligner=pair.vocabulary.aligner,
        sampling=config.rollout.sampling,
        max_tokens=probe_tokens(config),
        batch_size=d.batch_size,
        seed=config.training.seed,
    )
    return ProbeSchedule(pair, base, judged, every, config.probes.prompts, d.votes if free else 0, d.grader).open


def stored_horizon(config: Config, folder: Path) -> int:
    """The horizon that the diagnosis in `folder` recommends to this run: a warning, and `horizon.max_tokens`, where it
    supports no short one; another warning where it is of another pair.

    Raises RunFolderError when there is no (readable) recommendation.
    """
    assert isinstance(config.horizon, DiagnosedHorizon)
    longest = config.horizon.max_tokens
    advice = _read_recommendation(folder)
    source = folder / "config.yaml"
    other = loader.load(source) if source.exists() else config
    for who in ("student", "teacher"):
        theirs, ours = (getattr(c, who).path.removesuffix(f", {IN_MEMORY}") for c in (other, config))
        if theirs != ours:
            warnings.warn(
                f"horizon.folder: {folder} diagnosed the {who} {theirs}, but this run's is {ours}; diagnose this pair, "
                "or set horizon {type: fixed} if you mean it",
                stacklevel=2,
            )
    if not advice["supported"]:
        warnings.warn(
            f"{advice['sentence']} So rollouts of this run have up to horizon.max_tokens={longest:,} tokens; set "
            "horizon {type: fixed} for a shorter one",
            stacklevel=2,
        )
    return min(int(advice["tokens"] or longest), longest)


def _read_recommendation(folder: Path) -> dict[str, Any]:
    path = folder / "diagnose" / "recommendation.json"
    if not path.is_file():
        raise RunFolderError(
            f"{path} does not exist: {folder} holds no finished diagnosis. Make it with headstart diagnose RUN.yaml "
            f"--out {folder}, or leave horizon.folder out to diagnose at the start of the run"
        )
    try:
        advice: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = advice["format"] == FORMAT and {"supported", "tokens", "sentence"} <= advice.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); delete it and diagnose again") from error
    if not known:
        raise RunFolderError(
            f"{path} has format {advice['format']!r}, and this version reads format {FORMAT}; diagnose again"
        )
    return advice


def diagnosed_horizon(pair: Pair, questions: ProbeQuestions, folder: Path | None, say: Callable[[str], None]) -> int:
    """The horizon of a run that diagnoses itself: rank 0 does it, into the run's `folder`, once; all ranks get the
    number. A resumed run reads what it chose before."""

    def choose() -> int:
        assert folder is not None
        if not (folder / "diagnose" / "recommendation.json").exists():
            say("diagnosing where this run should stop (headstart diagnose) ...")
            with locked(folder / "diagnose"), interruptible():
                found = diagnose_pair(pair, questions, response_tokens(pair, questions), folder, Listener(say=say))
            say(found.recommendation.sentence)
        tokens = stored_horizon(pair.config, folder)
        say(f"horizon: {tokens} tokens, by the diagnosis in {folder / 'diagnose'}")
        return tokens

    return led(pair.runtime, (pair.student, pair.teacher), choose)
