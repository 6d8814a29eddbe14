"""What a step has to compute and move, from shapes alone, and how fast this machine can: the floor under any trainer.

The formulas are explained in docs/explanation/cost-model.md. A phase cannot take less than its FLOPs at a measured
product rate, nor less than its bytes at a measured copy rate.

Which product rate decides what the floor means. `best_rates` has one for all phases, that of the largest products (the
only floor until November 2026). A decode step multiplies a few rows with weights that no cache holds, and no kernel
reaches this rate there: for SmolLM2's shape and 16 rows half of it. So `shape_rates` measures every phase with the
products that it consists of: their rows, inputs and outputs, the better of MKL and oneDNN for each, and while decoding
all layers' weights and all keys and values in turn, as they come from memory. What is left over this floor is not in
the products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        return max(self.linear / rates.linear + self.attention / rates.attention, self.moved / rates.bytes)


@dataclass(frozen=True)
class Rates:
    """The best this machine was seen to do: FLOPs (products with weights, attention) and bytes (read plus written) per
    second."""

    linear: float
    attention: float
    bytes: float

    def best(self, other: Rates) -> Rates:
        return Rates(*(max(getattr(self, x), getattr(other, x)) for x in ("linear", "attention", "bytes")))


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

    Every prompt is encoded once by each model; completions are decoded, then scored in one pass with gradients. A
    teacher with a tokenizer of its own is counted with as many tokens as the student's. Biases are not counted.
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
    trained = adapters or layers_s + (1 if s.tied else 2) * s.hidden * V
    judged = t.hidden * work.judged_ids
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
            2 * M * ((1 + back) * s.hidden * V + judged),
            0,
            size * (2 * s.hidden * V + judged),
            M * (V + work.judged_ids),
        ),
        # Weight, gradient and two averages are read; all but the gradient are written. Adapters are float32.
        "optimizer": Cost(moved=7 * trained * (4 if work.lora else size)),
    }


def floor(work: Workload, lengths: Sequence[int], rates: Rates | Mapping[str, Rates]) -> dict[str, float]:
    """Seconds of one step by phase that this machine could not beat at these rates."""
    by_phase = dict.fromkeys(PHASES, rates) if isinstance(rates, Rates) else rates
    return {name: cost.seconds(by_phase[name]) for name, cost in costs(work, lengths).items()}


@dataclass(frozen=True)
class Product:
    """`batch` products of `[rows, inner]` and `[inner, columns]`, in every layer or once a pass. Weights and keys are
    stored the other way round, values are not."""

    rows: int
    inner: int
    columns: int
    batch: int = 1
    layered: bool = True
    turned: bool = True

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.rows * self.inner * self.columns

    def right(self, work: Workload) -> Tensor:
        """A right-hand side as `[batch, columns, inner]`."""
        shape = (self.columns, self.inner) if self.turned else (self.inner, self.columns)
        found = torch.randn(self.batch, *shape, device=work.device, dtype=work.dtype)
        return found if self.turned else found.mT


MOST_ROWS = 4096
"""Nothing is measured with more rows: the rate no longer grows."""
HEAD_ROWS, QUERY_ROWS, KEYS = 256, 128, 512
"""Rows of a block of the head's logits; queries and keys of a block of attention, as in PyTorch's kernel. Larger ones
are no faster and would be written to memory."""
FRESH = 512 * 2**20
"""Bytes after which a weight is no longer in a cache."""


def weight_products(shape: Shape, rows: int) -> list[Product]:
    """A layer's: q, k and v joined, o, gate and up joined, down."""
    heads, joined = shape.heads * shape.head_dim, shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    sides = (shape.hidden, joined), (heads, shape.hidden), (shape.hidden, 2 * shape.intermediate)
    return [Product(rows, *side) for side in (*sides, (shape.intermediate, shape.hidden))]


def backward_products(forward: Sequence[Product], weights: bool) -> list[Product]:
    """The gradients of the inputs and, if wanted, of the weights."""
    inputs = [Product(p.rows, p.columns, p.inner) for p in forward]
    return inputs + [Product(p.inner, p.rows, p.columns) for p in forward if weights]


def attention_products(shape: Shape, queries: int, keys: int, batch: int = 1) -> list[Product]:
    """Scores and values; the query heads of one key head stand side by side."""
    rows, batch = queries * shape.heads // shape.kv_heads, batch * shape.kv_heads
    return [Product(rows, shape.head_dim, keys, batch), Product(rows, keys, shape.head_dim, batch, turned=False)]


def decode_attention(shape: Shape, prompt: int, tokens: int, prompts: int, samples: int) -> list[Product]:
    """Of one token, half way through. The samples of a prompt stand side by side before its keys and values."""
    if samples == 1:
        return attention_products(shape, 1, prompt + tokens // 2, prompts)
    own = attention_products(shape, 1, max(1, tokens // 2), prompts * samples)
    return attention_products(shape, samples, prompt, prompts) + own


def phase_products(work: Workload, lengths: Sequence[int]) -> dict[str, tuple[list[Product], list[Product]]]:
    """By phase what its products with weights and its attention consist of, in proportion. Adapters are left out."""
    s, t, B = work.student, work.teacher, len(lengths) * work.samples
    prompt, fed = (min(MOST_ROWS, n) for n in (sum(lengths), sum(lengths) + B * (work.tokens - 1)))
    length = sum(lengths) // len(lengths) + work.tokens
    head = [Product(HEAD_ROWS, s.hidden, work.vocabulary)]

    def block(shape: Shape) -> list[Product]:
        return attention_products(shape, max(1, QUERY_ROWS * shape.kv_heads // shape.heads), min(KEYS, length))

    own = weight_products(s, fed)
    return {
        "prompt": (weight_products(s, prompt), block(s)),
        "decode": (
            [*weight_products(s, B), Product(B, s.hidden, work.vocabulary, layered=False)],
            decode_attention(s, length - work.tokens, work.tokens, len(lengths), work.samples),
        ),
        "teacher": (weight_products(t, fed), block(t)),
        "student": (own + backward_products(own, work.lora is None), block(s)),
        "head": (
            head + backward_products(head, work.lora is None) + [Product(HEAD_ROWS, t.hidden, work.judged_ids)],
            [],
        ),
        "optimizer": ([], []),
    }


Kernel = Callable[[Tensor, Tensor], Tensor]
"""Left `[batch, rows, inner]` times right `[batch, columns, inner]`, turned."""


def shape_rates(work: Workload, lengths: Sequence[int], repeats: int = 3) -> dict[str, Rates]:
    """By phase the rates of its own products; see the module. Bytes have the copy rate everywhere."""
    copied, found = copy_rate(work, repeats), {}
    for phase, kinds in phase_products(work, lengths).items():
        layers = work.student.layers if phase == "decode" else 1
        rates = [_rate(work, products, layers, repeats) if products else 1.0 for products in kinds]
        found[phase] = Rates(*rates, copied)
    return found


def _rate(work: Workload, products: Sequence[Product], layers: int, repeats: int) -> float:
    """FLOPs per second of one pass over all layers' products, each by the kernel that is best for it.

    Layers beyond FRESH bytes are not made: what they hold is as far away as what the first ones do.
    """
    rights = {p: p.right(work) for p in products}
    lefts = {p: torch.randn(p.batch, p.rows, p.inner, device=work.device, dtype=work.dtype) for p in products}
    kernels = {p: _best_kernel(work, lefts[p], rights[p]) for p in products}
    layered, once = [p for p in products if p.layered], [p for p in products if not p.layered]
    made = max(1, min(layers, int(FRESH / sum(rights[p].nbytes for p in layered or products))))
    sets = [[(p, rights[p] if i == 0 else p.right(work)) for p in layered] for i in range(made)]
    calls = [call for i in range(layers) for call in sets[i % made]] + [(p, rights[p]) for p in once]

    def run() -> None:
        for p, right in calls:
            kernels[p](lefts[p], right)

    return sum(p.flops for p, _ in calls) / _fastest(work, run, repeats)


def _best_kernel(work: Workload, left: Tensor, right: Tensor) -> Kernel:
    """MKL's or oneDNN's product, whichever is faster here."""

    def several(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left, right.mT)

    def plain(left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left[0], right[0].T)

    def one_dnn(left: Tensor, right: Tensor) -> Any:
        return torch.ops.mkldnn._linear_pointwise(left[0], right[0], None, "none", [], "")

    if len(left) > 1:
        return several
    if work.device != "cpu" or not torch.backends.mkldnn.is_available():
        return plain
    return min((plain, one_dnn), key=lambda kernel: _fastest(work, lambda: kernel(left, right), 1))


def best_rates(work: Workload, repeats: int = 5) -> Rates:
    """The best product rate over the workload's largest shapes, and the copy rate."""
    s, t = work.student, work.teacher
    rows = work.prompts * (100 + work.samples * work.tokens)
    shapes = {(min(rows, MOST_ROWS), x.hidden, x.intermediate) for x in (s, t)}
    shapes |= {(HEAD_ROWS, s.hidden, work.vocabulary), (HEAD_ROWS, t.hidden, work.judged_ids)}
    flops = 0.0
    for m, k, n in shapes:
        a = torch.randn(m, k, device=work.device, dtype=work.dtype)
        b = torch.randn(n, k, device=work.device, dtype=work.dtype)
        out = torch.empty(m, n, device=work.device, dtype=work.dtype)
        flops = max(
            flops, 2.0 * m * k * n / _fastest(work, lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out), repeats)
        )
    return Rates(flops, flops, copy_rate(work, repeats))


def copy_rate(work: Workload, repeats: int = 5) -> float:
    """Bytes per second of copying as much as the student weighs (small models stay in a cache, which then counts)."""
    s = work.student
    weights = s.layers * layer_weights(s) + s.hidden * work.vocabulary
    source = torch.ones(weights, device=work.device, dtype=work.dtype)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    return copied / _fastest(work, lambda: target.copy_(source), repeats)


def _fastest(work: Workload, run: Callable[[], object], repeats: int) -> float:
    """Seconds of one `run`: the fastest of `repeats` bursts of about 20 ms."""

    def burst(count: int) -> float:
        start = now(work.device)
        for _ in range(count):
            run()
        return (now(work.device) - start) / count

    count = max(1, int(0.02 / max(burst(1), 1e-7)))
    return min(burst(count) for _ in range(repeats))


def now(device: str) -> float:
    """The clock of all measurements: CPU seconds of this process, which other work on the machine does not lengthen;
    on a GPU wall seconds, when all that was launched is done."""
    if device == "cpu":
        return time.process_time()
    synchronize(device)
    return time.perf_counter()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
