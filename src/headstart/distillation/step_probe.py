"""Probes inside a training run: a few of a step's own rollouts, finished by the student and continued by the teacher.

The student has not yet learned from the step's prompts in this step: with more prompts than the run uses they are as
good as held out. Nothing is generated before it is asked for, and nothing twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from headstart.assemble.pair import Pair
from headstart.diagnosis.positions import read_tokens
from headstart.diagnosis.probes import DecayProbe, vote, with_references
from headstart.models.sharded import alone
from headstart.records import Continuations, LongReadings, Problem, Rollout
from headstart.stats import by_position
from headstart.streams import derive_seed


@dataclass(frozen=True, slots=True)
class ProbeSchedule:
    """Opens a probe every `every` steps on `prompts` rollouts over all ranks.

    `base` is a probe without problems; `problems` are the training problems that can be graded, by id. `votes` asks for
    the teacher's majority answer instead (0: reference answers), read by `grader`.
    """

    pair: Pair
    base: DecayProbe
    problems: Mapping[str, Problem]
    every: int
    prompts: int
    votes: int
    grader: str

    def open(self, step: int, rollouts: Sequence[Rollout]) -> StepProbe | None:
        """The probe of a step (from 0); None where none is due."""
        if step % self.every:
            return None
        ranks = self.pair.runtime.world_size
        share = -(-(self.prompts - self.pair.runtime.rank) // ranks)
        firsts = [r for r in rollouts if r.sample_index == 0][: max(share, 0)]
        return StepProbe(self, derive_seed(self.base.seed, "probe", step), firsts)


@dataclass
class StepProbe:
    """One open probe; fits `interfaces.Probe`. `rollouts` are this rank's, `tokens` what was generated for it."""

    schedule: ProbeSchedule
    seed: int
    rollouts: Sequence[Rollout]
    tokens: int = 0
    asked: dict[int, Continuations] = field(default_factory=dict)

    @cached_property
    def _probe(self) -> DecayProbe:
        """The step's problems at the indices that the rollouts' prompts name (their slots in the step)."""
        s = self.schedule
        slots = max((r.prompt.index for r in self.rollouts), default=-1) + 1
        problems = [Problem(id="", text="")] * slots
        for rollout in self.rollouts:
            problems[rollout.prompt.index] = s.problems.get(rollout.prompt.problem_id, problems[rollout.prompt.index])
        judged = [r.prompt for r in self.rollouts if r.prompt.problem_id in s.problems]
        probe = replace(s.base, problems=problems, prompts=judged, seed=self.seed, finished=self._count)
        return with_references(probe, vote(probe, s.votes, s.grader).answers) if s.votes else probe

    def _count(self, rollout: Rollout) -> None:
        self.tokens += len(rollout.completion_ids)

    @cached_property
    def _whole(self) -> list[Rollout]:
        """The probed rollouts, finished by the student."""
        return self._probe.finish("student", self.rollouts)

    @cached_property
    def _judged(self) -> list[tuple[Rollout, bool]]:
        """Those that can be graded, and whether they are right."""
        indices = {prompt.index for prompt in self._probe.prompts}
        mine = [rollout for rollout in self._whole if rollout.prompt.index in indices]
        return [(r, v.correct) for r, v in zip(mine, self._probe.grade(mine), strict=True)]

    def long(self) -> LongReadings:
        """See `interfaces.Probe`."""
        return self._long

    @cached_property
    def _long(self) -> LongReadings:
        with self._alone():
            lengths, stopped = [len(r.completion_ids) for r in self._whole], [r.stopped for r in self._whole]
            read = read_tokens(self.schedule.pair, self._whole) if self._whole else None
            mine = (lengths, stopped, *((read.position, read.divergence, read.overlap) if read else ()))
            ranks = [rank for rank in self.schedule.pair.runtime.gather(mine) if rank[0]]
        return LongReadings(*(np.concatenate(column) for column in zip(*ranks, strict=True)))

    def continuations(self, length: int) -> Continuations:
        """See `interfaces.Probe`."""
        if length not in self.asked:
            with self._alone():
                after = self._probe.finish("teacher", [rollout for rollout, _ in self._judged], length)
                both = zip(self._judged, self._probe.grade(after), strict=True)
                self.asked[length] = Continuations(*self._columns([(right, v.correct) for (_, right), v in both]))
        return self.asked[length]

    def teacher(self, length: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """See `interfaces.Probe`."""
        with self._alone():
            own = self._probe.respond("teacher", self._probe.prompts)
            again = self._probe.finish("teacher", [r.rollout for r in own], length, origin="teacher")
            both = zip(own, self._probe.grade(again), strict=True)
            return self._columns([(r.correct, v.correct) for r, v in both])

    def _alone(self) -> AbstractContextManager[None]:
        """Ranks have other rollouts, and other numbers of them."""
        return alone(self.schedule.pair.student, self.schedule.pair.teacher)

    def _columns(self, mine: list[tuple[bool, bool]]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """The pairs of all ranks, as two columns."""
        pairs = [pair for rank in self.schedule.pair.runtime.gather(mine) for pair in rank]
        return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)

    def metrics(self) -> dict[str, Any]:
        """See `interfaces.Probe`."""
        long = self.long()
        shares = {
            str(n): {"student": float(np.mean(c.student)), "teacher_after": float(np.mean(c.after)), "n": len(c.after)}
            for n, c in sorted(self.asked.items())
            if c.after
        }
        return {
            "probe_tokens": int(self.schedule.pair.runtime.sum(self.tokens)[0]),
            "probe_divergence_by_position": by_position(long.position_M, long.divergence_M),
            "probe_share_stopped": float(long.stopped_B.mean()),
            "probe_length_mean": float(long.lengths_B.mean()),
            "probe_continuations": shares,
        }
