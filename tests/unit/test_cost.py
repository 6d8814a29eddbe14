"""The cost of a step: GiB against what torch allocates, seconds against steps that are really made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from headstart.assemble import cost
from headstart.assemble.cost import Seconds, estimate, memory
from headstart.assemble.pair import Pair, open_pair
from headstart.config.loader import load
from headstart.config.schema import Config
from headstart.models.memory import GIB, WORKSPACE, Memory, MicroMemory, grown, rows
from headstart.records import Prompt
from headstart.rollout.cache import ReservingLayer
from headstart.testing import Architecture
from headstart.train.step import train_step
from support import GOOD, SAFE, allocated, make_config, make_parts, world

LORA = "tuning={type: lora, r: 8}"
HALF = ("student.dtype=bfloat16", "teacher.dtype=bfloat16")
WORLDS: list[tuple[str, Architecture, int, tuple[str, ...]]] = [
    ("full", "llama", 300, ("horizon.tokens=32",)),
    ("lora", "llama", 300, (LORA, "horizon.tokens=32")),
    ("lora half", "llama", 300, (LORA, *HALF, "horizon.tokens=32")),
    ("micro", "phi", 300, ("training.micro_batch=2", "horizon.tokens=32")),
    ("checkpointing", "qwen3", 300, ("tuning.gradient_checkpointing=true", "horizon.tokens=48")),
    ("checkpointing lora", "qwen3", 300, ("tuning={type: lora, r: 8, gradient_checkpointing: true}", *HALF,
                                          "horizon.tokens=48")),
    ("eager", "gemma2", 300, (LORA, "horizon.tokens=40")),
    ("norms", "gemma3", 300, ("horizon.tokens=32",)),
    ("large vocabulary", "qwen3", 20_000, ("horizon.tokens=40",)),
    ("chunked", "llama", 20_000, ("horizon.tokens=40", "training.logit_chunk=32")),
    ("jsd", "llama", 8_000, (LORA, "divergence.type=jsd", "horizon.tokens=24")),
    ("top-k", "llama", 8_000, (LORA, "divergence.support.type=top_k", "horizon.tokens=24")),
    ("decoding", "llama", 300, ("training.micro_batch=1", "rollout.samples_per_prompt=4", "horizon.tokens=40")),
]  # fmt: skip


def prompts_of(tokens: int) -> list[Prompt]:
    return [Prompt(0, "", (0,) * tokens, (0,) * tokens)]


@pytest.mark.filterwarnings("ignore:full fine-tuning")
@pytest.mark.parametrize(("architecture", "words", "overrides"), [w[1:] for w in WORLDS], ids=[w[0] for w in WORLDS])
def test_gib_are_those_torch_allocates(
    tmp_path: Path, architecture: Architecture, words: int, overrides: tuple[str, ...]
) -> None:
    """Two steps, because the optimizer's state is made at the end of the first. The weights were there before."""
    parts, pair = world(tmp_path, architecture, words, *overrides)
    horizon = parts.horizon.tokens(0)
    two = parts.config.training.model_copy(update={"steps": 2})
    found = memory(pair, parts.config.model_copy(update={"training": two}), parts.prompts, horizon)
    measured = allocated(lambda: [train_step(parts, step, 0) for step in (0, 1)])
    apart = MicroMemory.of(pair.student, [pair.teacher], parts.config).student.apart
    low, high = GOOD if apart else SAFE
    assert low < (found.peak - found.weights - WORKSPACE / GIB) * GIB / measured < high


def test_weights_and_states_are_exact(tmp_path: Path) -> None:
    _, pair = world(tmp_path, "llama", 300, LORA)
    found = memory(pair, pair.config, prompts_of(10), 20)
    models = [*pair.student.model.parameters(), *pair.teacher.model.parameters()]
    buffers = [*pair.student.model.buffers(), *pair.teacher.model.buffers()]
    assert found.weights * GIB == sum(4 * t.numel() for t in [*models, *buffers])
    assert found.states * GIB == 8 * sum(p.numel() for p in models if p.requires_grad)


def test_every_knob_moves_memory_the_right_way(tmp_path: Path) -> None:
    _, pair = world(tmp_path, "llama", 300, LORA)

    def peak(prompt: int = 10, horizon: int = 100, **training: Any) -> float:
        changed = pair.config.training.model_copy(update=training)
        return memory(pair, pair.config.model_copy(update={"training": changed}), prompts_of(prompt), horizon).peak

    assert peak(horizon=200) > peak() > peak(horizon=50)
    assert peak(prompt=200) > peak()
    assert peak(prompts_per_step=16) > peak() > peak(micro_batch=2)
    assert peak(logit_chunk=8) < peak(logit_chunk=800)
    checkpointing = pair.config.tuning.model_copy(update={"gradient_checkpointing": True})
    config = pair.config.model_copy(update={"tuning": checkpointing})
    assert memory(pair, config, prompts_of(10), 100).peak < peak()


def test_rows_are_counted_per_rank(tmp_path: Path) -> None:
    config = make_config(tmp_path, "training.prompts_per_step=6", "rollout.samples_per_prompt=3")
    assert rows(config, 1) == (18, 18)
    assert rows(config, 4) == (6, 6)
    config = make_config(tmp_path, "training.micro_batch=4", "rollout.batch_size=2")
    assert rows(config, 1) == (6, 2)


def tiny(*overrides: str) -> Config:
    return load("recipe:tiny-esr", ["evaluation=null", *overrides])


def test_seconds_are_those_of_real_steps(tmp_path: Path) -> None:
    """Estimated from steps of 8 and 32 tokens, measured at 200. A busy machine gets three tries."""
    config = tiny("horizon={type: full, max_tokens: 200}")
    parts = make_parts(tmp_path / "run", config)
    pair = open_pair(config)
    ratios = []
    for step in range(3):
        found = estimate(pair, config, parts.prompts, [200], lengths=[154, 192])[0].seconds
        assert found is not None
        report, _ = train_step(parts, step, 0)
        ratios.append(found.total / sum(report.metrics[f"seconds_{phase}"] for phase in Seconds.__slots__))
        if 0.5 < median(ratios) < 2:
            return
    pytest.fail(f"estimated / measured: {ratios}")


def test_estimating_changes_nothing() -> None:
    config = tiny(LORA)
    pair = open_pair(config)
    prompts = _prompts(pair)
    before = {name: p.clone() for name, p in pair.student.model.state_dict().items()}
    state, mode = torch.get_rng_state(), pair.student.model.training
    heard: list[tuple[int, int]] = []
    costs = estimate(pair, config, prompts, [4, 16], progress=lambda done, total: heard.append((done, total)))
    assert [c.tokens for c in costs] == [4, 16]
    assert heard[-1][0] == heard[-1][1]
    assert all(torch.equal(before[name], p) for name, p in pair.student.model.state_dict().items())
    assert all(p.grad is None for p in pair.student.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.student.model.training is mode


def _prompts(pair: Pair) -> Any:
    from headstart.models.templates import build_prompts
    from headstart.tasks.prompts import load_problems

    p = pair.config.prompts.model_copy(update={"limit": 32})
    return build_prompts(load_problems(p), pair.tokenizer, pair.teacher_tokenizer, p).prompts


RATES = {"teacher": (0.02, 1e-11, 5e-11), "student": (0.03, 2e-11, 7e-11)}
"""Seconds of a known clock: once, per FLOP of linear layers, per FLOP of attention."""


class Clock:
    """In place of steps that are timed: `RATES`, and 5 ms and 2 us per token of context for a decoding step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rates: dict[str, tuple[float, float, float]]) -> None:
        self.rates = rates
        monkeypatch.setattr(cost, "_time_step", self.step)
        monkeypatch.setattr(cost, "_time_rollouts", self.rollouts)

    def decoding(self, prompts: Any, tokens: float) -> float:
        context = sum(len(p.token_ids) for p in prompts) / len(prompts) + tokens / 2
        return 0.1 + tokens * (0.005 + 2e-6 * context)

    def scoring(self, work: Any) -> list[float]:
        return [once + a * work[phase][0] + b * work[phase][1] for phase, (once, a, b) in self.rates.items()]

    def step(self, pair: Pair, config: Config, prompts: Any, tokens: int, given: Any = None) -> Seconds:
        work = cost._work(pair, config, prompts, [tokens], sampled=given is None)
        return Seconds(self.decoding(prompts, tokens), *self.scoring(work), 0.25)

    def rollouts(self, pair: Pair, config: Config, prompts: Any, tokens: int, samples: int | None = None) -> Seconds:
        return Seconds(self.decoding(prompts, tokens), 0.0, 0.0, 0.0)


@pytest.mark.parametrize("longest", [64, 600, 3000])
def test_a_known_clock_is_told_at_every_length(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """Where attention is too little to be timed, its FLOPs count four times a linear layer's."""
    pair, config = open_pair(tiny()), tiny()
    prompts = _prompts(pair)
    rates = RATES if longest > cost.TELLING else {name: (a, b, cost.ATTENTION * b) for name, (a, b, _) in RATES.items()}
    clock, slots = Clock(monkeypatch, rates), cost._spread(pair, config, prompts)
    short, full = estimate(pair, config, prompts, [16, longest])
    for found, tokens in ((short.seconds, 16), (full.seconds, longest)):
        assert found is not None
        teacher, student = clock.scoring(cost._work(pair, config, slots, [tokens]))
        assert found.teacher == pytest.approx(teacher, rel=1e-3)
        assert found.student == pytest.approx(student, rel=1e-3)
        assert found.rollout == pytest.approx(clock.decoding(slots, tokens), rel=0.02)
        assert found.optimizer == 0.25
    stopped = estimate(pair, config, prompts, [longest], lengths=[30, 60])[0]
    assert stopped.seconds is not None
    teacher, student = clock.scoring(cost._work(pair, config, slots, [30, 60]))
    assert (stopped.seconds.teacher, stopped.memory) == (pytest.approx(teacher, rel=0.05), full.memory)


def test_the_work_of_a_batch_in_flops() -> None:
    """2 FLOPs per weight and token, 4 of attention per layer, head, head's size and pair of tokens; three passes of
    what is trained, two of a prompt's that decoding started from; padded where a model does not pack."""
    pair, config = open_pair(tiny()), tiny()
    prompt = Prompt(0, "", (2,) * 10, (2,) * 10)

    def known(model: Any) -> tuple[int, int, int]:
        products = {n: p for n, p in model.named_parameters() if n.endswith("proj.weight")}
        queries = sum(len(p) for n, p in products.items() if "q_proj" in n)
        return 2 * sum(p.numel() for p in products.values()), model.config.hidden_size, 4 * queries

    (W, D, A), (teacher_W, teacher_D, teacher_A) = known(pair.student.model), known(pair.teacher.model)
    G, V = config.rollout.samples_per_prompt, pair.vocabulary.size
    own, pairs = G * 6, G * (6 * 10 + 18)
    work = cost._work(pair, config, [prompt], [6])
    assert work["teacher"] == pytest.approx((teacher_W * (10 + own), teacher_A * (50 + pairs)))
    head = own * V * (2 * (3 * D + teacher_D) + 2 * cost.LOGIT)
    assert work["student"] == pytest.approx((W * (3 * own + 2 * 10) + head, A * (3 * pairs + 2 * 50)))
    pair.teacher.packs = False
    padded = cost._work(pair, config, [prompt, replace(prompt, token_ids=(2,) * 4, teacher_token_ids=(2,) * 4)], [6])
    assert padded["teacher"] == pytest.approx((teacher_W * 2 * G * 16, teacher_A * 2 * G * 16**2))


def test_a_noisy_clock_never_gives_negative_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_time_step", lambda *args: Seconds(1 / args[3], float(args[3] > 20), 0.5, 0.1))
    monkeypatch.setattr(cost, "_time_rollouts", lambda *args: Seconds(1 / args[3], 0.0, 0.0, 0.0))
    config = tiny()
    pair = open_pair(config)
    for found in estimate(pair, config, _prompts(pair), [1, 2000]):
        assert found.seconds is not None
        assert min(found.seconds.rollout, found.seconds.teacher) >= 0


def test_nothing_is_timed_that_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(cost, "_time_step", lambda *_: pytest.fail("timed"))
    config = tiny()
    pair = open_pair(config)
    (found,) = estimate(pair, config, _prompts(pair), [16])
    assert found.seconds is None
    assert found.memory.peak > 0


def test_the_peak_is_the_largest_phase_on_top_of_what_stays() -> None:
    found = Memory(weights=1, states=2, rollout=3, teacher=9, student=4, optimizer=5)
    assert found.peak == 12 + WORKSPACE / GIB


@pytest.mark.parametrize(("prompt", "total"), [(10, 74), (10, 75), (300, 1000), (5, 3000)])
def test_a_cache_grows_as_counted(prompt: int, total: int) -> None:
    """Its places, and those of the layer that grows while the rest have grown already."""
    layer, places, sizes = ReservingLayer(), prompt, []
    layer.update(torch.zeros(1, 1, prompt, 2), torch.zeros(1, 1, prompt, 2))
    while places < total:
        sizes.append(layer._stores[0].shape[2])  # type: ignore[index]
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        places += 1
    last = layer._stores[0].shape[2]  # type: ignore[index]
    before = max((size for size in sizes if size < last), default=0)
    assert grown(prompt, total, 4) == last + before / 4
