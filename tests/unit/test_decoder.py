"""The fast passes give the hidden states, and so rollouts and gradients, of the model's own forward."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from headstart.config.schema import LoraTuning
from headstart.losses import products
from headstart.losses.products import FEW
from headstart.models import packed, stepper
from headstart.models.causal import CausalModel
from headstart.models.decoder import FastDecoder, Prefill
from headstart.models.lora import add_lora, low_rank
from headstart.models.memory import copies
from headstart.models.stepper import copied_bytes
from headstart.records import PackedPrompts, Prompt, Rollout, Sampling
from headstart.rollout import decoding, memory
from headstart.rollout.cache import ReservingLayer
from headstart.rollout.engine import InProcessEngine
from headstart.teacher.local import LocalTeacher
from headstart.testing import Architecture, random_model

V = 46
PROMPTS = [Prompt(i, str(i), tuple(range(2, 5 + i % 7)), ()) for i in range(12)]


def model(architecture: Architecture, *, lora: bool = False) -> CausalModel:
    made = random_model(architecture, V)
    if lora:
        made, draws = add_lora(made, LoraTuning(r=4), 0), torch.Generator().manual_seed(0)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                # Zero at first, which would hide a forgotten adapter.
                torch.nn.init.normal_(parameter, std=0.2, generator=draws)
    return CausalModel(made, V, 0)


def rollouts(m: CausalModel, batch_size: int | None = None, prefill: Prefill | None = None) -> list[Rollout]:
    engine, sampling = InProcessEngine(m, (1, 2)), Sampling(0.8, 0.95, 0)
    shared: dict[str, Any] = {"batch_size": batch_size, "prefill": prefill}
    return engine.generate(PROMPTS, samples=2, max_tokens=24, sampling=sampling, key=(0, "test", 0), **shared)


@pytest.mark.parametrize("share", [False, True], ids=["own prompts", "shared prompts"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_rollouts_are_the_same_whatever_decodes(
    architecture: Architecture, lora: bool, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if share:
        monkeypatch.setattr(decoding, "SHARED", 0)
    m = model(architecture, lora=lora)
    own = rollouts(m)
    assert len({len(r.completion_ids) for r in own}) > 3, "rows must leave the batch at different times"
    assert m.use_fast_decoding()
    assert rollouts(m) == own
    assert rollouts(m, batch_size=9) == own, "some rows enter after others"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_weights_laid_out_for_the_processor_decode_the_same(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model("qwen2", lora=lora)
    own = rollouts(m)
    assert m.use_fast_decoding()
    monkeypatch.setattr(products, "LAYS_OUT", products._ONEDNN)
    monkeypatch.setattr(products, "LARGE", 300)  # adapters are smaller
    assert rollouts(m, batch_size=5) == own
    assert copied_bytes(m.backbone) == sum(
        w.nbytes for n, w in m.backbone.named_parameters() if "proj.weight" in n or "base_layer.weight" in n
    )


def test_nothing_is_copied_where_it_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    m, needed = model("llama", lora=True), copies(model("llama", lora=True))
    m.use_fast_decoding()
    own, entered = rollouts(m), list[int]()
    monkeypatch.setattr(CausalModel, "copied_weights", lambda self: nullcontext(entered.append(1)))
    for free, copied in ((2 * needed, 1), (2 * needed - 1, 0)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        entered.clear()
        assert rollouts(m) == own
        assert len(entered) == copied


def test_adapters_are_multiplied_without_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model("llama", lora=True)
    m.use_fast_paths()
    own, m.model = rollouts(m), m.model.train()
    hidden_MD = m.completion_hidden(m.batch(mixed(), "student"))
    loads = [n for n, module in m.model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(loads) == 14

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an adapter's own forward was called")

    for name in loads:
        monkeypatch.setattr(m.model.get_submodule(name), "forward", never)
    assert rollouts(m) == own
    gradients(m, m.completion_hidden(m.batch(mixed(), "student")))
    assert hidden_MD.requires_grad


@pytest.mark.parametrize("odd", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_other_adapters_are_left_to_peft(odd: dict[str, bool]) -> None:
    made = get_peft_model(random_model("llama", V), LoraConfig(r=4, target_modules="all-linear", **odd))  # type: ignore[arg-type]
    layer = made.get_base_model().model.layers[0].mlp.down_proj
    assert (low_rank(layer) is None) == ("use_rslora" not in odd)
    m = CausalModel(made, V, 0)
    own = rollouts(m)
    assert m.use_fast_decoding()
    assert rollouts(m) == own


@pytest.mark.parametrize("B", [3, FEW + 1], ids=["few rows", "many rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_give_the_models_own_hidden_states(B: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepper, "AHEAD", 8)  # rotations are made anew on the way
    m = CausalModel(random_model("qwen3", V).to(dtype), V, 0)
    assert m.use_fast_decoding()
    assert m.decoder is not None
    ids_BT = torch.randint(2, V, (B, 29), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0  # left padding
    position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    cache, step, first = DynamicCache(config=m.backbone.config), m.decoder.stepper(), 5
    with torch.no_grad():
        own_BTD = m.backbone(input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT).last_hidden_state
        m.backbone(
            input_ids=ids_BT[:, :first], attention_mask=mask_BT[:, :first], position_ids=position_BT[:, :first],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        for t in range(first, ids_BT.shape[1]):
            found_BD = step(ids_BT[:, t], position_BT[:, t], mask_BT[:, : t + 1], cache)
            torch.testing.assert_close(found_BD, own_BTD[:, t], rtol=1e-4, atol=1e-5)  # norms are float32 inside


def test_a_rotation_that_depends_on_the_length_is_left_to_the_model() -> None:
    made = random_model("llama", V)
    made.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    again = type(made)(made.config)
    assert not CausalModel(again, V, 0).use_fast_decoding()


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


# --- scoring in two passes --------------------------------------------------------------------------------------------

LONG = tuple(range(4, 22))
MIXED = [(LONG, (7, 8, 9)), ((6, 7), (9,)), (LONG, tuple(range(10, 40))), ((6, 7, 8), (9, 9)), ((6, 7), (5, 4))]


def mixed() -> list[Rollout]:
    return [Rollout(Prompt(i, str(i), p, p), 0, c, False) for i, (p, c) in enumerate(MIXED)]


def gradients(m: CausalModel, hidden_MD: Tensor) -> list[Tensor]:
    upstream = torch.randn(hidden_MD.shape, generator=torch.Generator().manual_seed(0), dtype=hidden_MD.dtype)
    trained = [parameter for parameter in m.backbone.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((hidden_MD * upstream).sum(), trained))


@pytest.mark.parametrize("apart", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_two_passes_give_the_padded_models_hidden_states_and_gradients(
    architecture: Architecture, lora: bool, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if apart:
        monkeypatch.setattr(packed, "APART", 0)
    m = model(architecture, lora=lora)
    m.model.double().eval()  # LoRA's dropout draws for every row
    padded = m.completion_hidden(m.batch(mixed(), "student"))
    m.use_fast_paths()
    assert m.fast is not None
    found = m.completion_hidden(m.batch(mixed(), "student"))
    torch.testing.assert_close(found, padded, rtol=1e-4, atol=1e-4)  # the model's norms are float32 inside
    for a, b in zip(gradients(m, found), gradients(m, padded), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()
        assert b.any()


class Counted:
    """A decoder whose prompt passes are counted."""

    def __init__(self, decoder: FastDecoder) -> None:
        self.decoder, self.encoded, self.tokens = decoder, 0, 0

    def encode(self, prompts: PackedPrompts) -> Prefill:
        self.encoded += 1
        self.tokens += len(prompts.ids_L)
        return self.decoder.encode(prompts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


def counted(m: CausalModel) -> Counted:
    m.use_fast_paths()
    assert m.decoder is not None
    m.decoder = counter = Counted(m.decoder)  # type: ignore[assignment]
    return counter


def test_prompts_are_encoded_once_for_sampling_and_training() -> None:
    m = model("qwen3")
    counter = counted(m)
    found = rollouts(m)
    alone = m.completion_hidden(m.batch(found, "student"))
    counter.encoded = 0
    made = InProcessEngine(m, (1, 2)).prefill(PROMPTS)
    assert rollouts(m, prefill=made) == rollouts(m, 9, made) == found, "some rows enter after others"
    shared = m.completion_hidden(m.batch(found, "student"), made)
    assert counter.encoded == 1
    assert torch.equal(shared, alone)
    for a, b in zip(gradients(m, shared), gradients(m, alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [False, True], ids=["own prompts", "shared prompts"])
def test_rows_enter_beside_the_prompts_they_begin(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that makes them longer than all that are left in the batch."""
    if share:
        monkeypatch.setattr(decoding, "SHARED", 0)
    m, widened = model("qwen3"), []
    texts = [tuple(4 + (k + i * i) % 40 for i in range(30)) for k in range(6)]
    prompts = [Prompt(8 * k + n, "", text[:n], ()) for k, text in enumerate(texts) for n in (3, 30 - k, 9)]
    limits = [12 if len(p.token_ids) < 10 else 2 for p in prompts]
    pad = ReservingLayer.pad

    def spy(layer: ReservingLayer, places: int) -> None:
        widened.append(places)
        pad(layer, places)

    monkeypatch.setattr(ReservingLayer, "pad", spy)

    def sampled(batch_size: int) -> list[Rollout]:
        engine, sampling = InProcessEngine(m, (1, 2)), Sampling(0.8, 0.95, 0)
        return engine.generate(
            prompts, samples=1, max_tokens=limits, sampling=sampling, key=(0, "test", 0), batch_size=batch_size
        )

    own = sampled(1)
    assert not widened
    counter = counted(m)
    assert sampled(7) == own
    assert widened
    assert counter.tokens < 0.9 * sum(len(p.token_ids) for p in prompts)


def test_other_prompts_than_those_of_a_prefill_are_encoded() -> None:
    m = model("qwen3")
    counter = counted(m)
    found = rollouts(m)
    made = m.prefill([prompt.token_ids for prompt in PROMPTS[:5]], graph=True)
    counter.encoded = 0
    assert rollouts(m, prefill=made) == found
    some = m.completion_hidden(m.batch(found[:6], "student"), made)
    assert counter.encoded == 2, "once for sampling, once for the first prompts"
    assert torch.equal(some, m.completion_hidden(m.batch(found[:6], "student")))


def test_there_is_no_prefill_to_share_with_dropout_checkpointing_or_padding() -> None:
    m = model("qwen3")
    counted(m)
    ids = [prompt.token_ids for prompt in PROMPTS]
    m.model.extra = torch.nn.Dropout(0.1)
    assert m.prefill(ids) is None
    del m.model.extra
    m.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert m.prefill(ids) is None
    m.model.gradient_checkpointing_disable()
    made = m.prefill(ids)
    assert made is not None
    assert not made.hidden_UD.requires_grad, "a graph only where it is asked for"
    m.packs = False
    assert m.prefill(ids) is None


def test_hooks_on_the_backbone_switch_the_fast_passes_off() -> None:
    m = model("qwen3")
    m.use_fast_paths()
    plain = m.completion_hidden(m.batch(mixed(), "student"))
    handle = m.backbone.register_forward_hook(
        lambda module, inputs, output: type(output)(last_hidden_state=output.last_hidden_state * 2)
    )
    assert m.fast is None
    torch.testing.assert_close(m.completion_hidden(m.batch(mixed(), "student")), 2 * plain, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert torch.equal(m.completion_hidden(m.batch(mixed(), "student")), plain)


def test_a_teacher_scores_from_its_prefill() -> None:
    m = model("llama")
    counter, teacher = counted(m), LocalTeacher(m)
    rows = [replace(r, prompt=replace(r.prompt, teacher_token_ids=r.prompt.token_ids)) for r in mixed()]
    plain = teacher.score(rows).logits(slice(None))
    counter.encoded = 0
    made = teacher.prefill([r.prompt for r in rows])
    assert torch.equal(teacher.score(rows, made).logits(slice(None)), plain)
    assert counter.encoded == 1


def test_joined_weights_are_the_models_own(tmp_path: Path) -> None:
    """Trained in place, they are seen; saved, they are whole; moved to another type, they are joined again."""
    m = model("qwen2")
    m.use_fast_paths()
    first = m.backbone.layers[0].self_attn
    assert first.q_proj.weight.untyped_storage().data_ptr() == first.k_proj.weight.untyped_storage().data_ptr()
    with torch.no_grad():
        for parameter in m.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    trained = rollouts(m)
    m.model.save_pretrained(tmp_path)
    again = CausalModel(AutoModelForCausalLM.from_pretrained(tmp_path), V, 0)
    assert rollouts(again) == trained
    m.model.double()
    assert rollouts(m) == rollouts(CausalModel(again.model.double(), V, 0))
