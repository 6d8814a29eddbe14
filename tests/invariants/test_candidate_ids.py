"""The engine reports the student's most probable ids of every sampled position, however rows are batched and cached."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from headstart.models.causal import CausalModel
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout.engine import InProcessEngine
from headstart.testing import Architecture, random_model
from recorder import Recorder

V = 46
STOPS = (1, 20, 21, 22, 23)
LENGTHS = (3, 30, 9, 17, 5, 24, 12)
TOKENS = 19
PROMPTS = tuple(
    Prompt(index, str(index), ids, ids)
    for index, length in enumerate(LENGTHS)
    for ids in [tuple(6 + (11 * index + 7 * place * place) % 40 for place in range(length))]
)


@functools.cache
def model(architecture: Architecture) -> CausalModel:
    cut = CausalModel(random_model(architecture, V), V, 0)
    cut.use_fast_paths()
    return cut


def generate(engine: InProcessEngine, candidates: int, batch_size: int | None = None) -> list[Rollout]:
    return engine.generate(
        PROMPTS,
        samples=2,
        max_tokens=TOKENS,
        sampling=Sampling(0.9, 0.95, 0),
        key=(3, "rollout", 7),
        batch_size=batch_size,
        candidates=candidates,
    )


def check(architecture: Architecture, rollouts: list[Rollout], width: int) -> None:
    """Against whole texts through the plain model; as sets, since ids of nearly equal logits may change places."""
    for rollout in rollouts:
        n, prompt = len(rollout.completion_ids), rollout.prompt.token_ids
        assert rollout.candidate_ids.shape == (n, width)
        assert rollout.candidate_ids[:, -1].tolist() == list(rollout.completion_ids)
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *rollout.completion_ids[:-1]]])
            logits_NV = model(architecture).model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        expected = logits_NV.topk(width - 1, dim=-1).values
        told = logits_NV.gather(-1, torch.from_numpy(rollout.candidate_ids[:, :-1]))
        torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-4)
        assert all(len(set(row)) == width - 1 for row in rollout.candidate_ids[:, :-1].tolist())


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("batch_size", [3, None])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_they_are_the_top_of_the_distribution_the_token_was_drawn_from(
    architecture: Architecture, batch_size: int | None, captured: bool
) -> None:
    engine = InProcessEngine(model(architecture), STOPS, Recorder() if captured else None)
    rollouts = generate(engine, 6, batch_size)
    check(architecture, rollouts, 6)
    assert len({len(r.completion_ids) for r in rollouts}) > 3, "rows must end at different times to test anything"
    assert rollouts == generate(InProcessEngine(model(architecture), STOPS), 0), "asking for them changes no draw"


@pytest.mark.parametrize("captured", [False, True])
def test_widths_may_change_from_call_to_call(captured: bool) -> None:
    engine = InProcessEngine(model("llama"), STOPS, Recorder() if captured else None)
    for width in (4, 0, 9, 4):
        rollouts = generate(engine, width)
        if width:
            check("llama", rollouts, width)
        else:
            assert all(r.candidate_ids is None for r in rollouts)


@pytest.mark.parametrize("captured", [False, True])
def test_the_sampled_token_alone_and_more_than_there_are(captured: bool) -> None:
    engine = InProcessEngine(model("llama"), STOPS, Recorder() if captured else None)
    for rollout in generate(engine, 1):
        assert np.array_equal(rollout.candidate_ids, np.array(rollout.completion_ids)[:, None])
    for rollout in generate(engine, V + 4):
        assert (rollout.candidate_ids[:, V:-1] == -1).all()
        assert {*rollout.candidate_ids[0, :V].tolist()} == {*range(V)}


def test_those_who_watch_get_them_with_the_rollout() -> None:
    told: list[Rollout] = []
    engine = InProcessEngine(model("llama"), STOPS)
    rollouts = engine.generate(
        PROMPTS[:2],
        samples=1,
        max_tokens=4,
        sampling=Sampling(),
        key=(0, "rollout", 0),
        finished=told.append,
        candidates=3,
    )
    for rollout in told:
        (same,) = (r for r in rollouts if r.prompt is rollout.prompt)
        assert np.array_equal(rollout.candidate_ids, same.candidate_ids)
