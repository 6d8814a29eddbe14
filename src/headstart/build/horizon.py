"""The horizon of a run: as configured, as a diagnosis recommends it, or the user's own policy."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headstart.build.diagnosis import ProbeQuestions, diagnose_pair, response_tokens
from headstart.build.plugins import HORIZON_METHODS, load_plugin
from headstart.config import loader
from headstart.config.schema import Config, CustomHorizon, DiagnosedHorizon, FixedHorizon, FullHorizon
from headstart.diagnose.measure import Listener
from headstart.diagnose.pair import Pair
from headstart.diagnose.recommend import FORMAT
from headstart.errors import RunFolderError
from headstart.horizon import fixed
from headstart.interfaces import HorizonPolicy


def make_horizon(config: Config) -> HorizonPolicy | None:
    """The horizon policy; None where the run has to diagnose itself first."""
    match config.horizon:
        case FixedHorizon(tokens=tokens) | FullHorizon(max_tokens=tokens):
            return fixed.FixedHorizon(tokens)
        case DiagnosedHorizon(folder=folder):
            return None if folder is None else fixed.FixedHorizon(stored_horizon(config, folder))
        case CustomHorizon(path=path, arguments=arguments):
            policy: HorizonPolicy = load_plugin(path, arguments, "horizon.path", HORIZON_METHODS)
            return policy


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
        theirs, ours = getattr(other, who).path, getattr(config, who).path
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
    """The horizon of a run that diagnoses itself: rank 0 does it, into the run's `folder`, once; all ranks hear the
    number. A resumed run reads what it chose before."""
    tokens = 0
    if folder is not None:
        if not (folder / "diagnose" / "recommendation.json").exists():
            say("diagnosing where this run should stop (headstart diagnose) ...")
            found = diagnose_pair(pair, questions, response_tokens(pair, questions), folder, Listener(say=say))
            say(found.recommendation.sentence)
        tokens = stored_horizon(pair.config, folder)
        say(f"horizon: {tokens} tokens, by the diagnosis in {folder / 'diagnose'}")
    return int(pair.runtime.gather(tokens)[0])
