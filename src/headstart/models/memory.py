"""How much memory a micro-batch takes, as a formula, and how rollouts are divided so that each one fits.

Nothing is run. Gradients and hidden states are counted exactly; what a layer keeps for its backward pass is counted
from its linear layers, norms and attention masks: within a factor of 1.5 of what torch allocates for the architectures
we test, LoRA or full, with and without gradient checkpointing (tests/unit/test_cost.py, tests/unit/test_micro.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from torch import nn

from headstart.config.schema import Config, DivergenceConfig, FullSupport, GeneralizedJSD, ReverseKL
from headstart.losses.chunked import default_chunk
from headstart.models.causal import CausalModel, setting
from headstart.models.lora import unwrap
from headstart.records import Rollout
from headstart.runtime import Runtime

GIB = 2**30
NORM = 8
"""Bytes that a norm keeps per element: its input in float32, and its output."""
SIGHT = 9
"""Bytes per completion token and token it may see: whether it does, and from how far (`records.Packing`)."""
SHARE = 0.7
"""Of the free memory; the rest is for the formula's error and for what the allocator cannot reuse."""


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
    def of(cls, model: CausalModel, view: Literal["student", "teacher"]) -> Passes:
        base = unwrap(model.model)
        config, size = base.config.get_text_config(), int(base.dtype.itemsize)
        layers, width = int(config.num_hidden_layers), int(config.hidden_size)
        linears = [m for m in model.backbone.modules() if isinstance(m, nn.Linear)]
        norms = sum("norm" in type(m).__name__.lower() for m in model.backbone.modules())
        inputs = sum(m.in_features * m.weight.element_size() for m in linears if m.weight.requires_grad)
        widest = max((m.out_features for m in linears), default=width)
        eager = getattr(config, "_attn_implementation", "sdpa") == "eager"
        every = setting(config, "num_attention_heads") or 0  # Mamba has none
        heads = setting(config, "num_key_value_heads") or every
        return cls(
            packs=model.packs,
            view=view,
            layers=layers,
            hidden=width * size,
            kept=sum(m.out_features for m in linears) * size + inputs + norms * width * NORM,
            passing=3 * widest * size + 2 * width * NORM,
            pair=every * (4 + 2 * size) if eager else size,
            cached=2 * layers * heads * head_width(config) * size,
            copied=2 * layers * (every if model.device.type == "cuda" else heads) * head_width(config) * size,
        )

    def forward(self, rollouts: Sequence[Rollout]) -> float:
        """A pass that keeps nothing."""
        tokens, pairs, copied = self._extent(rollouts)
        return tokens * self.passing + pairs * (SIGHT + self.pair) + copied * self.copied / self.layers

    def training(self, rollouts: Sequence[Rollout], *, checkpointing: bool) -> tuple[float, float]:
        """What a pass keeps for its backward pass, and what that holds beside it, one layer after another."""
        tokens, pairs, copied = self._extent(rollouts)
        kept = tokens * self.kept + self.layers * pairs * self.pair + copied * self.copied
        if checkpointing:  # a layer keeps its input alone; one at a time is computed again
            return pairs * SIGHT + tokens * self.layers * self.hidden, kept / self.layers
        return pairs * SIGHT + kept, tokens * self.passing

    def _extent(self, rollouts: Sequence[Rollout]) -> tuple[int, int, int]:
        """Tokens in the linear layers, pairs in the masks, prompt tokens copied to the completions they belong to."""
        prompts = {
            r.prompt.index: len(r.prompt.token_ids if self.view == "student" else r.prompt.teacher_token_ids)
            for r in rollouts
        }
        B, P, N = len(rollouts), max(prompts.values()), max(len(r.completion_ids) for r in rollouts)
        if self.packs:  # a completion's last token predicts nothing
            return sum(prompts.values()) + count(rollouts) - B, B * (N - 1) * (P + N - 1), B * P
        return B * (P + N), B * (P + N) ** 2, 0


def head_width(config: Any) -> int:
    """Size of one attention head."""
    return setting(config, "head_dim") or int(config.hidden_size) // (setting(config, "num_attention_heads") or 1)


def count(rollouts: Sequence[Rollout]) -> int:
    """Completion tokens of `rollouts`."""
    return sum(len(r.completion_ids) for r in rollouts)


@dataclass(frozen=True, slots=True)
class MicroMemory:
    """Bytes that a micro-batch takes beside both models' weights and the optimizer's averages."""

    student: Passes
    teacher: Passes | None
    """None where the teacher is not on this device."""
    checkpointing: bool
    gradients: int
    head: int
    """Float32 sum of a trained head's gradient, which is there before any other gradient."""
    chunk: int
    logits: int
    """Per completion token of a chunk."""

    @classmethod
    def of(
        cls, student: CausalModel, teacher: CausalModel | None, config: Config, merge_ids: tuple[int, ...]
    ) -> MicroMemory:
        V = student.vocabulary
        return cls(
            student=Passes.of(student, "student"),
            teacher=None if teacher is None else Passes.of(teacher, "teacher"),
            checkpointing=config.tuning.gradient_checkpointing,
            gradients=sum(p.numel() * p.element_size() for p in student.trainable().values()),
            head=sum(4 * p.numel() for p in student.trained_head().parameters),
            chunk=config.training.logit_chunk or default_chunk(V),
            logits=4 * V * _logit_copies(config.divergence, merge_ids),
        )

    def scoring(self, rollouts: Sequence[Rollout], accumulated: int) -> float:
        """The teacher's pass, beside `accumulated` bytes of gradients of the micro-batches before."""
        if self.teacher is None:
            return float(accumulated)
        return accumulated + count(rollouts) * self.teacher.hidden + self.teacher.forward(rollouts)

    def learning(self, rollouts: Sequence[Rollout], accumulated: int) -> float:
        """The student's two passes and the divergence between them."""
        tokens = count(rollouts)
        hidden = tokens * (self.student.hidden + (self.teacher.hidden if self.teacher else 0))
        kept, passing = self.student.training(rollouts, checkpointing=self.checkpointing)
        logits = self.logits * min(self.chunk, tokens)
        return hidden + kept + self.head + max(accumulated + logits, self.gradients + passing)

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
        found: list[list[Rollout]] = []
        for _, neighbours in groupby(rollouts, key=lambda r: r.prompt.index):
            group = list(neighbours)
            for piece in [group] if fits(group) else [[rollout] for rollout in group]:
                if found and fits([*found[-1], *piece]):
                    found[-1] += piece
                else:
                    found.append(piece)
        return found


def _logit_copies(divergence: DivergenceConfig, merge_ids: tuple[int, ...]) -> int:
    """Float32 tensors of [chunk, vocabulary] alive at once in the divergence (numerics/chunked.py)."""
    match divergence:
        case ReverseKL(support=FullSupport()):  # its gradient takes the place of the student's logits
            return 5 if merge_ids else 3
        case GeneralizedJSD():
            return 10
        case _:
            return 7
