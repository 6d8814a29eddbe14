"""How much memory a training step needs, as a formula: nothing is run, so it costs nothing to ask.

Weights, gradients, optimizer state and caches are counted exactly. What a layer keeps for its backward pass is counted
from its linear layers and norms: within a factor of 1.5 of what torch allocates for the architectures we test, LoRA or
full, with and without gradient checkpointing (tests/unit/test_cost.py measures it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from headstart.config.schema import Config, FullSupport, GeneralizedJSD, ReverseKL
from headstart.diagnose.pair import Pair
from headstart.models.causal import CausalModel
from headstart.models.lora import unwrap
from headstart.numerics.chunked import default_chunk
from headstart.rollout.memory import SAMPLER

GIB = 2**30
NORM = 8
"""Bytes that a norm keeps per element: its input in float32, and its output."""


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

    @property
    def peak(self) -> float:
        return self.weights + self.states + max(self.rollout, self.teacher, self.student, self.optimizer)


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rollouts of a step are on one device, decoded at once, and in one forward and backward pass."""

    step: int
    decoded: int
    micro: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> Rows:
        step = -(-config.training.prompts_per_step // world_size) * config.rollout.samples_per_prompt
        decoded = min(config.rollout.batch_size or step, step)
        return cls(step, decoded, min(config.training.micro_batch or step, step))


def memory(pair: Pair, config: Config, prompt_tokens: int, horizon: int) -> Memory:
    """What a step needs whose longest prompt has `prompt_tokens` and whose rollouts have `horizon` tokens."""
    rows = Rows.of(config, pair.runtime.world_size)
    T = prompt_tokens + horizon
    student, teacher, V = pair.student, pair.teacher, pair.vocabulary.size
    trained = list(student.trainable().values())
    gradients = sum(p.numel() * p.element_size() for p in trained)
    largest = max((p.numel() * p.element_size() for p in trained), default=0)
    cache = _cache_bytes(student) * T * rows.decoded
    tokens = rows.micro * horizon
    chunk = min(config.training.logit_chunk or default_chunk(V), tokens)
    logits = _logit_copies(pair, config) * 4 * chunk * V
    hidden = tokens * (_width(student) * _size(student) + _width(teacher) * _size(teacher))
    # The gradient of a trained head is summed in float32 beside the logits, before any other gradient is there.
    head = sum(4 * p.numel() for p in student.trained_head().parameters)
    accumulated = gradients if rows.micro < rows.step else 0  # of the micro-batches before
    # While keys and values grow, one layer's storage is there twice, and it is up to half wider than needed.
    growing = (1.5 + 1 / _layers(student)) * cache + SAMPLER * V * rows.decoded
    kept, passing = rows.micro * T * kept_bytes(student, T), rows.micro * T * _passing_bytes(student)
    if config.tuning.gradient_checkpointing:  # a layer keeps its input alone; one at a time is computed again
        kept, passing = rows.micro * T * _layers(student) * _width(student) * _size(student), kept / _layers(student)
    clipped = gradients if pair.runtime.device.type == "cuda" else largest  # all at once, or one after another
    return Memory(
        weights=(_weight_bytes(student) + _weight_bytes(teacher)) / GIB,
        states=2 * gradients / GIB,
        rollout=(growing + rows.decoded * prompt_tokens * _passing_bytes(student)) / GIB,
        teacher=(accumulated + hidden + rows.micro * T * _passing_bytes(teacher)) / GIB,
        student=(hidden + kept + head + max(accumulated + logits, gradients + passing)) / GIB,
        optimizer=(gradients + 2 * clipped) / GIB,
    )


def _logit_copies(pair: Pair, config: Config) -> int:
    """Float32 tensors of [chunk, vocabulary] alive at once in the divergence (numerics/chunked.py)."""
    match config.divergence:
        case ReverseKL(support=FullSupport()):  # its gradient takes the place of the student's logits
            return 5 if pair.vocabulary.merge_ids else 3
        case GeneralizedJSD():
            return 10
        case _:
            return 7


def kept_bytes(model: CausalModel, context: int) -> float:
    """Bytes per token that a training forward keeps for its backward, in rows of `context` tokens.

    A linear layer with trained weights keeps its input; its output is kept by the activation, the attention or the
    norm behind it.
    """
    size, width = _size(model), _width(model)
    kept = 0.0
    for module in model.backbone.modules():
        if isinstance(module, nn.Linear):
            kept += module.out_features * size
            if module.weight.requires_grad:
                kept += module.in_features * module.weight.element_size()
        elif "norm" in type(module).__name__.lower():
            kept += width * NORM
    config = _config(model)
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        # Scores and their softmax (float32, and once more as they are used), for every head and pair of tokens.
        kept += config.num_attention_heads * context * (4 + 2 * size) * _layers(model)
    return kept


def _passing_bytes(model: CausalModel) -> float:
    """Bytes per token alive at once in a forward pass that keeps nothing: one layer's widest activations."""
    linears = [m for m in model.backbone.modules() if isinstance(m, nn.Linear)]
    widest = max((m.out_features for m in linears), default=_width(model))
    return 3 * widest * _size(model) + 2 * _width(model) * NORM


def _cache_bytes(model: CausalModel) -> int:
    """Bytes of keys and values per token."""
    config = _config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * _layers(model) * heads * head * _size(model))


def _weight_bytes(model: CausalModel) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.model.parameters(), *model.model.buffers()))


def _config(model: CausalModel) -> Any:
    return unwrap(model.model).config.get_text_config()


def _layers(model: CausalModel) -> int:
    return int(_config(model).num_hidden_layers)


def _width(model: CausalModel) -> int:
    return int(_config(model).hidden_size)


def _size(model: CausalModel) -> int:
    """Bytes of one activation: the type the model computes in, which an adapter's float32 does not change."""
    return int(unwrap(model.model).dtype.itemsize)
