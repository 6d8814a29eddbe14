"""Headstart: on-policy distillation that knows where to stop.

Everything a user needs is here; importing the package loads no torch, and each name loads what it needs when it is
first used. `docs/reference/python.md` shows each of them in use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from headstart.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HeadstartError,
    Interrupted,
    MemoryBudgetError,
    ModelError,
    NonFiniteError,
    RunFolderError,
    SandboxError,
    ServerError,
    TemplateError,
    VocabularyError,
)
from headstart.version import __version__

if TYPE_CHECKING:
    from headstart.assemble.pair import Pair
    from headstart.checks.run import run_preflight as preflight
    from headstart.config.loader import load as load_config
    from headstart.config.schema import Config
    from headstart.diagnosis.run import diagnose
    from headstart.distillation.run import distill
    from headstart.evaluation.run import evaluate
    from headstart.explanation.run import explain
    from headstart.interfaces import (
        Evaluator,
        HorizonPolicy,
        LogitSource,
        OnProgress,
        RolloutEngine,
        Task,
        Teacher,
        TokenFactors,
        Tracker,
    )
    from headstart.losses.functions import chunked_divergence, forward_kl, jsd, reverse_kl
    from headstart.records import Problem, Prompt, Rollout, Sampling, Verdict
    from headstart.reports.contents import report
    from headstart.study.pilot import run_pilot as pilot
    from headstart.study.run import compare

_ELSEWHERE = {
    "Config": "config.schema",
    "load_config": "config.loader:load",
    "Pair": "assemble.pair",
    "distill": "distillation.run",
    "diagnose": "diagnosis.run",
    "preflight": "checks.run:run_preflight",
    "pilot": "study.pilot:run_pilot",
    "evaluate": "evaluation.run",
    "explain": "explanation.run",
    "compare": "study.run",
    "report": "reports.contents",
    **dict.fromkeys(("reverse_kl", "forward_kl", "jsd", "chunked_divergence"), "losses.functions"),
    **dict.fromkeys(("Problem", "Prompt", "Rollout", "Sampling", "Verdict"), "records"),
    **dict.fromkeys(("Task", "Teacher", "RolloutEngine", "LogitSource", "HorizonPolicy"), "interfaces"),
    **dict.fromkeys(("TokenFactors", "Evaluator", "Tracker", "OnProgress"), "interfaces"),
}
"""Where a public name is defined, as `module` or `module:name`."""

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "Evaluator",
    "HeadstartError",
    "HorizonPolicy",
    "Interrupted",
    "LogitSource",
    "MemoryBudgetError",
    "ModelError",
    "NonFiniteError",
    "OnProgress",
    "Pair",
    "Problem",
    "Prompt",
    "Rollout",
    "RolloutEngine",
    "RunFolderError",
    "Sampling",
    "SandboxError",
    "ServerError",
    "Task",
    "Teacher",
    "TemplateError",
    "TokenFactors",
    "Tracker",
    "Verdict",
    "VocabularyError",
    "__version__",
    "chunked_divergence",
    "compare",
    "diagnose",
    "distill",
    "evaluate",
    "explain",
    "forward_kl",
    "jsd",
    "load_config",
    "pilot",
    "preflight",
    "report",
    "reverse_kl",
]


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}")
    module, _, own = _ELSEWHERE[name].partition(":")
    value = getattr(import_module(f"headstart.{module}"), own or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
