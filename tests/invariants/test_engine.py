"""Refilled batches decode what one row alone, without cache and without padding, would decode."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from headstart.models.causal import CausalModel
from headstart.models.memory import LARGEST, free_bytes
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout import engine as engine_module
from headstart.rollout.decoding import Decoding
from headstart.rollout.engine import InProcessEngine
from headstart.rollout.memory import fitting_batch
from headstart.rollout.sampling import sample_tokens
from headstart.streams import uniforms
from headstart.testing import Architecture, random_model
from recorder import Recorder

VOCABULARY = 46
STOPS = (1, 20, 21, 22, 23)
KEY = (3, "rollout", 7)
SAMPLING = Sampling(0.9, 0.95, 0)
LENGTHS = (3, 30, 9, 17, 5, 24, 12, 2, 30)
"""Prompt lengths; the sliding windows of Gemma hold 8 tokens."""
MAX_TOKENS = 15
ENGINES: tuple[Architecture, ...] = ("llama", "qwen3", "gemma2", "gemma3")


@functools.cache
def model(architecture: Architecture) -> CausalModel:
    made = random_model(architecture, VOCABULARY)
    assert getattr(made.config, "sliding_window", None) in (None, 8)
    return CausalModel(made, VOCABULARY, 0)


PROMPTS = tuple(
    Prompt(index, str(index), ids, ids)
    for index, length in enumerate(LENGTHS)
    for ids in [tuple(6 + (11 * index + 7 * place * place) % 40 for place in range(length))]
)


@functools.cache
def alone(architecture: Architecture, prompt: Prompt, sample: int) -> tuple[int, ...]:
    """The reference: the whole text through the plain model for every token."""
    tokens: list[int] = []
    draws = torch.from_numpy(uniforms(KEY, [(prompt.index, sample)], 0, MAX_TOKENS)[0])
    with torch.no_grad():
        for draw in draws:
            ids = torch.tensor([[*prompt.token_ids, *tokens]])
            logits_V = model(architecture).model(input_ids=ids, use_cache=False).logits[0, -1]
            tokens.append(int(sample_tokens(logits_V[None], draw[None], SAMPLING)))
            if tokens[-1] in STOPS:
                break
    return tuple(tokens)


def generate(
    architecture: Architecture, prompts: Sequence[Prompt], samples: int, batch_size: int | None
) -> list[Rollout]:
    return InProcessEngine(model(architecture), STOPS).generate(
        prompts, samples=samples, max_tokens=MAX_TOKENS, sampling=SAMPLING, key=KEY, batch_size=batch_size
    )


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 8, None])
@pytest.mark.parametrize("architecture", ENGINES)
def test_refilled_batches_equal_one_by_one(architecture: Architecture, batch_size: int | None, samples: int) -> None:
    rollouts = generate(architecture, PROMPTS, samples, batch_size)
    expected = [(p, sample, alone(architecture, p, sample)) for p in PROMPTS for sample in range(samples)]
    assert [(r.prompt, r.sample_index, r.completion_ids) for r in rollouts] == expected
    assert all(r.stopped == (r.completion_ids[-1] in STOPS) for r in rollouts)
    lengths = [len(r.completion_ids) for r in rollouts]
    assert max(lengths) == MAX_TOKENS, "some row must reach the horizon"
    assert len(set(lengths)) > 2, "rows must finish at different times to test anything"


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_a_horizon_for_each_prompt_cuts_the_same_rollouts(batch_size: int | None) -> None:
    limits = [1, 15, 4, 4, 9, 15, 2, 15, 6]
    rollouts = InProcessEngine(model("llama"), STOPS).generate(
        PROMPTS, samples=2, max_tokens=limits, sampling=SAMPLING, key=KEY, batch_size=batch_size
    )
    expected = [alone("llama", p, sample)[:n] for p, n in zip(PROMPTS, limits, strict=True) for sample in range(2)]
    assert [r.completion_ids for r in rollouts] == expected
    assert all(r.stopped == (r.completion_ids[-1] in STOPS) for r in rollouts)


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_every_rollout_is_told_as_soon_as_it_ends(batch_size: int | None) -> None:
    heard: list[Rollout] = []
    rollouts = InProcessEngine(model("llama"), STOPS).generate(
        PROMPTS,
        samples=2,
        max_tokens=MAX_TOKENS,
        sampling=SAMPLING,
        key=KEY,
        batch_size=batch_size,
        finished=heard.append,
    )
    assert sorted(heard, key=rollouts.index) == rollouts
    lengths = [len(r.completion_ids) for r in heard]
    if batch_size is None:
        assert lengths == sorted(lengths), "all started together, so the shortest ends first"
    if batch_size == 1:
        assert [len(r.prompt.token_ids) for r in heard] == sorted(
            (len(r.prompt.token_ids) for r in heard), reverse=True
        )


@pytest.mark.parametrize(("samples", "batch_size"), [(1, 4), (3, 4), (5, 2), (2, 1), (4, 100)])
def test_the_batch_size_bounds_the_rows_and_is_used(
    samples: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    draw = engine_module.sample_tokens

    def spy(logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        widths.append(len(logits_BV))
        return draw(logits_BV, uniform_B, sampling)

    monkeypatch.setattr(engine_module, "sample_tokens", spy)
    rollouts = generate("llama", PROMPTS, samples, batch_size)
    assert max(widths) == min(batch_size, len(rollouts))
    assert len(rollouts) == samples * len(PROMPTS)


def test_a_prompt_is_encoded_once_for_the_samples_that_enter_together(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[tuple[Prompt, ...]] = []
    of = Decoding.of
    monkeypatch.setattr(Decoding, "of", lambda m, prompts: encoded.append(tuple(prompts)) or of(m, prompts))
    generate("llama", PROMPTS, 3, None)
    assert [sorted(p.index for p in prompts) for prompts in encoded] == [list(range(len(PROMPTS)))]


def test_waiting_prompts_enter_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    of = Decoding.of
    monkeypatch.setattr(
        Decoding, "of", lambda m, prompts: encoded.extend(len(p.token_ids) for p in prompts) or of(m, prompts)
    )
    generate("llama", PROMPTS, 1, 3)
    assert encoded == sorted(LENGTHS, reverse=True)


def test_the_same_prompt_twice_and_no_prompt_at_all() -> None:
    twice = generate("qwen3", [PROMPTS[1], PROMPTS[0], PROMPTS[1]], 2, 3)
    assert [(r.prompt.index, r.sample_index) for r in twice] == [(1, 0), (1, 1), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert twice[:2] == twice[4:]
    assert generate("qwen3", [], 2, 3) == []


@pytest.mark.parametrize("capture", [None, Recorder()], ids=["growing", "static"])
def test_rows_that_are_done_need_no_further_positions(capture: Recorder | None) -> None:
    """GPT-2 has an embedding for every position and none beyond: rows that wait to leave must not walk past it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": VOCABULARY}
    made = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.2, bos_token_id=1, eos_token_id=1)).eval()
    engine = InProcessEngine(CausalModel(made, VOCABULARY, 0), STOPS[:2], capture)
    prompts = [Prompt(index, str(index), ids, ids) for index in range(60) for ids in [tuple(range(6, 16))]]

    def sample(batch_size: int) -> list[Rollout]:
        return engine.generate(
            prompts, samples=1, max_tokens=30, sampling=Sampling(1.0, 1.0), key=KEY, batch_size=batch_size
        )

    together = sample(16)
    lengths = [len(r.completion_ids) for r in together]
    assert min(lengths) < 10 < lengths.count(30), "some must stop early and some reach the last position"
    assert together == sample(1)


def test_the_batch_that_fits_keeps_its_cache_in_the_memory_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode with the batch chosen for a budget and look at the largest storage the cache ever had."""
    from headstart.rollout.cache import ReservingLayer

    held: dict[int, int] = {}
    update = ReservingLayer.update

    def spy(layer: ReservingLayer, *args: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        found = update(layer, *args, **kwargs)
        if len(found[0]) > 1:  # not the probe
            held[id(layer)] = sum(store.nbytes for store in layer._stores or ())
        return found

    cut, max_tokens = model("llama"), 300
    prompts = [Prompt(index, str(index), ids, ids) for index in range(40) for ids in [tuple(range(6, 36))]]
    budget = 2_000_000
    rows = fitting_batch(cut, prompts, max_tokens, budget)
    assert 4 < rows < 40
    monkeypatch.setattr(ReservingLayer, "update", spy)
    rollouts = InProcessEngine(cut, []).generate(
        prompts[:rows], samples=1, max_tokens=max_tokens, sampling=SAMPLING, key=KEY, batch_size=rows
    )
    assert all(len(r.completion_ids) == max_tokens for r in rollouts)
    layers = sorted(held.values())[-2:]
    assert 0.3 * budget < sum(layers) < budget


def test_the_batch_that_fits_follows_the_memory() -> None:
    def fitting(free: int, max_tokens: int = 100) -> int:
        return fitting_batch(model("gemma3"), PROMPTS, max_tokens, free)

    assert fitting(0) == 1
    assert fitting(10**6) < fitting(2 * 10**6) < fitting(10**12) == LARGEST
    assert fitting(2 * 10**6, max_tokens=1000) < fitting(2 * 10**6) / 4
    assert 10**6 < free_bytes(torch.device("cpu")) < 10**14
    assert 1 <= fitting_batch(model("llama"), PROMPTS, 100) <= LARGEST


@pytest.mark.parametrize(
    ("folder", "limit", "used"),
    [(".", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")],
)
def test_no_more_is_free_than_a_container_may_have(tmp_path: Path, folder: str, limit: str, used: str) -> None:
    """Of 1,000 bytes 700 are taken, 200 of these by file pages that can be dropped."""
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    for name, text in ((limit, "1000\n"), (used, "700\n"), ("memory.stat", "cache 9\ninactive_file 200\n")):
        (group / name).write_text(text)
    assert free_bytes(torch.device("cpu"), tmp_path) == 500
    (group / limit).write_text("max\n")
    assert free_bytes(torch.device("cpu"), tmp_path) > 10**6
