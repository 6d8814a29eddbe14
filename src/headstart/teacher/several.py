"""Several teachers as one: each scores the rows that name it, or all of them score every row.

A teacher sees its own view of the prompt and its own tokens, and the student is compared with it over what the two
share. Teachers that do not fit into memory together are there one after the other: each is loaded for its part of a
step, leaves its hidden states, and only its head stays (docs/adr/0025-several-teachers.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from headstart.interfaces import LogitSource, Teacher
from headstart.losses.several import MixtureScores, SeveralScores, Share
from headstart.models.causal import CausalModel
from headstart.records import Aligned, Prompt, Rollout


@dataclass
class Visitor:
    """A model whose weights, but for its head, are on the device only while it is `present`. `load` gives them."""

    model: CausalModel
    load: Callable[[], Any]
    seconds: float = 0.0

    @contextmanager
    def present(self) -> Iterator[None]:
        start = time.perf_counter()
        loaded = dict(self.load().named_parameters())
        for name, parameter in self.model.model.named_parameters():
            parameter.data = loaded.pop(name).data
        self.seconds += time.perf_counter() - start
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """Drop all weights but the head's. What stands in their place has their shape and one number, NaN, so that a
        pass without them cannot go unnoticed."""
        kept = {id(parameter) for parameter in self.model.projection.parameters()}
        for parameter in self.model.model.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.new_full((1,), torch.nan).expand(parameter.shape)
        if self.model.decoder is not None:
            self.model.decoder.forget()

    def taken(self) -> float:
        """Seconds of loading since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass
class Member:
    """One of several teachers. `student` is the student cut to what it shares with this one; `horizon` bounds the
    rollouts that name it; `visitor` is there where its model is not, between its parts of steps."""

    name: str
    teacher: Teacher
    student: CausalModel
    weight: float = 1.0
    horizon: int | None = None
    visitor: Visitor | None = None
    nats: float = 0.0
    tokens: int = 0
    kept: dict[tuple[int, int], LogitSource] = field(default_factory=dict)
    """Scores of the micro-batches of a step, by their first rollout, where the model visits."""

    def own(self, rollouts: Sequence[Rollout]) -> list[tuple[int, Rollout]]:
        """Those that it scores, with their places, in its own view and (unless they name it alone) its own tokens."""
        found = []
        for place, rollout in enumerate(rollouts):
            for name, ids in rollout.prompt.views:
                if name == self.name:
                    mine = replace(rollout, prompt=replace(rollout.prompt, teacher_token_ids=ids))
                    if len(rollout.prompt.views) > 1:
                        (mine,) = self.teacher.align([replace(mine, aligned=None)])
                    found.append((place, mine))
        return found

    def scores(self, own: Sequence[tuple[int, Rollout]], prefill: Any) -> LogitSource:
        if self.visitor is None:
            return self.teacher.score([rollout for _, rollout in own], prefill)
        return self.kept[_key(own)]

    def seen(self, value_m: Tensor) -> None:
        self.nats += float(value_m.double().sum())
        self.tokens += len(value_m)


class SeveralTeachers(Teacher):
    """Fits `interfaces.Teacher`. With `mixed` the teachers, which then share the student's vocabulary, are one
    distribution; otherwise each is compared with by itself."""

    def __init__(self, members: Sequence[Member], *, mixed: bool = False) -> None:
        self.members = {member.name: member for member in members}
        self._mixed = mixed

    @property
    def models(self) -> tuple[CausalModel, ...]:
        return tuple(m.teacher.model for m in self.members.values() if m.teacher.model is not None)

    @property
    def visits(self) -> bool:
        return any(member.visitor is not None for member in self.members.values())

    @property
    def candidates(self) -> int:
        return max(member.teacher.candidates for member in self.members.values())

    def horizon(self, prompt: Prompt, tokens: int) -> int:
        """See `Teacher.horizon`."""
        bounds = [self.members[name].horizon for name, _ in prompt.views]
        return min([tokens, *(bound for bound in bounds if bound is not None)])

    def submit(self, rollout: Rollout) -> None:
        """See `Teacher.submit`."""
        for name, ids in rollout.prompt.views:
            own = replace(rollout, prompt=replace(rollout.prompt, teacher_token_ids=ids))
            self.members[name].teacher.submit(own)

    def ready(self, rollouts: Sequence[Rollout]) -> None:
        """See `Teacher.ready`."""
        for member in self.members.values():
            member.teacher.ready([rollout for _, rollout in member.own(rollouts)])

    def metrics(self) -> dict[str, float]:
        """See `Teacher.metrics`: the sum of the divergences from each teacher (`nats_NAME`) and over how many tokens
        (`tokens_NAME`), and what those elsewhere count."""
        found: dict[str, float] = {}
        for name, member in self.members.items():
            own = {f"nats_{name}": member.nats, f"tokens_{name}": float(member.tokens)} if not self._mixed else {}
            own |= {"seconds_teacher_loading": member.visitor.taken()} if member.visitor is not None else {}
            for key, count in (own | member.teacher.metrics()).items():
                found[key] = found.get(key, 0.0) + count
            member.nats, member.tokens = 0.0, 0
        return found

    def prefill(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """See `Teacher.prefill`; by teacher, without those that visit."""
        made = {}
        for member in self.members.values():
            views = [(prompt, ids) for prompt in prompts for name, ids in prompt.views if name == member.name]
            if views and member.visitor is None:
                own = [replace(prompt, teacher_token_ids=ids) for prompt, ids in views]
                made[member.name] = member.teacher.prefill(own)
        return made

    def align(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """See `Teacher.align`. What several teachers score is what any of them can."""
        return [self._aligned(rollout) for rollout in rollouts]

    def _aligned(self, rollout: Rollout) -> Rollout:
        own = []
        for name, ids in rollout.prompt.views:
            seen = replace(rollout, prompt=replace(rollout.prompt, teacher_token_ids=ids), aligned=None)
            own += [one.aligned for one in self.members[name].teacher.align([seen])]
        if len(own) == 1:
            return replace(rollout, aligned=own[0])
        known = [aligned for aligned in own if aligned is not None]
        if len(known) < len(own):
            return replace(rollout, aligned=None)  # one has the student's tokens, and scores all of them
        rows = tuple(sorted({row for aligned in known for row in aligned.rows}))
        dropped = all(aligned.dropped for aligned in known)
        return replace(rollout, aligned=Aligned(rollout.completion_ids, rows, rows, dropped=dropped))

    def begin(self, micros: Sequence[Sequence[Rollout]]) -> None:
        """See `Teacher.begin`: those that visit score all of the step now, one after the other."""
        for member in self.members.values():
            if member.visitor is not None:
                member.kept.clear()
                parts = [own for micro in micros if (own := member.own(micro))]
                with member.visitor.present() if parts else nullcontext():
                    for own in parts:
                        member.kept[_key(own)] = member.teacher.score([rollout for _, rollout in own])

    def score(self, rollouts: Sequence[Rollout], prefill: Mapping[str, Any] | None = None) -> LogitSource:
        """See `Teacher.score`."""
        made = prefill or {}
        asked = [(member, own) for member in self.members.values() if (own := member.own(rollouts))]
        scores = [member.scores(own, made.get(member.name)) for member, own in asked]
        if self._mixed:
            return MixtureScores(scores, [member.weight for member, _ in asked])
        rows = [_places(rollouts, own) for _, own in asked]
        total_M = torch.zeros(sum(len(rollout.rows) for rollout in rollouts), dtype=torch.float64)
        for (member, _), rows_m in zip(asked, rows, strict=True):
            total_M[rows_m] += member.weight
        return SeveralScores(
            [
                Share(
                    rows_m.to(member.student.device),
                    (member.weight / total_M[rows_m]).float().to(member.student.device),
                    member.student.trained_head(),
                    source,
                    member.seen,
                )
                for (member, _), rows_m, source in zip(asked, rows, scores, strict=True)
            ]
        )


def _places(rollouts: Sequence[Rollout], own: Sequence[tuple[int, Rollout]]) -> Tensor:
    """Where the rows that a teacher scores of its `own` rollouts are among all rows of the micro-batch, int64."""
    starts = [0, *accumulate(len(rollout.rows) for rollout in rollouts)]
    found: list[int] = []
    for place, mine in own:
        number = {row: index for index, row in enumerate(rollouts[place].rows)}
        found += [starts[place] + number[row] for row in mine.rows]
    return torch.tensor(found, dtype=torch.int64)


def _key(own: Sequence[tuple[int, Rollout]]) -> tuple[int, int]:
    """A micro-batch's first rollout, which no other has."""
    return own[0][1].prompt.index, own[0][1].sample_index
