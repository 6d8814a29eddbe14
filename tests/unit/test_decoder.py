"""Fast decoding gives the hidden states, and so the rollouts, of the model's own forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headstart.config.schema import LoraTuning
from headstart.models.causal import CausalModel
from headstart.models.lora import add_lora
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout.engine import InProcessEngine
from headstart.testing import Architecture, random_model

V = 46
PROMPTS = [Prompt(i, str(i), tuple(range(2, 5 + i % 7)), ()) for i in range(12)]


def model(architecture: Architecture, *, lora: bool = False) -> CausalModel:
    made = random_model(architecture, V)
    if lora:
        made = add_lora(made, LoraTuning(r=4), 0)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)  # zero at first, which would hide a forgotten adapter
    return CausalModel(made, V, 0)


def rollouts(m: CausalModel, batch_size: int | None = None) -> list[Rollout]:
    engine, sampling = InProcessEngine(m, (1, 2)), Sampling(0.8, 0.95, 0)
    return engine.generate(
        PROMPTS, samples=2, max_tokens=24, sampling=sampling, key=(0, "test", 0), batch_size=batch_size
    )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_rollouts_are_the_same_whatever_decodes(architecture: Architecture, lora: bool) -> None:
    m = model(architecture, lora=lora)
    own = rollouts(m)
    assert len({len(r.completion_ids) for r in own}) > 3, "rows must leave the batch at different times"
    assert m.use_fast_decoding()
    assert rollouts(m) == own
    assert rollouts(m, batch_size=5) == own


def test_hidden_states_equal_the_models_own_in_float64() -> None:
    m = CausalModel(random_model("qwen3", V).double(), V, 0)
    assert m.use_fast_decoding()
    assert m.decoder is not None
    ids_BT = torch.randint(2, V, (3, 9), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0  # left padding
    position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    from transformers import DynamicCache

    cache = DynamicCache(config=m.backbone.config)
    with torch.no_grad():
        own = m.backbone(input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT).last_hidden_state[:, -1]
        m.backbone(
            input_ids=ids_BT[:, :-1], attention_mask=mask_BT[:, :-1], position_ids=position_BT[:, :-1],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        found = m.decoder.step(ids_BT[:, -1], position_BT[:, -1], mask_BT, cache)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)  # norms and rotations are float32 inside


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "cohere", "phi"])
def test_other_families_decode_as_before(architecture: Architecture) -> None:
    m = model(architecture)
    assert not m.use_fast_decoding()
    assert m.decoder is None


def test_a_decoder_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model("llama")
    from headstart.models import decoder

    kept = decoder._layer
    monkeypatch.setattr(decoder, "_layer", lambda layer: replace(kept(layer), scaling=2 * layer.self_attn.scaling))
    assert not m.use_fast_decoding()
