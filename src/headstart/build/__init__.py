"""The one room that knows every class: a configuration becomes a run."""

from headstart.build.evaluation import evaluate, evaluate_responses
from headstart.build.pair import load_pair
from headstart.build.tasks import load_questions, make_task
from headstart.build.training import build, distill

__all__ = ["build", "distill", "evaluate", "evaluate_responses", "load_pair", "load_questions", "make_task"]
