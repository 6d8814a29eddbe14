"""The memory of a training step as a formula: how rollouts are divided into micro-batches that fit, and what is free.

Weights, gradients, optimizer state and KV cache are counted exactly. What a layer keeps for its backward pass is
counted from its linear layers, norms and attention masks: within a factor of 1.5 of what torch allocates for the
architectures we test, LoRA or full, with and without checkpointing (tests/unit/test_cost.py, tests/unit/test_micro.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from headstart.config.schema import Config, DivergenceConfig, FullSupport, GeneralizedJSD, ReverseKL
from headstart.losses.chunked import default_chunk
from headstart.models.causal import CausalModel, setting
from headstart.models.layout import Weights
from headstart.models.lora import unwrap
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt, Rollout

GIB = 2**30
NORM = 8
"""Bytes that a norm keeps per element: its input in float32, and its output."""
VISIBLE = 9
"""Bytes per completion token and token it may attend to: whether it does, and from how far (`records.Packing`)."""
SAMPLER = 48
"""Bytes per vocabulary entry and row while a token is drawn: float32 logits, float64 masses and sums, masks."""
SHARE = 0.7
"""Of the free memory; the rest is for the formula's error and for what the allocator cannot reuse."""
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
    """Under sharding: the student's weights gathered whole for generation; 0 where they fit only layer by layer."""
    kv_cache: float
    sampling: float
    """Prefill of the prompts, and logits while a token is drawn."""
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
        return self.weights + self.states + max(self.rollout, self.teacher, self.student, self.optimizer)


@dataclass(frozen=True, slots=True)
class Passes:
    """Bytes that forward passes of one model hold: per token, and per pair of tokens in an attention mask."""

    packs: bool
    view: Literal["student", "teacher"]
    layers: int
    hidden: int
    """One hidden state."""
    kept: float
    """Per token, by all linear layers and norms, for the backward pass. A linear layer with trained weights keeps its
    input; its output is kept by the activation, the attention or the norm behind it."""
    passing: float
    """Per token alive at once in a pass that keeps nothing: one layer's widest activations."""
    pair: int
    """Per layer and pair: the mask as numbers, or the eager scores and their softmax (float32, and as it is used)."""
    cached: int
    """Keys and values of one token."""
    copied: int
    """The same of a prompt's token beside each of its completions; on a GPU repeated for every head."""

    @classmethod
    def of(cls, model: CausalModel, view: Literal["student", "teacher"], device: str | None = None) -> Passes:
        """`device` is where the model will compute, for one without weights (on the meta device)."""
        base = unwrap(model.model)
        config, size = base.config.get_text_config(), int(model.dtype.itemsize)
        layers, width = int(config.num_hidden_layers), int(config.hidden_size)
        linears = [m for m in model.backbone.modules() if isinstance(m, nn.Linear)]
        norms = sum("norm" in type(m).__name__.lower() for m in model.backbone.modules())
        inputs = sum(m.in_features * m.weight.element_size() for m in linears if m.weight.requires_grad)
        widest = max((m.out_features for m in linears), default=width)
        every = setting(config, "num_attention_heads") or 0  # Mamba has none
        heads = setting(config, "num_key_value_heads") or every
        head = 2 * layers * head_width(config) * size
        return cls(
            packs=model.packs,
            view=view,
            layers=layers,
            hidden=width * size,
            kept=sum(m.out_features for m in linears) * size + inputs + norms * width * NORM,
            passing=3 * widest * size + 2 * width * NORM,
            pair=every * (4 + 2 * size) if getattr(config, "_attn_implementation", "sdpa") == "eager" else size,
            cached=heads * head,
            copied=(every if (device or model.device.type) == "cuda" else heads) * head,
        )

    def forward(self, rollouts: Sequence[Rollout]) -> float:
        """A pass that keeps nothing."""
        tokens, pairs, copied = self._extent(rollouts)
        return tokens * self.passing + pairs * (VISIBLE + self.pair) + copied * self.copied / self.layers

    def training(self, rollouts: Sequence[Rollout], *, checkpointing: bool) -> tuple[float, float]:
        """What a pass keeps for its backward pass, and what that holds beside it, one layer after another."""
        tokens, pairs, copied = self._extent(rollouts)
        kept = tokens * self.kept + self.layers * pairs * self.pair + copied * self.copied
        if checkpointing:  # a layer keeps its input alone; one at a time is computed again
            return pairs * VISIBLE + tokens * self.layers * self.hidden, kept / self.layers
        return pairs * VISIBLE + kept, tokens * self.passing

    def _extent(self, rollouts: Sequence[Rollout]) -> tuple[int, int, int]:
        """Tokens in the linear layers, pairs in the masks, prompt tokens copied to the completions they belong to."""
        prompts = {
            r.prompt.index: len(r.prompt.token_ids if self.view == "student" else r.prompt.teacher_token_ids)
            for r in rollouts
        }
        own = [
            r.aligned.ids if r.aligned is not None and self.view == "teacher" else r.completion_ids for r in rollouts
        ]
        B, P, N = len(rollouts), max(prompts.values()), max(len(ids) for ids in own)
        if self.packs:  # a completion's last token predicts nothing
            return sum(prompts.values()) + sum(len(ids) for ids in own) - B, B * (N - 1) * (P + N - 1), B * P
        return B * (P + N), B * (P + N) ** 2, 0


def head_width(config: Any) -> int:
    """Size of one attention head."""
    return setting(config, "head_dim") or int(config.hidden_size) // (setting(config, "num_attention_heads") or 1)


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
    student_weights: Weights
    teacher_weights: Weights | None
    head: int
    """Float32 sum of a trained head's gradient, which is there before any other gradient."""
    chunk: int
    logits: int
    """Per completion token of a chunk."""
    drawing: int
    """Per row while a token is drawn."""

    @classmethod
    def of(
        cls,
        student: CausalModel,
        teacher: CausalModel | None,
        config: Config,
        *,
        shards: int | None = None,
        device: str | None = None,
    ) -> MicroMemory:
        """From loaded models; or from models without weights (`load_outline`) that will compute on `device`, each held
        by `shards` ranks together (None: whole on every rank)."""
        V = max(model.vocabulary for model in (student, teacher) if model is not None)
        return cls(
            student=Passes.of(student, "student", device),
            teacher=None if teacher is None else Passes.of(teacher, "teacher", device),
            checkpointing=config.tuning.gradient_checkpointing,
            student_weights=Weights.of(student, shards),
            teacher_weights=None if teacher is None else Weights.of(teacher, shards),
            head=sum(4 * p.numel() for p in student.head_parameters),
            chunk=config.training.logit_chunk or default_chunk(V),
            logits=4 * V * _logit_copies(config.divergence, student.events is not None),
            drawing=SAMPLER * student.vocabulary,
        )

    @property
    def weights(self) -> int:
        """Of both models."""
        return self.student_weights.resident + (self.teacher_weights.resident if self.teacher_weights else 0)

    @property
    def gradients(self) -> int:
        return self.student_weights.gradients

    def scoring(self, rollouts: Sequence[Rollout], accumulated: int) -> float:
        """The teacher's pass, beside `accumulated` bytes of gradients of the micro-batches before."""
        if self.teacher is None or self.teacher_weights is None:
            return float(accumulated)
        passes = self.teacher_weights.gathered + self.teacher.forward(rollouts)
        return accumulated + count(rollouts) * self.teacher.hidden + passes

    def learning(self, rollouts: Sequence[Rollout], accumulated: int) -> float:
        """The student's two passes and the divergence between them."""
        kept, passing, logits = self._learning(rollouts)
        backward = self.gradients + self.student_weights.backward + passing
        return self._gathered + kept + self.head + max(accumulated + logits, backward)

    def _learning(self, rollouts: Sequence[Rollout]) -> tuple[float, float, float]:
        """Bytes kept for the backward pass, one layer's beside them, and logits with their gradients."""
        tokens = count(rollouts)
        hidden = tokens * (self.student.hidden + (self.teacher.hidden if self.teacher else 0))
        kept, passing = self.student.training(rollouts, checkpointing=self.checkpointing)
        return hidden + kept, passing, float(self.logits * min(self.chunk, tokens))

    @property
    def _gathered(self) -> int:
        """Whole weights while the student learns: its own, and the teacher's head."""
        return self.student_weights.gathered + (self.teacher_weights.head if self.teacher_weights else 0)

    def needs(self, rollouts: Sequence[Rollout]) -> float:
        """The most a micro-batch of `rollouts` takes, gradients of others included."""
        return max(self.scoring(rollouts, self.gradients), self.learning(rollouts, self.gradients))

    def budget(self, config: Config, runtime: Runtime, free: float) -> float:
        """What a micro-batch may take where `free` bytes are free now, the optimizer's averages not yet made.

        Ranks on a CPU share its memory. An explicit number of rollouts goes before any bytes.
        """
        asked = config.training.memory_budget_gib
        if config.training.micro_batch is not None:
            return float(sys.maxsize)
        if asked != "auto":
            return asked * GIB
        ranks = runtime.world_size if runtime.device.type == "cpu" else 1
        return SHARE * max(0.0, free / ranks - 2 * self.gradients)

    def split(self, rollouts: Sequence[Rollout], budget: float, most: int | None) -> list[list[Rollout]]:
        """Neighbours that take `budget` bytes and are `most` at most, in order; never less than one rollout.

        Rollouts of one prompt stay together where they fit: their prompt is then encoded once.
        """

        def fits(micro: list[Rollout]) -> bool:
            return len(micro) <= (most or len(micro)) and self.needs(micro) <= budget

        if rollouts and fits([*rollouts]):
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

    def step(self, config: Config, runtime: Runtime, prompt_tokens: int, horizon: int, free: float) -> Memory:
        """What a step needs whose longest prompt has `prompt_tokens` and whose rollouts have `horizon` tokens, divided
        as a step that began with `free` bytes beside the weights would be."""
        (step, decoded), samples = rows(config, runtime.world_size), config.rollout.samples_per_prompt
        ids = (0,) * prompt_tokens
        prompts = [Prompt(slot, "", ids, ids) for slot in range(step // samples)]
        longest = [Rollout(prompt, sample, (0,) * horizon, False) for prompt in prompts for sample in range(samples)]
        budget = self.budget(config, runtime, free)
        micros = self.split(longest, budget, config.training.micro_batch)
        accumulated = self.gradients if len(micros) > 1 else 0
        served, own = config.rollout.engine == "server", self.student_weights
        decoded = 0 if served else decoded
        cache = growth(self.student.layers) * self.student.cached * (prompt_tokens + horizon) * decoded
        prefill = min(decoded, len(prompts)) * prompt_tokens * self.student.passing
        drawn = self.drawing * decoded + prefill
        # Gathered whole where that fits (models/sharded.py); else layer by layer for every token.
        copy = 0 if served or own.whole > SHARE * (free - 2 * self.gradients) else own.whole
        largest = max(micros, key=self.needs)
        kept, passing, logits = self._learning(largest)
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
            teacher_scoring=(self.scoring(largest, 0) - scored) / GIB,
            activations=(kept + passing) / GIB,
            logits=(logits + self.head) / GIB,
            micro_batch=max(len(micro) for micro in micros),
        )
        return Memory(
            weights=self.weights / GIB,
            states=2 * self.gradients / GIB,
            rollout=(cache + drawn + (0 if served else copy or own.gathered)) / GIB,
            teacher=max(self.scoring(micro, accumulated) for micro in micros) / GIB,
            student=max(self.learning(micro, accumulated) for micro in micros) / GIB,
            # The norm of one tensor at a time; AdamW is fused.
            optimizer=(self.gradients + 2 * own.largest) / GIB,
            items=items,
        )


def growth(layers: int) -> float:
    """Storage of a growing KV cache over its content: up to half wider than needed, one layer twice while it grows."""
    return 1.5 + 1 / layers


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


def _logit_copies(divergence: DivergenceConfig, joined: bool) -> int:
    """Float32 tensors of [chunk, vocabulary] alive at once in the divergence (losses/chunked.py)."""
    match divergence:
        case ReverseKL(support=FullSupport()):  # its gradient takes the place of the student's logits
            return 5 if joined else 3
        case GeneralizedJSD():
            return 10
        case _:
            return 7
