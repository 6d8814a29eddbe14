"""Captured steps over memory that stays give the rollouts of the cache that grows.

`Recorder` stands in for CUDA graphs: it replays device operations on the tensors of the recording and runs no Python of
the step, so a step that depends on a number of Python's, or looks at the device, is found out here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from headstart.config.schema import LoraTuning
from headstart.errors import NonFiniteError
from headstart.models.causal import CausalModel
from headstart.models.lora import add_lora
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout import sampling as sampling_module
from headstart.rollout.decoding import Decoding, Row
from headstart.rollout.engine import InProcessEngine
from headstart.rollout.memory import fitting_batch
from headstart.rollout.static import Capture, StaticRows
from headstart.testing import ARCHITECTURES, Architecture, random_model
from recorder import Recorder

V = 46
STOPS = (1, 20, 21)
MAX_TOKENS = 21
SAMPLING = Sampling(0.9, 0.95, 0)
LENGTHS = (3, 30, 9, 17, 5, 24, 12, 2, 30, 7)


def prompts(lengths: tuple[int, ...]) -> list[Prompt]:
    texts = [tuple(6 + (11 * index + 7 * place * place) % 40 for place in range(n)) for index, n in enumerate(lengths)]
    return [Prompt(index, str(index), ids, ids) for index, ids in enumerate(texts)]


def model(architecture: Architecture, tuning: str = "full") -> CausalModel:
    made = random_model(architecture, V)
    if tuning == "lora":
        made = add_lora(made, LoraTuning(r=4), 0)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide a forgotten adapter
                torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    cut = CausalModel(made, V, 0)
    cut.use_fast_paths()
    return cut


def generate(engine: InProcessEngine, **settings: Any) -> list[Rollout]:
    asked: dict[str, Any] = {"samples": 2, "max_tokens": MAX_TOKENS, "sampling": SAMPLING, "key": (3, "rollout", 7)}
    return engine.generate(settings.pop("prompts", prompts(LENGTHS)), **asked | settings)


def growing(cut: CausalModel, **settings: Any) -> list[Rollout]:
    return generate(InProcessEngine(cut, STOPS), **settings)


@pytest.mark.parametrize("batch_size", [3, None])
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_steps_give_the_rollouts_of_a_growing_cache(
    architecture: Architecture, tuning: str, batch_size: int | None
) -> None:
    cut, recorder = model(architecture, tuning), Recorder()
    expected = growing(cut)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(InProcessEngine(cut, STOPS, recorder), batch_size=batch_size) == expected
    assert recorder.replays >= MAX_TOKENS - 3, "one warm-up for each shape"
    lengths = [len(r.completion_ids) for r in expected]
    assert max(lengths) == MAX_TOKENS
    assert len(set(lengths)) > 4, "rows must leave at different times to test anything"


@pytest.mark.parametrize("batch_size", [3, None])
def test_every_prompt_ends_at_its_own_horizon(batch_size: int | None) -> None:
    cut, limits = model("llama"), [1, MAX_TOKENS, 4, 13, 9, MAX_TOKENS, 2, 17, 6, 8]
    whole = growing(cut)
    found = generate(InProcessEngine(cut, STOPS, Recorder()), max_tokens=limits, batch_size=batch_size)
    assert [r.completion_ids for r in found] == [r.completion_ids[: limits[r.prompt.index]] for r in whole]


class Uncaptured(Recorder):
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3"])
def test_replayed_steps_are_the_uncaptured_ones_in_bfloat16(architecture: Architecture, tuning: str) -> None:
    cut = model(architecture, tuning)
    cut.model.to(torch.bfloat16)
    replayed, uncaptured = (InProcessEngine(cut, STOPS, capture) for capture in (Recorder(), Uncaptured()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(replayed, batch_size=9) == generate(uncaptured, batch_size=9)


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_makes_nothing_on_the_cpu_and_asks_for_no_value(architecture: Architecture, complete: bool) -> None:
    """On the meta device: there are no values to be had, and tensors of the CPU do not mix with its own."""
    cut = model(architecture, "lora")
    cut.model.to("meta", torch.bfloat16)
    config = cut.backbone.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = torch.empty(2, config.num_key_value_heads, 5, head_dim, device="meta", dtype=torch.bfloat16)
    layers = [SimpleNamespace(keys=keys, values=keys)] * config.num_hidden_layers
    mask_BT, age_B = (torch.empty(*shape, device="meta", dtype=torch.int64) for shape in ((2, 5), (2,)))
    entering = Decoding(cut, SimpleNamespace(layers=layers), mask_BT, age_B, torch.empty(2, V, device="meta"))
    rows = StaticRows(cut, frozenset(STOPS), Recorder())
    with torch.no_grad():
        rows.begin(2, 20, SAMPLING)
        rows._write([0, 1], [Row(prompt, 0, 9, np.zeros(9)) for prompt in prompts((3, 5))], entering)
        assert rows._state is not None
        for sampling in (SAMPLING, Sampling(1.0, 1.0, 5), Sampling(0.0)):
            rows._step(rows._state.leading(2, 64), sampling, complete)
        rows.keep([1])


def test_a_model_all_of_whose_layers_slide() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=V, num_key_value_heads=2, sliding_window=8, initializer_range=0.3, **shape)
    cut, recorder = CausalModel(MistralForCausalLM(config).eval(), V, 0), Recorder()
    assert generate(InProcessEngine(cut, STOPS, recorder)) == growing(cut)
    assert recorder.replays


def test_on_a_cpu_rows_decode_in_a_growing_cache_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StaticRows, "__init__", lambda *_: pytest.fail("no static rows on a CPU"))
    assert growing(model("llama"))


def test_every_rollout_is_told_in_order_of_time() -> None:
    heard: list[Rollout] = []
    rollouts = generate(InProcessEngine(model("llama"), STOPS, Recorder()), finished=heard.append)
    assert sorted(heard, key=rollouts.index) == rollouts
    lengths = [len(r.completion_ids) for r in heard]
    assert lengths == sorted(lengths), "all started together, so the shortest ends first"


def test_a_batch_becomes_smaller_and_its_places_more() -> None:
    """40 rows that leave one by one, and prompts that end just below the first power of two."""
    many, recorder = prompts((115, *LENGTHS, *LENGTHS, *LENGTHS[:-1])), Recorder()
    engine = InProcessEngine(model("qwen3"), STOPS, recorder)
    expected = growing(engine.model, prompts=many, samples=1, max_tokens=60)
    assert generate(engine, prompts=many, samples=1, max_tokens=60) == expected
    assert engine._static is not None
    shapes = {key[:2] for key in engine._static._replays}
    assert len({rows for rows, _ in shapes}) > 2
    assert {places for _, places in shapes} == {128, 192}
    assert recorder.captures == len(engine._static._replays)


@pytest.mark.parametrize("sampling", [Sampling(1.3, 0.9), Sampling(1.0, 0.99, 9)])
def test_a_nucleus_wider_than_the_candidates_is_drawn_whole(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = InProcessEngine(model("llama"), STOPS, Recorder())
    expected = growing(engine.model, sampling=sampling)
    monkeypatch.setattr(sampling_module, "_CANDIDATES", 3)
    assert generate(engine, sampling=sampling) == expected
    assert engine._static is not None
    assert {key[2] for key in engine._static._replays} == {False, True}


def test_steps_live_as_long_as_the_weights() -> None:
    """Training moves the weights in place: what was captured sees that. Other tensors are captured anew."""
    cut, recorder = model("qwen2", "lora"), Recorder()
    engine = InProcessEngine(cut, STOPS, recorder)
    first = generate(engine)
    captures = recorder.captures
    with torch.no_grad():
        for parameter in cut.trainable().values():
            parameter.mul_(-1.5)
    second = generate(engine)
    assert first != second == growing(cut)
    assert recorder.captures == captures
    parameter = next(iter(cut.trainable().values()))
    parameter.data = parameter.detach() * -2
    assert second != generate(engine) == growing(cut)
    assert captures < recorder.captures <= 2 * captures
    assert engine.fitting(prompts(LENGTHS), 9) > 0  # measures after giving back what captured steps keep
    assert generate(engine) == growing(cut)


def test_other_horizons_and_fewer_prompts_need_no_new_memory() -> None:
    recorder = Recorder()
    engine = InProcessEngine(model("llama"), STOPS, recorder)
    generate(engine)
    before = recorder.forgotten
    for settings in ({"max_tokens": 9}, {"samples": 1}, {"prompts": prompts(LENGTHS[:5])}, {"max_tokens": 1}):
        assert generate(engine, **settings) == growing(engine.model, **settings)
    assert recorder.forgotten == before
    assert generate(engine, max_tokens=90) == growing(engine.model, max_tokens=90)
    assert recorder.forgotten == before + 1


def test_without_stop_tokens_all_rows_reach_the_horizon_in_the_memory_they_were_given() -> None:
    """The memory is what the batch size was chosen for."""
    cut, many, budget = model("llama"), prompts((30,) * 40), 2_000_000
    engine = InProcessEngine(cut, (), Recorder())
    rows = fitting_batch(cut, many, 300, budget)
    assert 4 < rows < 40
    rollouts = generate(engine, prompts=many[:rows], samples=1, max_tokens=300, batch_size=rows)
    assert all(len(r.completion_ids) == 300 and not r.stopped for r in rollouts)
    assert engine._static is not None
    assert engine._static._state is not None
    assert 0.3 * budget < sum(store.nbytes for pair in engine._static._state.layers for store in pair) < budget


class Failing(Recorder):
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted\nwhen capturing")


def looking(cut: CausalModel) -> Capture:
    """Makes `cut` look at the device in each step."""
    head = cut.head
    cut.head = lambda hidden: head(hidden) * (1.0 if bool(hidden.isfinite().all()) else 2.0)  # type: ignore[method-assign]
    return Recorder()


@pytest.mark.parametrize(
    ("capture", "reason"),
    [(lambda cut: Failing(), "operation not permitted"), (looking, "may not be captured")],
    ids=["refused", "step looks at the device"],
)
def test_what_cannot_be_captured_runs_uncaptured(capture: Callable[[CausalModel], Capture], reason: str) -> None:
    cut = model("llama")
    expected = growing(cut)
    engine = InProcessEngine(cut, STOPS, capture(cut))
    with pytest.warns(UserWarning, match=f"uncaptured.*{reason}") as caught:
        found = generate(engine, batch_size=8)
    assert len(caught) == 1, "one warning is enough"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(engine) == found == expected


def test_a_model_whose_step_comes_out_otherwise_decodes_in_a_growing_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, recorder = model("gemma2"), Recorder()
    fed = StaticRows._fed
    monkeypatch.setattr(StaticRows, "_fed", lambda rows, *given: -fed(rows, *given))
    engine = InProcessEngine(cut, STOPS, recorder)
    with pytest.warns(UserWarning, match="Gemma2Model gave other logits"):
        found = generate(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(engine) == found == growing(cut)
    assert recorder.captures == 0


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("_attn_implementation", "flash_attention_2", "use attention sdpa or eager"),
        ("layer_types", ["chunked_attention", "full_attention"], "chunked_attention"),
    ],
)
def test_models_that_take_no_mask_of_ours_are_known(setting: str, value: object, reason: str) -> None:
    cut = model("qwen3")
    rows = StaticRows(cut, frozenset(STOPS), Recorder())
    setattr(cut.backbone.config, setting, value)
    with pytest.warns(UserWarning, match=reason):
        assert not rows.suits()


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(0.0), Sampling(1.0, 1.0)])
def test_logits_that_are_not_finite_are_an_error(sampling: Sampling) -> None:
    engine = InProcessEngine(model("llama"), STOPS, Recorder())
    assert generate(engine, sampling=sampling) == growing(engine.model, sampling=sampling)
    with torch.no_grad():
        engine.model.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="row 0"):
        generate(engine, sampling=sampling)


def test_the_recorder_is_as_strict_as_a_graph() -> None:
    """A replay does what was recorded, not what Python would do now, and a recording does nothing yet."""
    total, numbers, count = torch.zeros(2), torch.ones(2, 3), 1

    def work() -> None:
        part = numbers[:, 1:] * 2  # a tensor of the work's own
        part[0].add_(count)
        total.add_(part.sum(dim=1))

    replay = Recorder().capture(work)
    assert total.tolist() == [0, 0]
    replay()
    assert total.tolist() == [6, 4]
    count = 100
    numbers.fill_(2)
    replay()
    assert total.tolist() == [6 + 10, 4 + 8]
    with pytest.raises(RuntimeError, match="may not be captured"):
        Recorder().capture(lambda: total.mul_(float(total.sum())))
    with pytest.raises(RuntimeError, match="index may not be captured"):
        Recorder().capture(lambda: total.add_(numbers[numbers > 1].sum()))
    assert total.tolist() == [16, 12]
