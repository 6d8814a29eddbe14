"""Refilled batches decode what one row alone, without cache and without padding, would decode."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch

from headstart.models.causal import CausalModel
from headstart.numerics.sampling import sample_tokens
from headstart.numerics.streams import uniforms
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout import engine as engine_module
from headstart.rollout.decoding import Decoding
from headstart.rollout.engine import InProcessEngine
from headstart.testing import Architecture, random_model

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
