"""What one optimizer step costs at several horizons: seconds (measured at two short lengths) and GiB (by formula).

Seconds are a line through the two timings, phase by phase, over the FLOPs of a rollout. Those of attention grow with
the square of its length: on a model of 1.3 M they are 7% of a step's at 100 tokens, 28% at 1,024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import nn

from headstart.assemble.pair import Pair
from headstart.assemble.speed import Speed
from headstart.config.schema import Config
from headstart.horizon.fixed import FixedHorizon
from headstart.interfaces import OnProgress, silent
from headstart.models.causal import CausalModel, setting
from headstart.models.lora import unwrap
from headstart.models.memory import GIB, Memory, MicroMemory, free_bytes, rows
from headstart.models.passes import head_width
from headstart.ranks.runtime import Runtime
from headstart.ranks.sharding import division_of
from headstart.records import Prompt
from headstart.rollout.engine import InProcessEngine
from headstart.streams import prompt_order
from headstart.tracking import FanTracker
from headstart.train.metrics import Clock
from headstart.train.parts import Parts
from headstart.train.step import backward, sample_rollouts

LENGTHS = (8, 32)
"""Completion tokens at which a step is timed; shorter where no longer horizon is asked for."""
ATTENTION = 2.5
"""Seconds of one FLOP of attention over those of one in a linear layer (docs/explanation/cost-model.md)."""
BACKWARD = 3
"""Seconds of a forward and a backward pass over those of a forward pass."""
LOOKED_AT = 1000
"""Steps of which the one with the longest prompts is looked for."""
REPEATS = 3
"""Timings of each length; the fastest one counts, because a busy machine only ever adds."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of one optimizer step by phase, divided as in `metrics.jsonl` (both heads run in `student`)."""

    rollout: float
    teacher: float
    student: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.rollout + self.teacher + self.student + self.optimizer


@dataclass(frozen=True, slots=True)
class Cost:
    """One optimizer step with rollouts of up to `tokens` completion tokens. `seconds` is None where not even the
    short steps that would be timed fit into memory."""

    tokens: int
    seconds: Seconds | None
    memory: Memory


def memory(pair: Pair, config: Config, prompts: Sequence[Prompt], horizon: int) -> Memory:
    """GiB of the step of `config` with the longest of `prompts`, whose rollouts have `horizon` tokens."""
    micro = MicroMemory.of(pair.student, None if pair.endpoint else pair.teacher, config)
    heaviest = _heaviest(config, pair.runtime.world_size, prompts)
    return micro.step(config, pair.runtime, heaviest, horizon, free_bytes(pair.runtime.device))


def _heaviest(config: Config, ranks: int, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of one rank in the step that has most of their tokens, of the first LOOKED_AT."""
    training = config.training
    share = -(-training.prompts_per_step // ranks)
    steps = range(min(training.steps, LOOKED_AT))
    orders = (prompt_order(len(prompts), training.seed, step, training.prompts_per_step) for step in steps)
    most = [sorted((prompts[i] for i in order), key=lambda p: -len(p.token_ids))[:share] for order in orders]
    found = max(most, key=lambda some: sum(len(p.token_ids) + len(p.teacher_token_ids) for p in some))
    return [replace(prompt, index=slot) for slot, prompt in enumerate(found)]


def estimate(
    pair: Pair,
    config: Config,
    prompts: Sequence[Prompt],
    horizons: Sequence[int],
    *,
    lengths: Sequence[int] | None = None,
    repeats: int = REPEATS,
    progress: OnProgress = silent,
) -> list[Cost]:
    """The cost of a step of `config` at each of `horizons` (completion tokens), on the pair's device.

    `lengths` are completion lengths of full rollouts, where some are known: decoding then lasts as long as the longest
    that fits the horizon, and scoring without padding costs what the mean one does; without them every rollout reaches
    its horizon. Memory always counts every rollout as reaching it. Weights are not changed, gradients are cleared. With
    several ranks these are the figures of one. Each of two lengths is timed `repeats` times.
    """
    known = list(lengths or [max(horizons)])
    timings = _timings(pair, config, prompts, min(max(known), max(horizons)), repeats, progress)
    prompt = fmean(len(p.token_ids) for p in prompts)

    def seconds(horizon: int) -> Seconds:
        timed = [(_flops(pair, config, prompt, [tokens]), phases) for tokens, phases in timings.items()]
        return _line(timed, _flops(pair, config, prompt, [min(length, horizon) for length in known]))

    return [Cost(n, seconds(n) if timings else None, memory(pair, config, prompts, n)) for n in horizons]


def expected(config: Config, ranks: int, prompt: float, tokens: float, student: Speed, teacher: Speed) -> float:
    """Seconds of a step that nobody times, within a factor of two or so: rollouts of `tokens` tokens after prompts of
    `prompt`, from the speeds of both models."""
    count, batch = rows(config, ranks)
    decoding = student.seconds(count, tokens, count / config.rollout.samples_per_prompt * prompt, batch)
    return decoding + count * (prompt + tokens) * (teacher.encoded + BACKWARD * student.encoded)


def _flops(pair: Pair, config: Config, prompt: float, lengths: Sequence[int]) -> dict[str, float]:
    """FLOPs of a rollout's completion in each phase, attention's weighed by `ATTENTION`, after a prompt of `prompt`
    tokens: of the longest of `lengths` where that is what a phase waits for, of the mean one otherwise."""
    # Backwards, a frozen weight's product has one gradient, a trained one's and both of attention's have two.
    passes = 2 if config.tuning.type == "lora" else 3
    layers, head, attention = _forward_flops(pair.student)
    teacher_layers, teacher_head, teacher_attention = _forward_flops(pair.teacher)

    def total(linear: float, attention: float, *, longest: bool) -> float:
        flops = [n * linear + ATTENTION * attention * (n * prompt + n * n / 2) for n in lengths]
        return max(flops) if longest else fmean(flops)

    return {
        "rollout": total(layers + head, attention, longest=True),
        "teacher": total(teacher_layers, teacher_attention, longest=not pair.teacher.packs),
        "student": total(passes * (layers + head) + teacher_head, 3 * attention, longest=not pair.student.packs),
    }


def _forward_flops(model: CausalModel) -> tuple[int, int, int]:
    """FLOPs of one forward pass: per token in the layers and in the head, per pair of tokens in attention."""
    config = unwrap(model.model).config.get_text_config()
    weights = sum(m.weight.numel() for m in model.backbone.modules() if isinstance(m, nn.Linear))
    attention = 4 * config.num_hidden_layers * (setting(config, "num_attention_heads") or 0) * head_width(config)
    return 2 * weights, 2 * config.hidden_size * model.vocabulary, attention


def _timings(
    pair: Pair, config: Config, prompts: Sequence[Prompt], longest: int, repeats: int, progress: OnProgress
) -> dict[int, Seconds]:
    """Seconds at two lengths (completion tokens); empty where a step of the longer one would not fit into memory, and
    where a step takes all ranks."""
    if division_of(pair.student.model) is not None:
        return {}
    high = min(LENGTHS[1], max(2, longest))
    low = min(LENGTHS[0], high // 2)
    needed = memory(pair, config, prompts, high)
    if (needed.peak - needed.weights) * GIB > free_bytes(pair.runtime.device):
        return {}
    one = config.training.model_copy(update={"prompts_per_step": 1})
    _time_step(pair, config.model_copy(update={"training": one}), prompts, low)  # warms up
    order, runs = (low, high) * repeats, {low: list[Seconds](), high: list[Seconds]()}
    for index, tokens in enumerate(order):
        progress(index, len(order))
        runs[tokens].append(_time_step(pair, config, prompts, tokens))
    progress(len(order), len(order))
    return {
        tokens: Seconds(**{phase: min(getattr(s, phase) for s in timed) for phase in Seconds.__slots__})
        for tokens, timed in runs.items()
    }


def _line(timed: Sequence[tuple[Mapping[str, float], Seconds]], flops: Mapping[str, float]) -> Seconds:
    """The line through both timings of every phase, at its `flops`. No phase becomes cheaper with length."""
    (low, a), (high, b) = timed

    def at(phase: str) -> float:
        short, long = getattr(a, phase), getattr(b, phase)
        slope = max(0.0, (long - short) / (high[phase] - low[phase]))
        return max(0.0, float(long + slope * (flops[phase] - high[phase])))

    # The optimizer knows no length.
    return Seconds(**{phase: at(phase) for phase in flops}, optimizer=min(a.optimizer, b.optimizer))


def _time_step(pair: Pair, config: Config, prompts: Sequence[Prompt], tokens: int) -> Seconds:
    """One whole step of one rank, timed by phase, whose rollouts all decode `tokens` tokens: there are no stop ids.

    Its prompts are spread over all of them. The optimizer moves nothing.
    """
    slots = rows(config, pair.runtime.world_size)[0] // config.rollout.samples_per_prompt
    student, training = pair.student, config.training.model_copy(update={"prompts_per_step": slots})
    trained = list(student.trainable().values())
    parts = Parts(
        config=config.model_copy(update={"training": training}),
        runtime=Runtime(0, 1, pair.runtime.device),  # one rank may ask alone, so nothing is gathered
        folder=None,
        prompts=tuple(prompts[slot * len(prompts) // slots] for slot in range(slots)),
        vocabulary=pair.vocabulary,
        student=student,
        teacher=pair.scorer(),
        engine=InProcessEngine(student, ()),
        horizon=FixedHorizon(tokens),
        optimizer=torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True),
        evaluator=None,
        tracker=FanTracker([]),
        decode=lambda ids: [],
        export=lambda model, path, generated, report: None,
    )
    clock, was_training = Clock(parts.runtime), student.model.training
    with clock.phase("rollout"):
        rollouts = sample_rollouts(parts, 0, tokens)
    student.model.train()
    backward(parts, rollouts, 0, clock)
    student.model.train(was_training)
    with clock.phase("optimizer"):
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip)
        parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    return Seconds(**clock.seconds)
