"""One optimizer step, top to bottom: sample up to the horizon, let the teacher judge, move the student."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from headstart.errors import NonFiniteError
from headstart.interfaces import LogitSource
from headstart.losses.chunked import default_chunk
from headstart.losses.selection import loss_weights
from headstart.losses.several import weighted_divergence
from headstart.models.sharded import heads
from headstart.ranks.sharding import clip_gradients
from headstart.records import Prompt, Rollout, StepReport
from headstart.streams import derive_seed, prompt_order
from headstart.train.metrics import Clock, MicroReadings, collect, readings_of, summarise, summed
from headstart.train.micro import Prefills, in_micro_batches, prefills
from headstart.train.observe import loss_factors, observe, token_signals
from headstart.train.optimizer import schedule_factor
from headstart.train.parts import Parts

_NOTHING = (
    "selection chose no token of step {step}, so this step trains nothing: choose other selection.classes, or a longer "
    "horizon that reaches such tokens"
)
_NOTHING_SCORED = (
    "no token of step {step} starts where a token of the teacher starts, or the teacher's tokenizer gives no rollout's "
    "bytes back, so this step trains nothing: headstart preflight says what the two tokenizers share"
)


def step_prompts(parts: Parts, step: int) -> list[Prompt]:
    """This rank's prompts of step `step` (from 0); a function of seed and step alone."""
    training = parts.config.training
    order = prompt_order(len(parts.prompts), training.seed, step, training.prompts_per_step)
    # The slot keys the draws, so that a prompt that comes twice in a step gives two different rollouts.
    return parts.runtime.share([replace(parts.prompts[i], index=slot) for slot, i in enumerate(order)])


def sample_rollouts(parts: Parts, step: int, horizon: int, prefill: Any = None) -> list[Rollout]:
    """This rank's rollouts of step `step` (from 0), at most `horizon` tokens each. Which prompts, and every draw,
    depend on seed and step alone. `prefill` is the engine's of these prompts, if it made one."""
    config, rollout = parts.config, parts.config.rollout
    parts.engine.sync(step)
    prompts = step_prompts(parts, step)
    longest = [parts.teacher.horizon(prompt, horizon) for prompt in prompts]
    shared = {} if prefill is None else {"prefill": prefill}  # engines that make none need not take one
    return parts.engine.generate(
        prompts,
        samples=rollout.samples_per_prompt,
        max_tokens=longest if min(longest, default=horizon) < horizon else horizon,
        sampling=rollout.sampling,
        key=(config.training.seed, "rollout", step),
        batch_size=rollout.batch_size,
        finished=parts.teacher.submit,
        candidates=parts.teacher.candidates,
        **shared,
    )


def backward(
    parts: Parts, rollouts: list[Rollout], step: int, clock: Clock, made: Prefills | None = None
) -> list[MicroReadings]:
    """The gradient of the global loss, in place of whatever gradient there was; what was read at each position.

    The denominator counts all ranks' selected tokens and scored rollouts, so that neither micro-batches nor the number
    of ranks change the gradient. The first micro-batch starts from the prefills that were `made` of its prompts.
    """
    made = made or Prefills()
    training = parts.config.training
    with clock.phase("teacher"):
        rollouts = parts.teacher.align(rollouts)
        if parts.runtime.world_size > 1 and parts.teacher.candidates:
            parts.runtime.together(partial(parts.teacher.ready, rollouts))  # no rank may fail alone further down
    tokens, scored = sum(parts.selector.counts(rollouts)), [len(r.rows) > 0 for r in rollouts]
    total_tokens, total_rollouts = (int(x) for x in parts.runtime.sum(tokens, sum(scored)))
    if total_tokens == 0 and parts.runtime.is_main:
        warnings.warn((_NOTHING if total_rollouts else _NOTHING_SCORED).format(step=step + 1), stacklevel=2)

    # No collective in here but those of divided models: each rank has micro-batches of its own.
    def accumulate(micro: list[Rollout], start: int) -> MicroReadings:
        own = made.taken()
        with clock.phase("teacher"):
            asked = (micro,) if own.teacher is None else (micro, own.teacher)  # nor teachers
            scores = parts.teacher.score(*asked)
        with clock.phase("student"), _dropout_stream(derive_seed(training.seed, "dropout", step, start)):
            return _accumulate(parts, micro, own.student, scores, step, total_tokens, total_rollouts)

    def begin(micros: list[list[Rollout]]) -> None:
        with clock.phase("teacher"):
            parts.teacher.begin(micros)

    with heads(parts.student, parts.teacher.model):
        return in_micro_batches(parts, rollouts, accumulate, begin)


def _accumulate(
    parts: Parts,
    micro: list[Rollout],
    prefill: Any,
    scores: LogitSource,
    step: int,
    total_tokens: int,
    total_rollouts: int,
) -> MicroReadings:
    """Add the gradient of one micro-batch's share of the loss; the totals count the whole step over all ranks."""
    training = parts.config.training
    batch = parts.student.batch(micro, "student")
    hidden_MD = parts.student.completion_hidden(batch, prefill)
    signals = token_signals(parts, batch, hidden_MD, scores)
    selected_M, factor_M = parts.selector.mask(micro, step, signals), loss_factors(parts, micro, signals)
    weights_M = loss_weights(
        batch.row_M,
        len(micro),
        training.denominator,
        total_tokens=total_tokens,
        total_rollouts=total_rollouts,
        selected_M=None if selected_M is None else selected_M.to(hidden_MD.device),
        factor_M=None if factor_M is None else factor_M.to(hidden_MD.device),
    )
    found = weighted_divergence(
        parts.config.divergence,
        hidden_MD,
        parts.student.trained_head(),
        scores,
        batch.tokens_M,
        weights_M,
        chunk=training.logit_chunk or default_chunk(parts.vocabulary.largest),
    )
    if not math.isfinite(float(found.loss.detach())):
        raise NonFiniteError(_non_finite("loss", float(found.loss.detach()), step))
    torch.autograd.backward(found.loss)
    return readings_of(micro, batch, weights_M, found, signals.get("overlap"))


def train_step(parts: Parts, step: int, generated_so_far: int) -> tuple[StepReport, list[MicroReadings]]:
    """One optimizer step (`step` counts from 0; its report from 1), and this rank's readings.

    Raises NonFiniteError before the weights change when the loss or the gradient is not finite.
    """
    clock = Clock(parts.runtime)
    horizon = parts.horizon.tokens(step)
    made = prefills(parts, step_prompts(parts, step), horizon, clock)
    with clock.phase("rollout"):
        rollouts = sample_rollouts(parts, step, horizon, made.student)
    parts.student.model.train()
    readings = backward(parts, rollouts, step, clock, made)
    tokens = collect(parts.runtime, readings)
    with clock.phase("probe"):
        again = partial(backward, parts, step=step, clock=Clock(parts.runtime))
        probed = observe(parts, step, horizon, rollouts, tokens, again) | summed(parts.runtime, parts.teacher.metrics())
    with clock.phase("optimizer"):
        parameters = list(parts.student.trainable().values())
        parts.runtime.sum_gradients(parameters)
        norm = clip_gradients(parameters, parts.config.optimizer.clip)
        if not math.isfinite(norm):
            raise NonFiniteError(_non_finite("gradient norm", norm, step))
        factor = schedule_factor(parts.config.schedule, step, parts.config.training.steps)
        for group in parts.optimizer.param_groups:
            group["lr"] = parts.config.learning_rate * factor
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)  # not beside the rollouts that come next
    return summarise(
        parts.runtime,
        tokens,
        clock,
        probed,
        step=step + 1,
        horizon=horizon,
        grad_norm=norm,
        lr=parts.config.learning_rate * factor,
        generated_so_far=generated_so_far,
    ), readings


def _non_finite(what: str, value: float, step: int) -> str:
    return (
        f"the {what} is {value} at step {step + 1}; the weights were not changed. Lower optimizer.lr, or load the "
        "student in float32 (student.dtype=float32) if it is in half precision; the last checkpoint is intact"
    )


@contextmanager
def _dropout_stream(seed: int) -> Iterator[None]:
    """Dropout draws from a stream of its own; the caller's global generator is left as it was."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
