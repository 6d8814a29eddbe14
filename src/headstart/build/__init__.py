"""The one room that knows every class: a configuration becomes a run."""

from headstart.build.diagnosis import diagnose
from headstart.build.evaluation import evaluate, evaluate_responses
from headstart.build.explanation import explain
from headstart.build.pair import load_pair
from headstart.build.pilot import run_pilot
from headstart.build.preflight import run_preflight
from headstart.build.tasks import load_questions, make_task
from headstart.build.training import build, distill

__all__ = [
    "build",
    "diagnose",
    "distill",
    "evaluate",
    "evaluate_responses",
    "explain",
    "load_pair",
    "load_questions",
    "make_task",
    "run_pilot",
    "run_preflight",
]
