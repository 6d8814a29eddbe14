"""A task of one's own: problems of both bundled worlds, with the accuracy on each beside that on both.

evaluation:
  task: {type: custom, path: "examples.both_worlds:BothWorlds", arguments: {split: test, size: 48}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headstart.records import PrefixState, Problem, Verdict
from headstart.tasks.late import WORLDS


class BothWorlds:
    """The first `size` problems of a split of each world; fits `headstart.interfaces.Task`."""

    name = "both worlds"
    max_tokens = 270
    """A right response of the late world has 119 to 259."""

    def __init__(self, split: str, size: int) -> None:
        self._tasks = {name: world(split, size) for name, world in WORLDS.items()}

    def problems(self) -> Sequence[Problem]:
        return [replace(p, meta={"world": name}) for name, task in self._tasks.items() for p in task.problems()]

    def grade(self, problem: Problem, response: str) -> Verdict:
        return self._tasks[problem.meta["world"]].grade(problem, response)

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        return self._tasks[problem.meta["world"]].prefix_state(problem, prefix)
