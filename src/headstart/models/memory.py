"""The memory of a training step as a formula: how rollouts are divided into micro-batches that fit, and what is free.

Weights, gradients, optimizer state and KV cache are counted exactly, what passes keep as `models/passes.py` says. A
phase needs what is there together at its worst moment: activations go while gradients come, layer by layer, so a step
peaks at the start of a backward pass or at its end. With the fast decoder that is within 15% of what torch allocates
(tests/unit/test_cost.py, tests/unit/test_micro.py; `python -m bench.plan`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from headstart.config.schema import Config, DivergenceConfig, FullSupport, GeneralizedJSD, ReverseKL
from headstart.losses.chunked import CACHE_ELEMENTS, default_chunk
from headstart.losses.products import lays_out
from headstart.models.causal import CausalModel
from headstart.models.layout import Weights
from headstart.models.passes import Passes
from headstart.models.stepper import copied_bytes
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt, Rollout

GIB = 2**30
DRAWING, SORTED, CAPTURED = 16, 32, 48
"""Bytes per vocabulary entry and row while a token is drawn: logits and masses; sorted as well, for top-p; by captured
steps, which keep all of it."""
WORKSPACE = 2**25
"""Bytes that the libraries of matrix products keep for themselves, about."""
SHARE = 0.8
"""Of the free memory; the rest is for the formula's error (15%) and for what the allocator cannot reuse. On a GPU a
step that needs more is done again in parts; on a CPU the system may end the process."""
COPIED = 0.5
"""Share of the free memory up to which weights are copied for decoding."""
NEAR = 0.9
"""Share of the free memory from which fragments and other processes decide whether a step fits."""
LARGEST = 256
"""Rows decoded at once at most: beyond it a token costs about as much per row on the devices we know."""


@dataclass(frozen=True, slots=True)
class Items:
    """What `Memory` consists of, in GiB per rank. Not all of it exists at once: see the phases of `Memory`."""

    student_weights: float
    teacher_weights: float
    optimizer_states: float
    gradients: float
    gathered_layers: float
    """Under sharding: whole embedding, head and two layers of the model that computes, and a layer's gradients."""
    generation_copy: float
    """The student's weights once more for generation: with adapters folded in, laid out for few rows, or under sharding
    gathered whole; each where it fits."""
    kv_cache: float
    sampling: float
    """Prefill of the prompts, kept for training where it can be, and logits while a token is drawn."""
    teacher_scoring: float
    activations: float
    logits: float
    micro_batch: int
    """Rollouts in the largest micro-batch."""


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB of one optimizer step on one device, if every rollout reaches its horizon.

    `weights` (both models) and `states` (AdamW's two averages) are there all the time. The rest is what each phase
    holds beside them; a step peaks at the largest.
    """

    weights: float
    states: float
    rollout: float
    teacher: float
    student: float
    optimizer: float
    items: Items | None = None

    @property
    def peak(self) -> float:
        most = max(self.rollout, self.teacher, self.student, self.optimizer)
        return self.weights + self.states + most + WORKSPACE / GIB


def count(rollouts: Sequence[Rollout]) -> int:
    """Completion tokens of `rollouts`."""
    return sum(len(r.completion_ids) for r in rollouts)


def rows(config: Config, world_size: int) -> tuple[int, int]:
    """Rollouts of a step on one device, and how many of them are decoded at once."""
    step = -(-config.training.prompts_per_step // world_size) * config.rollout.samples_per_prompt
    return step, min(config.rollout.batch_size or step, step)


@dataclass(frozen=True, slots=True)
class MicroMemory:
    """Bytes that a step and its micro-batches take; a micro-batch is counted beside both models' weights and the
    optimizer's averages."""

    student: Passes
    teacher: Passes | None
    """None where the teacher is not on this device."""
    checkpointing: bool
    keeps: bool
    """Whether the prompts' pass that rollouts start from is kept for training, where a step is not divided."""
    student_weights: Weights
    teacher_weights: Weights | None
    head: int
    """Float32 sum of a trained head's gradient, which is there before any other gradient."""
    embedding: int
    """A trained embedding's gradient, as large as the embedding, before it is added to the one that is there."""
    copies: int
    """Of weights while tokens are drawn (`CausalModel.copied_weights`)."""
    chunk: int
    logits: int
    """Per completion token of a chunk."""
    drawing: int
    """Per row while a token is drawn."""

    @classmethod
    def of(
        cls,
        student: CausalModel,
        teachers: Sequence[CausalModel],
        config: Config,
        *,
        shards: int | None = None,
        device: str | None = None,
        visits: bool = False,
    ) -> MicroMemory:
        """From loaded models; or from models without weights (`load_outline`) that will compute on `device`, each held
        by `shards` ranks together (None: whole on every rank). Several teachers stay, or are there one after the other
        (`visits`)."""
        V = max(model.vocabulary for model in (student, *teachers))
        checkpointing = config.tuning.gradient_checkpointing
        place, whole = device or student.device.type, shards is None
        chunk = config.training.logit_chunk or default_chunk(V)
        passes = Passes.of(student, "student", device, whole=whole, checkpointing=checkpointing)
        embedding = student.backbone.get_input_embeddings().weight
        blocks = min(1.0, CACHE_ELEMENTS / V / chunk) if place == "cpu" else 1.0
        drawing = CAPTURED if place == "cuda" else SORTED if config.rollout.top_p < 1 else DRAWING
        return cls(
            student=passes,
            teacher=_heaviest([Passes.of(model, "teacher", device, whole=whole) for model in teachers]),
            checkpointing=checkpointing,
            keeps=passes.apart and not getattr(config.tuning, "dropout", 0.0),
            student_weights=Weights.of(student, shards),
            teacher_weights=_together(teachers, shards, visits, config),
            head=sum(4 * p.numel() for p in student.head_parameters),
            embedding=embedding.numel() * embedding.element_size() if embedding.requires_grad and whole else 0,
            copies=copies(student) if place == "cpu" else 0,
            chunk=chunk,
            logits=int(4 * V * _logits(config.divergence, student.events is not None, blocks)),
            drawing=student.vocabulary * drawing,
        )

    @property
    def weights(self) -> int:
        """Of both models."""
        return self.student_weights.resident + (self.teacher_weights.resident if self.teacher_weights else 0)

    @property
    def gradients(self) -> int:
        return self.student_weights.gradients

    def scoring(self, rollouts: Sequence[Rollout], accumulated: int) -> float:
        """The teacher's pass, beside `accumulated` bytes of gradients of the micro-batches before; without any, beside
        the student's prompts."""
        prompts = self.student.prompts(rollouts) if self.keeps and not accumulated else 0.0
        if self.teacher is None or self.teacher_weights is None:
            return accumulated + prompts
        passes = self.teacher_weights.gathered + self.teacher.forward(rollouts)
        return accumulated + prompts + count(rollouts) * self.teacher.hidden + passes

    def learning(self, rollouts: Sequence[Rollout], accumulated: int) -> float:
        """The student's two passes and the divergence between them.

        Gradients of the layers come as what these kept goes; where prompts have a pass of their own, what they keep
        stays until the completions' has given every weight a gradient, to which theirs are added.
        """
        prompts, own, layer = self.student.training(rollouts, checkpointing=self.checkpointing)
        tokens, begun = count(rollouts), prompts + own + self.head
        held = self._gathered + accumulated + self._hidden(tokens)
        dividing = tokens * self.student.hidden + self._divergence(tokens)
        ended = prompts + self.embedding + (self.gradients if self.student.apart or not accumulated else self.head)
        return held + max(begun + dividing, max(begun, ended) + self.student_weights.backward + layer)

    def _hidden(self, tokens: int) -> float:
        return float(tokens * (self.student.hidden + (self.teacher.hidden if self.teacher else 0)))

    def _divergence(self, tokens: int) -> float:
        return float(self.logits * min(self.chunk, tokens))

    @property
    def _gathered(self) -> int:
        """Whole weights while the student learns: its own, and the teacher's head."""
        return self.student_weights.gathered + (self.teacher_weights.head if self.teacher_weights else 0)

    def needs(self, rollouts: Sequence[Rollout], *, alone: bool = False) -> float:
        """The most a micro-batch of `rollouts` takes, gradients of others included unless it is a step `alone`."""
        accumulated = 0 if alone else self.gradients
        return max(self.scoring(rollouts, accumulated), self.learning(rollouts, accumulated))

    def least(self, prompt: int, tokens: int) -> float:
        """What is there beside the student's weights in the smallest step: the teachers' weights, the optimizer's
        averages and a micro-batch of one rollout of `tokens` tokens after a prompt of `prompt`."""
        rollout = Rollout(Prompt(0, "", (0,) * prompt, (0,) * prompt), 0, (0,) * tokens, False)
        return self.weights - self.student_weights.resident + 2 * self.gradients + self.needs([rollout]) + WORKSPACE

    def budget(self, config: Config, runtime: Runtime, free: float) -> float:
        """What a micro-batch may take where `free` bytes are free now, the optimizer's averages not yet made.

        Ranks on a CPU share its memory. No more than what preflight calls near to the limit. An explicit number of
        rollouts goes before any bytes.
        """
        asked = config.training.memory_budget_gib
        if config.training.micro_batch is not None:
            return float(sys.maxsize)
        if asked != "auto":
            return asked * GIB
        ranks = runtime.world_size if runtime.device.type == "cpu" else 1
        free, held = free / ranks, self.weights + 2 * self.gradients + WORKSPACE
        return max(0.0, min(SHARE * (free - 2 * self.gradients), NEAR * (free + self.weights) - held))

    def split(self, rollouts: Sequence[Rollout], budget: float, most: int | None) -> list[list[Rollout]]:
        """Neighbours that take `budget` bytes and are `most` at most, in order; never less than one rollout.

        Rollouts of one prompt stay together where they fit: their prompt is then encoded once.
        """

        def fits(micro: list[Rollout]) -> bool:
            return len(micro) <= (most or len(micro)) and self.needs(micro) <= budget

        if rollouts and len(rollouts) <= (most or len(rollouts)) and self.needs(rollouts, alone=True) <= budget:
            return [[*rollouts]]
        micros: list[list[Rollout]] = []
        for _, neighbours in groupby(rollouts, key=lambda r: r.prompt.index):
            group = list(neighbours)
            for part in [group] if fits(group) else [[rollout] for rollout in group]:
                if micros and fits([*micros[-1], *part]):
                    micros[-1] += part
                else:
                    micros.append(part)
        return micros

    def step(self, config: Config, runtime: Runtime, prompts: Sequence[Prompt], horizon: int, free: float) -> Memory:
        """What a step on `prompts` (this rank's) needs whose rollouts have `horizon` tokens, divided as a step that
        began with `free` bytes beside the weights would be."""
        samples = config.rollout.samples_per_prompt
        longest = [Rollout(prompt, sample, (0,) * horizon, False) for prompt in prompts for sample in range(samples)]
        budget = self.budget(config, runtime, free)
        micros = self.split(longest, budget, config.training.micro_batch)
        accumulated = self.gradients if len(micros) > 1 else 0
        own, largest = self.student_weights, max(micros, key=self.needs)
        kept, tokens = sum(self.student.training(largest, checkpointing=self.checkpointing)), count(largest)
        cache, drawn, copy = self._rollout(config, runtime, longest, free, kept=self.keeps and not accumulated)
        served = config.rollout.engine == "server"
        scored = self.teacher_weights.gathered if self.teacher_weights else 0
        items = Items(
            student_weights=own.resident / GIB,
            teacher_weights=(self.weights - own.resident) / GIB,
            optimizer_states=2 * self.gradients / GIB,
            gradients=self.gradients / GIB,
            gathered_layers=max(self._gathered + own.backward, scored) / GIB,
            generation_copy=copy / GIB,
            kv_cache=cache / GIB,
            sampling=drawn / GIB,
            teacher_scoring=(self.scoring(largest, self.gradients) - self.gradients - scored) / GIB,
            activations=(self._hidden(tokens) + kept) / GIB,
            logits=(self._divergence(tokens) + self.head) / GIB,
            micro_batch=max(len(micro) for micro in micros),
        )
        return Memory(
            weights=self.weights / GIB,
            states=2 * self.gradients / GIB,
            rollout=(cache + drawn + copy + (0 if served or (own.whole and copy >= own.whole) else own.gathered)) / GIB,
            teacher=max(self.scoring(micro, accumulated) for micro in micros) / GIB,
            student=max(self.learning(micro, accumulated) for micro in micros) / GIB,
            optimizer=self.gradients / GIB,  # norms are numbers, and AdamW is fused
            items=items,
        )

    def _rollout(
        self, config: Config, runtime: Runtime, rollouts: Sequence[Rollout], free: float, *, kept: bool
    ) -> tuple[float, float, float]:
        """Bytes of the KV cache, of prompts' passes and drawing, and of weights in another form; none where a server
        samples. `kept`: the prompts' passes stay for training."""
        if config.rollout.engine == "server":
            return 0.0, 0.0, 0.0
        prompts = {r.prompt.index: len(r.prompt.token_ids) for r in rollouts}
        decoded, longest = rows(config, runtime.world_size)[1], max(prompts.values())
        total = longest + len(rollouts[0].completion_ids)
        places = total if runtime.device.type == "cuda" else grown(longest, total - 1, self.student.layers)
        passed = sum(sorted(prompts.values())[-decoded:]) * self.student.passing
        if kept:
            passed = self.student.prompts(rollouts)
            passed += self.teacher.between(rollouts) if self.teacher else 0.0
        # Gathered whole where that fits (models/sharded.py); else layer by layer for every token.
        whole = self.student_weights.whole
        copy = whole if whole <= SHARE * (free - 2 * self.gradients) else 0
        copy += self.copies if self.copies <= COPIED * free else 0
        return self.student.keys * places * decoded, self.drawing * decoded + passed, copy


def grown(prompt: int, total: int, layers: int) -> float:
    """Places of a KV cache that began with `prompt` tokens and grew to hold `total` (`rollout.cache`): one layer is
    there twice while it grows."""
    before, places = 0, prompt + max(64, prompt // 2)
    while places < total:
        before, places = places, places + 1 + max(64, (places + 1) // 2)
    return places + before / layers


def _heaviest(passes: Sequence[Passes]) -> Passes | None:
    """The passes of the teacher that needs most; hidden states are kept of all of them."""
    most = max(passes, key=lambda p: p.passing + p.keys, default=None)
    return most and replace(most, hidden=sum(p.hidden for p in passes))


def _together(teachers: Sequence[CausalModel], shards: int | None, visits: bool, config: Config) -> Weights | None:
    """The weights of all teachers, beside the student's; of those that come one after the other, all heads and the
    largest rest."""
    weights = [Weights.of(teacher, shards) for teacher in teachers]
    if not visits:
        own = 0 if config.teacher_is_start else sum(w.resident for w in weights)
        return replace(weights[0], resident=own) if weights else None
    heads = [sum(p.numel() * p.element_size() for p in model.projection.parameters()) for model in teachers]
    largest = max(own.resident - head for own, head in zip(weights, heads, strict=True))
    return replace(weights[0], resident=sum(heads), gathered=largest)


def free_bytes(device: torch.device, groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be had on `device`, what torch holds in reserve included; on a CPU no more than a
    container's limit leaves (control groups of both versions)."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return min([int(lines["MemAvailable"].split()[0]) * 1024, *_left_by_limits(groups)])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_by_limits(groups: Path) -> Iterator[int]:
    """Bytes below each limit of this process's control groups; file pages that can be dropped do not count as used."""
    for limit, used in (
        (groups / "memory.max", "memory.current"),
        (groups / "memory/memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if limit.exists() and limit.read_text().strip() != "max":
            stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
            taken = int(limit.with_name(used).read_text()) - int(stat.get("inactive_file", 0))
            yield max(0, int(limit.read_text()) - taken)


def copies(model: CausalModel) -> int:
    """Bytes of the weights that decoding copies (`CausalModel.copied_weights`)."""
    head: Any = model.projection.weight
    numbers = model.vocabulary * head.shape[1]
    return copied_bytes(model.backbone) + (4 * numbers if head.dtype == torch.float32 and lays_out(numbers) else 0)


def _logits(divergence: DivergenceConfig, joined: bool, blocks: float) -> float:
    """Float32 tensors of [chunk, vocabulary] alive at once in the divergence (losses/chunked.py); three of them may be
    as small as a part `blocks` of it."""
    match divergence:
        case ReverseKL(support=FullSupport()):  # its gradient takes the place of the student's logits
            return (4 if joined else 2) + 3 * blocks
        case GeneralizedJSD():
            return 10
        case _:
            return 7
