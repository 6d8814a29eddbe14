"""A step in micro-batches that fit into memory: divided by tokens, and more finely when that was too much."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headstart.errors import MemoryBudgetError, out_of_memory
from headstart.models.memory import GIB, MicroMemory, count, free_bytes
from headstart.models.sharded import finish_micro_batch, idle_pass
from headstart.progress import doing
from headstart.ranks.runtime import Runtime
from headstart.ranks.sharding import division_of
from headstart.ranks.turns import begin_pass
from headstart.records import Prompt, Rollout
from headstart.train.metrics import Clock, MicroReadings

if TYPE_CHECKING:
    from headstart.train.parts import Parts


@dataclass(slots=True)
class Budget:
    """Bytes that a micro-batch may take beside weights and optimizer, found once a run and kept in its checkpoints, so
    that a resumed run is divided as the straight one was; and what micro-batches take. None until the first step
    asks."""

    bytes: float | None = None
    memory: MicroMemory | None = None

    def agree(self, runtime: Runtime) -> float | None:
        """The least of all ranks, on all ranks."""
        known = [b for b in runtime.gather(self.bytes) if b is not None]
        self.bytes = min(known) if known else None
        return self.bytes


Work = Callable[[list[Rollout], int], MicroReadings]
Begin = Callable[[list[list[Rollout]]], None]


def in_micro_batches(
    parts: Parts, rollouts: list[Rollout], work: Work, begin: Begin = lambda micros: None
) -> list[MicroReadings]:
    """`begin(micros)`, then `work(micro, start)` for every micro-batch, from no gradients; `start` is the place of its
    first rollout.

    When one runs out of memory the whole step is done again with smaller ones: a gradient that some layers have added
    and others have not cannot be taken back, and a copy of the sum before would need what is missing. So a step is what
    it would have been under the smaller budget. Where models are divided all ranks do it again together. Raises
    MemoryBudgetError when a single rollout does not fit.
    """
    models = [parts.student, *parts.teacher.models]
    attempt = _together if any(division_of(model.model) is not None for model in models) else _attempt
    while True:
        parts.optimizer.zero_grad(set_to_none=True)
        for parameter in parts.student.head_parameters:  # a gathered head is not the optimizer's
            parameter.grad = None
        micros = _divided(parts, rollouts)
        done = attempt(parts, micros, work, begin)
        if done.whole:
            return done.readings
        if done.cause is not None:
            failed, alone = micros[len(done.readings)], len(micros) == 1
            parts.budget.bytes = _smaller(_memory(parts)[0], failed, done.cause, alone=alone)
        gc.collect()
        if parts.runtime.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class _Done:
    """What an attempt at a step came to: `cause` says why memory ran out on this rank, `whole` is false where it ran
    out on any."""

    readings: list[MicroReadings]
    cause: str | None
    whole: bool


def _attempt(parts: Parts, micros: list[list[Rollout]], work: Work, begin: Begin) -> _Done:
    readings: list[MicroReadings] = []
    cause = None
    try:
        begin(micros)
        for micro in micros:
            begin_pass()
            with doing(f"micro-batch {len(readings) + 1} of {len(micros)}"):
                readings.append(work(micro, sum(len(r.rollouts) for r in readings)))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        cause = str(error).splitlines()[0]
    # The error is gone here, and with it the frames that held tensors.
    return _Done(readings, cause, cause is None)


def _together(parts: Parts, micros: list[list[Rollout]], work: Work, begin: Begin) -> _Done:
    """The same on all ranks. Layers are gathered for all at once, so those with fewer micro-batches take part in the
    others', and one that ran out of memory still does its part of those it has left."""
    student, teacher = parts.student, parts.teacher.model
    rounds = max(parts.runtime.gather(len(micros)))
    mine = _attempt(parts, micros, work, begin)
    if mine.cause is not None and not finish_micro_batch(student, teacher):
        raise MemoryBudgetError(_stopped(parts, mine.cause))
    for _ in range(rounds - len(mine.readings) - (mine.cause is not None)):
        idle_pass(student, teacher)
    causes = parts.runtime.gather(mine.cause)
    return _Done(mine.readings, mine.cause, not any(causes))


@dataclass(slots=True)
class Prefills:
    """Prefills of a step's prompts, which its only micro-batch starts from; None where there is none."""

    student: Any = None
    """For sampling and training."""
    teacher: Any = None

    def taken(self) -> Prefills:
        """These, once: a graph serves one backward pass, and none may stay in memory after it."""
        taken, self.student, self.teacher = Prefills(self.student, self.teacher), None, None
        return taken


def prefills(parts: Parts, prompts: list[Prompt], horizon: int, clock: Clock) -> Prefills:
    """Each model's prefill of `prompts`, where rollouts of `horizon` tokens are one micro-batch: the student's stays in
    memory with its graph until then."""
    samples = parts.config.rollout.samples_per_prompt
    longest = [Rollout(prompt, sample, (0,) * horizon, False) for prompt in prompts for sample in range(samples)]
    if not prompts or len(_divided(parts, longest)) > 1:
        return Prefills()
    # The clock waits for the device, and what runs beside the decoding is not waited for.
    with nullcontext() if parts.runtime.device.type == "cuda" else clock.phase("teacher"):
        teacher = parts.teacher.prefill(prompts)
    with clock.phase("rollout"):
        return Prefills(parts.engine.prefill(prompts), teacher)


def _memory(parts: Parts) -> tuple[MicroMemory, float]:
    """What micro-batches take, which follows from the models and is found once, and what one may take."""
    budget = parts.budget
    if budget.memory is None:
        budget.memory = MicroMemory.of(parts.student, parts.teacher.models, parts.config, visits=parts.teacher.visits)
    if budget.bytes is None:
        budget.bytes = budget.memory.budget(parts.config, parts.runtime, free_bytes(parts.runtime.device))
    return budget.memory, budget.bytes


def _divided(parts: Parts, rollouts: list[Rollout]) -> list[list[Rollout]]:
    memory, budget = _memory(parts)
    return memory.split(rollouts, budget, parts.config.training.micro_batch)


def _stopped(parts: Parts, cause: str) -> str:
    half = _memory(parts)[1] / 2 / GIB
    return (
        f"a step ran out of memory: {cause}. Other ranks wait in the midst of it, and with sharding.replicate > 1, or "
        f"torch before 2.13, it cannot be done again; set training.memory_budget_gib={half:.3g} or "
        "training.micro_batch=1, and continue from the last checkpoint with --resume"
    )


def _smaller(memory: MicroMemory, failed: list[Rollout], cause: str, *, alone: bool) -> float:
    """A budget under which about half of `failed` is a micro-batch, whatever the formula says in GiB; less than it
    needed where that was the whole step, `alone`: half of it beside all gradients may need more."""
    tokens = f"{count(failed):,} completion tokens"
    if len(failed) == 1:
        raise MemoryBudgetError(
            f"one rollout ({tokens} after a prompt of {len(failed[0].prompt.token_ids):,}) does not fit into memory: "
            f"{cause}; lower the horizon or training.logit_chunk, set tuning.gradient_checkpointing=true, or use "
            "tuning.type=lora"
        )
    found = (memory.needs(failed) + max(memory.needs([rollout]) for rollout in failed)) / 2
    needed = memory.needs(failed, alone=alone)
    found = min(found, 0.99 * needed)
    warnings.warn(
        f"a micro-batch of {len(failed)} rollouts ({tokens}; {needed / GIB:.3g} GiB by formula) ran out "
        f"of memory: {cause}; this step is done again, and those after it are done, with {found / GIB:.3g} GiB a "
        f"micro-batch; training.memory_budget_gib={found / GIB:.3g} starts like that",
        stacklevel=2,
    )
    return found
