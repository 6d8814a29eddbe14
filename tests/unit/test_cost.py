"""The cost of a step: GiB against what torch allocates, seconds against steps that are really made."""

from __future__ import annotations

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
from headstart.models.memory import GIB, Memory, rows
from headstart.records import Prompt
from headstart.testing import Architecture
from headstart.train.step import train_step
from support import allocated, make_config, make_parts, world

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
    found = memory(pair, parts.config, parts.prompts, horizon)
    measured = allocated(lambda: [train_step(parts, step, 0) for step in (0, 1)])
    print('RATIO', architecture, overrides, (found.peak - found.weights) * GIB / measured)
    assert 1 / 1.5 < (found.peak - found.weights) * GIB / measured < 1.5


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


def test_the_line_through_two_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock with known answers: 5 ms and 1 ns per FLOP to decode, 2 ns per FLOP to judge, the optimizer constant.

    A FLOP of attention counts 2.5 times; it has 4 of them per layer, head, head's size and pair of tokens."""
    pair, config = open_pair(tiny()), tiny()
    prompts = _prompts(pair)
    prompt = sum(len(p.token_ids) for p in prompts) / len(prompts)

    def flops(model: Any, tokens: float, head: int) -> float:
        config, products = model.config, {n: p for n, p in model.named_parameters() if n.endswith("proj.weight")}
        linear = 2 * tokens * (sum(p.numel() for p in products.values()) + head * config.hidden_size)
        queries = sum(len(p) for n, p in products.items() if "q_proj" in n)
        return linear + 2.5 * 4 * queries * (tokens * prompt + tokens**2 / 2)

    def clock(decoded: float, judged: list[int]) -> Seconds:
        teacher = [2e-9 * flops(pair.teacher.model, n, 0) for n in judged]
        decoding = 0.005 + 1e-9 * flops(pair.student.model, decoded, pair.vocabulary.size)
        return Seconds(decoding, sum(teacher) / len(teacher), 0.0, 0.25)

    def assert_equal(found: Seconds | None, expected: Seconds) -> None:
        assert found == Seconds(*(pytest.approx(getattr(expected, phase)) for phase in Seconds.__slots__))

    monkeypatch.setattr(cost, "_time_step", lambda pair, config, prompts, tokens: clock(tokens, [tokens]))
    short, full = estimate(pair, config, prompts, [16, 1000])
    assert_equal(short.seconds, clock(16, [16]))
    assert_equal(full.seconds, clock(1000, [1000]))
    assert full.seconds is not None
    assert short.seconds is not None
    assert full.seconds.teacher > 1.2 * short.seconds.teacher / 16 * 1000, "more than in proportion"
    stopped = estimate(pair, config, prompts, [16, 1000], lengths=[30, 100])
    assert_equal(stopped[0].seconds, clock(16, [16]))
    assert_equal(stopped[1].seconds, clock(100, [30, 100]))
    assert stopped[1].memory == full.memory
    pair.teacher.packs = False
    padded = estimate(pair, config, prompts, [1000], lengths=[30, 100])
    assert_equal(padded[0].seconds, clock(100, [100]))


def test_a_noisy_clock_never_gives_negative_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(pair: Pair, config: Config, prompts: Any, tokens: int) -> Seconds:
        return Seconds(1 / tokens, float(tokens > 20), 0.5, 0.1)

    monkeypatch.setattr(cost, "_time_step", step)
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
    assert Memory(weights=1, states=2, rollout=3, teacher=9, student=4, optimizer=5).peak == 12
