"""The trackers of a run, opened once its folder holds what it starts from, and the judge of the samples they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headstart.checks.findings import Preflight
from headstart.checks.run import write_preflight
from headstart.config.schema import Config
from headstart.errors import HeadstartError
from headstart.files import write_json
from headstart.interfaces import Tracker
from headstart.models.collate import completion_text
from headstart.records import Problem, Rollout
from headstart.tasks.training import training_task, usable
from headstart.tracking import ClientTracker, ConsoleTracker, FanTracker, JsonlTracker, TensorBoardTracker
from headstart.train.folder import RunFolder
from headstart.train.inputs import Inputs


def opened(
    config: Config, folder: RunFolder | None, preflight: Preflight, record: Inputs, console: ConsoleTracker
) -> Tracker:
    """The run's trackers, once the run folder holds what the run starts from; a failure leaves no folder behind."""
    try:
        if folder is not None:
            write_preflight(folder.path, preflight)
            write_json(folder.path / "inputs.json", record.model_dump(mode="json"))
        return _tracker(config, folder, console)
    except BaseException:
        if folder is not None:
            folder.abandon()
        raise


def _tracker(config: Config, folder: RunFolder | None, console: ConsoleTracker) -> Tracker:
    if folder is None:
        return FanTracker([])
    t, settings = config.tracking, config.model_dump(mode="json")
    trackers: list[Tracker] = [console, JsonlTracker(folder.metrics)]
    if t.tensorboard:
        trackers.append(TensorBoardTracker(folder.path / "tensorboard"))
    if t.wandb is not None:
        trackers.append(ClientTracker("wandb", project=t.wandb, config=settings, dir=str(folder.path)))
    if t.trackio is not None:
        trackers.append(ClientTracker("trackio", project=t.trackio, config=settings))
    return FanTracker(trackers)


_WORDS = {"correct": "right", "no_answer": "no answer", "bad_gold": ""}
_OF_CUT = {"wrong": "already wrong", "clean": "right so far"}


def make_judge(config: Config, problems: Sequence[Problem], tokenizer: Any) -> Callable[[Rollout], str]:
    """`SampleRollout.verdict` of a rollout; empty where nothing can grade it. One cut at the horizon is unfinished, not
    wrong, unless the task can tell."""
    known = {problem.id: problem for problem in problems}
    task = training_task(config, len(problems))

    def judge(rollout: Rollout) -> str:
        problem = known[rollout.prompt.problem_id]
        if len(known) < len(problems) or not usable(config.prompts, problem, config.diagnosis.grader):
            return ""
        text = completion_text(tokenizer, rollout)
        try:
            state = "finished" if rollout.stopped else task.prefix_state(problem, text)
            if state != "finished":
                return _OF_CUT.get(state, "unfinished")
            status = task.grade(problem, text).status
        except HeadstartError:  # such as no sandbox for programs: the training needs none
            return ""
        return _WORDS.get(status, status)

    return judge
