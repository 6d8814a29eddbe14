"""What a step has to compute and move, from shapes alone, and how fast this machine can: the floor under any trainer.

The formulas are explained in docs/explanation/cost-model.md. A phase cannot take less than its FLOPs at the machine's
best measured product rate, nor less than its bytes at its measured copy rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.workloads import Shape, Workload

PHASES = {
    "prompt": "rollout",
    "decode": "rollout",
    "teacher": "teacher",
    "student": "student",
    "head": "student",
    "optimizer": "optimizer",
}
"""Phase of the model -> the phase of `metrics.jsonl` it is timed in."""


@dataclass(frozen=True)
class Cost:
    """`linear`, `attention`: FLOPs of products with weights, and of queries with keys and values; `moved`: bytes that
    must come from memory; `logits`: numbers over the vocabulary that are made, both models'."""

    linear: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    logits: float = 0.0

    @property
    def flops(self) -> float:
        return self.linear + self.attention

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.moved / rates.bytes)


@dataclass(frozen=True)
class Rates:
    """The best this machine was seen to do: FLOPs and bytes (read plus written) per second."""

    flops: float
    bytes: float


def layer_weights(shape: Shape) -> int:
    return shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads) + 3 * shape.hidden * shape.intermediate


def key_value_weights(shape: Shape) -> int:
    return 2 * shape.hidden * shape.kv_heads * shape.head_dim


def adapter_weights(shape: Shape, rank: int | None) -> int:
    """LoRA parameters of one layer: rank * (inputs + outputs) of its seven projections."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = 2 * (shape.hidden + q) + 2 * (shape.hidden + kv) + 3 * (shape.hidden + shape.intermediate)
    return (rank or 0) * sides


def prompt_pass(shape: Shape, lengths: Sequence[int]) -> Cost:
    """Forward over prompts. The last layer needs keys and values of all tokens, the rest of the last one alone."""
    total, layer, kv = sum(lengths), layer_weights(shape), key_value_weights(shape)
    weights = total * ((shape.layers - 1) * layer + kv) + len(lengths) * (layer - kv)
    pairs = (shape.layers - 1) * sum(p * (p + 1) // 2 for p in lengths) + total
    return Cost(2.0 * weights, 4.0 * shape.heads * shape.head_dim * pairs)


def completion_pass(shape: Shape, lengths: Sequence[int], samples: int, tokens: int) -> Cost:
    """Forward over all completion tokens but the last, each seeing its prompt and what came before."""
    pairs = samples * sum((tokens - 1) * p + tokens * (tokens - 1) // 2 for p in lengths)
    weights = len(lengths) * samples * (tokens - 1) * shape.layers * layer_weights(shape)
    return Cost(2.0 * weights, 4.0 * shape.heads * shape.head_dim * shape.layers * pairs)


def costs(work: Workload, lengths: Sequence[int]) -> dict[str, Cost]:
    """The cost of one step by phase; `lengths` are its prompts' tokens, each of which gets `work.samples` rollouts.

    Every prompt is encoded once by each model; completions are decoded, then scored in one pass with gradients.
    """
    s, t, V, N = work.student, work.teacher, work.vocabulary, work.tokens
    size = work.dtype.itemsize
    rows = len(lengths) * work.samples
    M = rows * N
    layers_s, layers_t = s.layers * layer_weights(s), t.layers * layer_weights(t)
    adapters = s.layers * adapter_weights(s, work.lora)
    own_prompt, own = prompt_pass(s, lengths), completion_pass(s, lengths, work.samples, N)
    judge_prompt, judge = prompt_pass(t, lengths), completion_pass(t, lengths, work.samples, N)
    fed = sum(lengths) + rows * (N - 1)
    trained = adapters or layers_s + s.hidden * V
    # A frozen weight's product has one gradient, a trained one's two; attention's two products have two each.
    back = 1 if work.lora else 2
    cached = 2 * s.layers * s.kv_heads * s.head_dim * ((N - 1) * sum(lengths) + rows * N * (N - 1) // 2)
    return {
        "prompt": Cost(own_prompt.linear + 2 * adapters * sum(lengths), own_prompt.attention, size * layers_s),
        "decode": Cost(
            own.linear + 2 * adapters * rows * (N - 1) + 2 * M * s.hidden * V,
            own.attention,
            size * ((N - 1) * layers_s + N * s.hidden * V + cached),
            M * V,
        ),
        "teacher": Cost(judge_prompt.linear + judge.linear, judge_prompt.attention + judge.attention, size * layers_t),
        "student": Cost(
            (1 + back) * own.linear + back * own_prompt.linear + adapters * (6 * fed - 2 * sum(lengths)),
            3 * own.attention + 2 * own_prompt.attention,
            2 * size * layers_s,
        ),
        "head": Cost(
            2 * M * V * ((1 + back) * s.hidden + t.hidden), 0, size * V * (2 * s.hidden + t.hidden), 2 * M * V
        ),
        # Weight, gradient and two averages are read; all but the gradient are written. Adapters are float32.
        "optimizer": Cost(moved=7 * trained * (4 if work.lora else size)),
    }


def floor(work: Workload, lengths: Sequence[int], rates: Rates) -> dict[str, float]:
    """Seconds of one step by phase that this machine could not beat."""
    return {name: cost.seconds(rates) for name, cost in costs(work, lengths).items()}


def measured_rates(work: Workload, repeats: int = 5) -> Rates:
    """The best product rate over the workload's largest shapes, and the rate of copying as much as the student weighs
    (small models stay in a cache, which is then what counts)."""
    s, t = work.student, work.teacher
    rows = work.prompts * (100 + work.samples * work.tokens)
    shapes = {(rows, x.hidden, x.intermediate) for x in (s, t)} | {(256, x.hidden, work.vocabulary) for x in (s, t)}
    flops = 0.0
    for m, k, n in shapes:
        a = torch.randn(m, k, device=work.device, dtype=work.dtype)
        b = torch.randn(n, k, device=work.device, dtype=work.dtype)
        out = torch.empty(m, n, device=work.device, dtype=work.dtype)
        flops = max(
            flops, 2.0 * m * k * n / _fastest(work, lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out), repeats)
        )
    weights = s.layers * layer_weights(s) + s.hidden * work.vocabulary
    source = torch.ones(weights, device=work.device, dtype=work.dtype)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    return Rates(flops, copied / _fastest(work, lambda: target.copy_(source), repeats))


def _fastest(work: Workload, run: Callable[[], object], repeats: int) -> float:
    """Seconds of one `run`: the fastest of `repeats` bursts of about 20 ms."""

    def burst(count: int) -> float:
        synchronize(work.device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        synchronize(work.device)
        return (time.perf_counter() - start) / count

    count = max(1, int(0.02 / max(burst(2), 1e-7)))
    return min(burst(count) for _ in range(repeats))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
