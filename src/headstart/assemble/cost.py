"""What one optimizer step costs at several horizons: seconds (from a few that are timed) and GiB (by formula).

Scoring and learning take seconds once, per FLOP of linear layers and heads, and per FLOP of attention, which costs
several times as much and grows with the square of a rollout's length: three batches are timed that differ in all three.
A decoding step is timed at a short and at a long context, whose keys and values it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from statistics import fmean

import numpy as np
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
from headstart.records import Prompt, Rollout
from headstart.rollout.engine import InProcessEngine
from headstart.streams import prompt_order
from headstart.tracking import FanTracker
from headstart.train.metrics import Clock
from headstart.train.micro import Prefills, prefills
from headstart.train.parts import Parts
from headstart.train.step import backward, sample_rollouts, step_prompts

LENGTHS = (8, 32)
"""Completion tokens of the steps that are timed, of one prompt and of all; fewer where no horizon is longer."""
LONG = 512
"""Completion tokens, at most, of the one rollout that is scored, and before those that are decoded, to see what
attention costs."""
TELLING = 128
"""Completion tokens below which that is too little to be timed; then a FLOP of attention counts ATTENTION times."""
ATTENTION = 4.0
"""Seconds of one FLOP of attention over those of one in a linear layer (docs/explanation/cost-model.md)."""
LOGIT = 300
"""FLOPs of a linear layer that take as long as what the divergence does to one logit."""
STEPS = 8
"""Tokens that are decoded at a long context."""
BACKWARD = 3
"""Seconds of a forward and a backward pass over those of a forward pass."""
LOOKED_AT = 1000
"""Steps of which the one with the longest prompts is looked for."""
REPEATS = 3
"""Timings of everything; the fastest one counts, because a busy machine only ever adds."""


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
    micro = MicroMemory.of(pair.student, pair.models[1:], config, visits=pair.visiting is not None)
    heaviest = _heaviest(config, pair.runtime.world_size, prompts)
    return micro.step(config, pair.runtime, heaviest, horizon, free_bytes(pair.runtime.device))


def _heaviest(config: Config, ranks: int, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of one rank in the step that has most of their tokens, of the first LOOKED_AT."""
    training = config.training
    share = -(-training.prompts_per_step // ranks)
    steps = range(min(training.steps, LOOKED_AT))
    orders = (prompt_order(len(prompts), training.seed, step, training.prompts_per_step) for step in steps)
    most = [sorted((prompts[i] for i in order), key=lambda p: -len(p.token_ids))[:share] for order in orders]
    heaviest = max(most, key=lambda some: sum(len(p.token_ids) + len(p.teacher_token_ids) for p in some))
    return [replace(prompt, index=slot) for slot, prompt in enumerate(heaviest)]


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
    several ranks these are the figures of one. Everything is timed `repeats` times.
    """
    known = list(lengths or [max(horizons)])
    timed = _timings(pair, config, prompts, min(max(known), max(horizons)), repeats, progress)
    slots = _spread(pair, config, prompts)
    prompt = fmean(len(p.token_ids) for p in slots)

    def seconds(horizon: int) -> Seconds | None:
        own = [min(length, horizon) for length in known]
        work = _work(pair, config, slots, own)
        return None if timed is None else timed.at(work, max(own), prompt + max(own) / 2)

    return [Cost(n, seconds(n), memory(pair, config, prompts, n)) for n in horizons]


def expected(config: Config, ranks: int, prompt: float, tokens: float, student: Speed, teacher: Speed) -> float:
    """Seconds of a step that nobody times, within a factor of two or so: rollouts of `tokens` tokens after prompts of
    `prompt`, from the speeds of both models."""
    count, batch = rows(config, ranks)
    decoding = student.seconds(count, tokens, count / config.rollout.samples_per_prompt * prompt, batch)
    return decoding + count * (prompt + tokens) * (teacher.encoded + BACKWARD * student.encoded)


Work = Mapping[str, tuple[float, float]]
"""FLOPs by phase: of linear layers and heads, and of attention."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What was timed: batches; seconds of a decoding step at one or two contexts (tokens), and of what comes before the
    first."""

    batches: Sequence[tuple[Work, Seconds]]
    start: float
    steps: Mapping[float, float]

    def at(self, work: Work, steps: int, context: float) -> Seconds:
        """A step that decodes `steps` tokens, with `context` tokens in the KV cache of a row on average."""
        (near, fast), (far, slow) = min(self.steps.items()), max(self.steps.items())
        growth = max(0.0, slow - fast) / (far - near) if far > near else 0.0
        return Seconds(
            rollout=self.start + steps * max(0.0, fast + growth * (context - near)),
            teacher=self._scoring("teacher", work),
            student=self._scoring("student", work),
            optimizer=min(timed.optimizer for _, timed in self.batches),  # which knows no length
        )

    def _scoring(self, phase: str, work: Work) -> float:
        apart = len(self.batches) > 2
        *rows, wanted = [
            [1.0, linear, attention] if apart else [1.0, linear + ATTENTION * attention]
            for linear, attention in (each[phase] for each in (*(done for done, _ in self.batches), work))
        ]
        return float(np.dot(wanted, nonnegative(rows, [getattr(timed, phase) for _, timed in self.batches])))


def nonnegative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients, none negative, with the least squared relative error: the best of all subsets of the columns."""
    y = np.maximum(np.asarray(seconds), 1e-9)
    A, ones = np.asarray(rows) / y[:, None], np.ones(len(y))
    width, best, least = A.shape[1], [0.0] * A.shape[1], float(len(y))
    for columns in (c for size in range(1, width + 1) for c in combinations(range(width), size)):
        fit = np.linalg.lstsq(A[:, columns], ones, rcond=None)[0]
        error = float(((A[:, columns] @ fit - 1) ** 2).sum())
        if (fit >= 0).all() and error < least - 1e-12:
            best, least = [float(fit[columns.index(c)]) if c in columns else 0.0 for c in range(width)], error
    return best


def _work(
    pair: Pair, config: Config, prompts: Sequence[Prompt], lengths: Sequence[float], *, sampled: bool = True
) -> Work:
    """What scoring and learning compute for `prompts`, each of whose rollouts has one of `lengths`: without padding the
    mean counts, with it the longest. Not `sampled`: of one rollout, whose prompt no sampling has encoded."""
    tuning, G = config.tuning, config.rollout.samples_per_prompt if sampled else 1
    # Backwards, a frozen weight's product has one gradient, a trained one's and both of attention's have two.
    passes = 2 if tuning.type == "lora" else 3
    shares = sampled and pair.student.fast is not None and not getattr(tuning, "dropout", 0.0)
    again = int(shares and not tuning.gradient_checkpointing)
    layers, head, attention = _forward_flops(pair.student)
    teacher_layers, teacher_head, teacher_attention = _forward_flops(pair.teacher)

    def sizes(model: CausalModel, places: list[int]) -> tuple[float, float, float, float]:
        """Tokens of prompts and of completions, pairs of tokens within prompts and of completions'."""
        if not model.packs:
            T = max(places) + max(lengths)
            return 0.0, G * len(places) * T, 0.0, G * len(places) * T * T
        own, squares, total = fmean(lengths), fmean(n * n for n in lengths), sum(places)
        pairs = G * (own * total + len(places) * squares / 2)
        return total, G * len(places) * own, sum(p * p for p in places) / 2, pairs

    logits = LOGIT * (pair.student.vocabulary + pair.teacher.vocabulary)
    heads = G * len(prompts) * fmean(lengths) * (passes * head + teacher_head + logits)
    P, C, within, pairs = sizes(pair.student, [len(p.token_ids) for p in prompts])
    linear = layers * (passes * C + (passes - again) * P) + heads
    own = (linear, attention * (3 * pairs + (3 - again) * within))
    P, C, within, pairs = sizes(pair.teacher, [len(p.teacher_token_ids) for p in prompts])
    return {"teacher": (teacher_layers * (P + C), teacher_attention * (within + pairs)), "student": own}


def _forward_flops(model: CausalModel) -> tuple[int, int, int]:
    """FLOPs of one forward pass: per token in the layers and in the head, per pair of tokens in attention."""
    config = unwrap(model.model).config.get_text_config()
    weights = sum(m.weight.numel() for m in model.backbone.modules() if isinstance(m, nn.Linear))
    attention = 4 * config.num_hidden_layers * (setting(config, "num_attention_heads") or 0) * head_width(config)
    return 2 * weights, 2 * config.hidden_size * model.vocabulary, attention


def _timings(
    pair: Pair, config: Config, prompts: Sequence[Prompt], longest: int, repeats: int, progress: OnProgress
) -> Timed | None:
    """None where not even a short step would fit into memory, and where a step takes all ranks."""
    if division_of(pair.student.model) is not None:
        return None
    free, high = free_bytes(pair.runtime.device), min(LENGTHS[1], max(2, longest))
    low, long = min(LENGTHS[0], high // 2), min(LONG, longest)

    def fits(tokens: int) -> bool:
        needed = memory(pair, config, prompts, tokens)
        return (needed.peak - needed.weights) * GIB <= free

    if not fits(high):
        return None
    slots = _spread(pair, config, prompts)
    one, rollouts = slots[0], rows(config, pair.runtime.world_size)[0]
    text = (one.token_ids * (1 + long // len(one.token_ids)))[:long]
    far = replace(one, token_ids=one.token_ids + text)
    _time_step(pair, config, [one], low)  # warms up
    wanted = {
        "one": partial(_time_step, pair, config, [one], low),
        "all": partial(_time_step, pair, config, slots, high),
        "short": partial(_time_rollouts, pair, config, slots, low),
    }
    if long > high and fits(long):
        wanted |= {
            "scored": partial(_time_step, pair, config, [one], long, text),
            "far": partial(_time_rollouts, pair, config, [far], 1 + STEPS, rollouts),
            "encoded": partial(_time_rollouts, pair, config, [far], 1, rollouts),
        }
    runs = {name: list[Seconds]() for name in wanted}
    for index, name in enumerate([*wanted] * repeats):
        progress(index, repeats * len(wanted))
        runs[name].append(wanted[name]())
    progress(repeats * len(wanted), repeats * len(wanted))
    best = {
        name: Seconds(*(min(getattr(run, phase) for run in timed) for phase in Seconds.__slots__))
        for name, timed in runs.items()
    }
    step = max(0.0, best["all"].rollout - best["short"].rollout) / (high - low)
    steps = {fmean(len(p.token_ids) for p in slots) + (low + high) / 2: step}
    batches = [
        (_work(pair, config, [one], [low]), best["one"]),
        (_work(pair, config, slots, [high]), best["all"]),
    ]
    if "far" in best:
        steps[len(far.token_ids) + STEPS / 2] = (best["far"].rollout - best["encoded"].rollout) / STEPS
    if "far" in best and long >= TELLING:
        batches.append((_work(pair, config, [one], [long], sampled=False), best["scored"]))
    return Timed(batches, max(0.0, best["all"].rollout - high * step), steps)


def _spread(pair: Pair, config: Config, prompts: Sequence[Prompt]) -> list[Prompt]:
    """As many of `prompts` as a step has, from all over them."""
    slots = rows(config, pair.runtime.world_size)[0] // config.rollout.samples_per_prompt
    return [replace(prompts[slot * len(prompts) // slots], index=slot) for slot in range(slots)]


def _time_rollouts(
    pair: Pair, config: Config, prompts: Sequence[Prompt], tokens: int, samples: int | None = None
) -> Seconds:
    """Sampling alone, `tokens` tokens of every rollout."""
    clock, rollout = Clock(pair.runtime), config.rollout
    with clock.phase("rollout"):
        InProcessEngine(pair.student, ()).generate(
            prompts,
            samples=samples or rollout.samples_per_prompt,
            max_tokens=tokens,
            sampling=rollout.sampling,
            key=(config.training.seed, "timing", 0),
            batch_size=rollout.batch_size,
        )
    return Seconds(clock.seconds["rollout"], 0.0, 0.0, 0.0)


def _time_step(
    pair: Pair, config: Config, prompts: Sequence[Prompt], tokens: int, given: tuple[int, ...] | None = None
) -> Seconds:
    """One whole step of one rank on `prompts`, timed by phase, whose rollouts all decode `tokens` tokens: there are no
    stop ids. With `given` nothing is sampled, and one rollout says that. The optimizer moves nothing."""
    student, training = pair.student, config.training.model_copy(update={"prompts_per_step": len(prompts)})
    trained = list(student.trainable().values())
    parts = Parts(
        config=config.model_copy(update={"training": training}),
        runtime=Runtime(0, 1, pair.runtime.device),  # one rank may ask alone, so nothing is gathered
        folder=None,
        prompts=tuple(prompts),
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
    made = Prefills() if given else prefills(parts, step_prompts(parts, 0), tokens, clock)
    with clock.phase("rollout"):
        rollouts = [Rollout(prompts[0], 0, given, False)] if given else sample_rollouts(parts, 0, tokens, made.student)
    student.model.train()
    backward(parts, rollouts, 0, clock, made)
    student.model.train(was_training)
    with clock.phase("optimizer"):
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip)
        parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    return Seconds(**clock.seconds)
