"""Families whose layers are not plain attention, or whose parts have other names: right, or refused in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml

from headstart.assemble.pair import checked
from headstart.checks import subject
from headstart.checks.run import run_preflight
from headstart.config.schema import Config, ModelConfig
from headstart.diagnosis.run import diagnose
from headstart.distillation.run import distill
from headstart.errors import ModelError
from headstart.evaluation.run import evaluate
from headstart.models.causal import CausalModel
from headstart.models.load import load_model
from headstart.models.memory import LARGEST
from headstart.models.vocabulary import SharedVocabulary
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout.decoding import Decoding
from headstart.rollout.engine import InProcessEngine
from headstart.rollout.memory import fitting_batch
from headstart.testing import word_tokenizer, write_checkpoint
from recorder import Recorder
from small_families import ALTERNATING, CACHED, DELTA, SHAPE, SLIDING, UNCACHED, randomized, small_model
from support import drawn_logprobs, write_prompts

V, KEY, SAMPLING, HORIZON = 46, (3, "rollout", 7), Sampling(0.9, 0.95, 0), 12
STOPS = (1, 20, 21, 22, 23)
PROMPTS = tuple(
    Prompt(index, str(index), ids, ids)
    for index, length in enumerate((3, 30, 9, 17, 1, 12))  # windows and chunks hold 8 tokens
    for ids in [tuple(6 + (11 * index + 7 * place * place) % 40 for place in range(length))]
)
UNCACHED_WARNING = "ignore:.*samples without a cache:UserWarning"
pytestmark = pytest.mark.filterwarnings(UNCACHED_WARNING, "ignore:`is_gradient_checkpointing`:FutureWarning")


def proven(model: Any, family: str = "here") -> CausalModel:
    return checked(model, SharedVocabulary(V, STOPS), "student", 0, ModelConfig(path=family))


def sampled(model: CausalModel, batch_size: int | None, prompts: tuple[Prompt, ...] = PROMPTS) -> list[Rollout]:
    engine = InProcessEngine(model, STOPS)
    return engine.generate(prompts, samples=2, max_tokens=HORIZON, sampling=SAMPLING, key=KEY, batch_size=batch_size)


def logprobs_alone(model: CausalModel, rollout: Rollout) -> torch.Tensor:
    """Of a completion, by the model's own forward on its whole text: no batch, no padding, no cache."""
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.completion_ids]])
    with torch.no_grad():
        logits_TV = model.model(input_ids=ids, use_cache=False).logits[0, :, :V]
    first = len(rollout.prompt.token_ids) - 1
    return logits_TV[first:-1].log_softmax(-1).gather(-1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]


@pytest.mark.parametrize("family", [*CACHED, *UNCACHED])
def test_rows_that_come_and_go_have_the_logits_of_texts_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sampled and as scored, for every family; batches change no rollout."""
    model, drawn = proven(small_model(family)), drawn_logprobs(monkeypatch)
    assert model.caches == (family in CACHED)
    rollouts = sampled(model, 5)
    assert len({len(r.completion_ids) for r in rollouts}) > 2, "rows must finish at different times"
    own_M = torch.cat([logprobs_alone(model, rollout) for rollout in rollouts])
    torch.testing.assert_close(drawn(rollouts, KEY, HORIZON), own_M, rtol=0, atol=1e-4)
    batch = model.batch(rollouts, "student")
    with model.sampling_mode():
        scored_MV = model.head(model.completion_hidden(batch)).log_softmax(-1)
    torch.testing.assert_close(scored_MV.gather(-1, batch.tokens_M[:, None])[:, 0], own_M, rtol=0, atol=1e-4)
    assert sampled(model, None) == rollouts
    assert sampled(model, 1, PROMPTS[3:]) == rollouts[6:]


@pytest.mark.parametrize("family", [*CACHED, *UNCACHED])
def test_padding_does_not_change_gradients(family: str) -> None:
    """A batch of prompts and completions of different length, against each rollout in a batch of its own."""
    model = proven(small_model(family, scale=0.1))
    rollouts = sampled(model, None, PROMPTS[:4])
    trained = list(model.trainable().values())

    def gradients(micro: list[Rollout]) -> tuple[Any, ...]:
        batch = model.batch(micro, "student")
        logprob_MV = model.head(model.completion_hidden(batch)).log_softmax(-1)
        loss = logprob_MV.gather(-1, batch.tokens_M[:, None]).sum() / sum(len(r.completion_ids) for r in rollouts)
        return torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)

    together = gradients(rollouts)
    alone = [sum(parts) for parts in zip(*(gradients([rollout]) for rollout in rollouts), strict=True)]
    assert max(float(g.abs().max()) for g in together) > 1e-3
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def text_config(family: str) -> dict[str, Any]:
    more = {"qwen3_5": {**DELTA, "layer_types": ALTERNATING}, "gemma3": {"layer_types": SLIDING, "sliding_window": 8}}
    return {**SHAPE, **more.get(family, {"attention_chunk_size": 8, "num_local_experts": 4})}


def multimodal(family: str) -> Any:
    """A checkpoint with a vision tower, as such families are published."""
    text, small = text_config(family), {"hidden_size": 32, "intermediate_size": 32}
    vision = {**small, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config: Any = {
        "gemma3": lambda: hf.Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=45,
        ),
        "qwen3_5": lambda: hf.Qwen3_5Config(
            text_config=text, vision_config={**small, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
        ),
        "llama4": lambda: hf.Llama4Config(
            text_config=text,
            vision_config=vision,
        ),
    }[family]()
    return randomized(hf.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "llama4"])
def test_the_language_model_of_a_multimodal_checkpoint(family: str) -> None:
    model = proven(multimodal(family))
    rollouts = sampled(model, 5)
    batch = model.batch(rollouts, "student")
    model.model.train()
    own_M = torch.cat([logprobs_alone(model, rollout) for rollout in rollouts])
    logprob_MV = model.head(model.completion_hidden(batch)).log_softmax(-1)
    torch.testing.assert_close(logprob_MV.gather(-1, batch.tokens_M[:, None])[:, 0], own_M, rtol=0, atol=1e-4)


def test_captured_steps_see_the_window_of_a_multimodal_model() -> None:
    model = proven(multimodal("gemma3"))
    captured = InProcessEngine(model, STOPS, Recorder()).generate(
        PROMPTS, samples=2, max_tokens=HORIZON, sampling=SAMPLING, key=KEY, batch_size=5
    )
    assert captured == sampled(model, 5)


@pytest.mark.parametrize("family", ["qwen3_5", "rwkv"])
def test_other_layers_decode_without_captured_steps(family: str) -> None:
    model = proven(small_model(family))
    with pytest.warns(
        UserWarning, match=r"without captured steps, .* the model has layers of (linear_att|its own kind)"
    ):
        captured = InProcessEngine(model, STOPS, Recorder()).generate(
            PROMPTS, samples=2, max_tokens=HORIZON, sampling=SAMPLING, key=KEY, batch_size=5
        )
    assert captured == sampled(model, 5)


@pytest.mark.parametrize("family", ["qwen3_5", "mamba", "rwkv", "gemma3n"])
def test_the_batch_that_fits_follows_the_memory(family: str) -> None:
    model = proven(small_model(family))
    assert fitting_batch(model, PROMPTS, 100, 0) == 1
    assert fitting_batch(model, PROMPTS, 100, 4 * 10**6) <= fitting_batch(model, PROMPTS, 100, 10**12) == LARGEST
    if model.caches and family != "gemma3n":
        state = sum(x.nbytes for layer in Decoding.of(model, PROMPTS[:1]).cache.layers for x in _states(layer))
        assert fitting_batch(model, PROMPTS, 1, 100 * state) < 40


def _states(layer: Any) -> list[torch.Tensor]:
    return [x for held in vars(layer).values() if isinstance(held, dict) for x in held.values() if torch.is_tensor(x)]


def test_a_padding_that_gets_into_the_state_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3.5 keeps padding out of its states; without that it must do without a cache, and is right again."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    expected = sampled(proven(small_model("qwen3_5")), 5)
    monkeypatch.setattr(modeling_qwen3_5, "apply_mask_to_padding_states", lambda hidden, mask: hidden)
    with pytest.warns(
        UserWarning, match="Qwen3_5ForCausalLM samples without a cache.*beside other prompts.* differ by"
    ):
        model = proven(small_model("qwen3_5"))
    assert sampled(model, 5) == expected


def refused() -> dict[str, tuple[Callable[[], Any], str]]:
    shape: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "bert": (lambda: hf.BertLMHeadModel(hf.BertConfig(**shape, intermediate_size=64)), "BertLMHeadModel does more"),
        "bert_generation": (
            lambda: hf.BertGenerationDecoder(hf.BertGenerationConfig(**shape, intermediate_size=64)),
            "BertGenerationDecoder can be neither .* with other tokens behind, its logits differ by",
        ),
        "xlnet": (
            lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=V, d_model=32, n_layer=2, n_head=4, d_inner=64)),
            "XLNetLMHeadModel can be neither .* with other tokens behind",
        ),
        "t5": (
            lambda: hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=V, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
            ),
            "T5ForConditionalGeneration",
        ),
    }


@pytest.mark.parametrize("family", list(refused()))
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_causal_language_model_is_refused(family: str) -> None:
    make, words = refused()[family]
    model = randomized(make())
    with pytest.raises(ModelError, match=words):
        proven(model)


def test_a_model_without_backbone_or_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("mistral")
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    folder = write_checkpoint(tmp_path / "model", model, word_tokenizer())
    with pytest.raises(ModelError, match=r"model: MistralForCausalLM does not say what its output projection is"):
        load_model(ModelConfig(path=str(folder)), torch.device("cpu"))
    monkeypatch.undo()
    model.base_model_prefix, model.model = "elsewhere", torch.nn.Identity()
    with pytest.raises(ModelError, match="MistralForCausalLM does not say what its backbone is"):
        CausalModel(model, V, 0)


def test_a_model_that_fails_on_token_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("mistral")

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("forward() misses pixel_values")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(
        ModelError, match=r"here: MistralForCausalLM cannot be run on token ids alone \(forward\(\) misses"
    ):
        proven(model)


def config_of(folder: Path, family: str, **more: Any) -> Config:
    tokenizer = word_tokenizer()
    for who, seed in (("student", 1), ("teacher", 2)):
        write_checkpoint(folder / who, small_model(family, seed), tokenizer)
    (folder / "task.jsonl").write_text(
        "".join(json.dumps({"prompt": f"w{i} w3", "answer": f"w{i}"}) + "\n" for i in range(6))
    )
    task = {"type": "jsonl", "path": str(folder / "task.jsonl")}
    base = {
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "prompts": {"source": str(write_prompts(folder))},
        "tuning": {"type": "full"},
        "horizon": {"type": "fixed", "tokens": 12},
        "training": {"steps": 3, "prompts_per_step": 4, "device": "cpu"},
        "optimizer": {"lr": 1e-2},
        "evaluation": {"task": task, "samples": 2, "max_tokens": 8, "every": 3},
        "diagnosis": {"task": task, "problems": 4, "grid": [4, 8], "max_tokens": 12},
    }
    return Config(**{**base, **more})


VERBS = [("full", f) for f in ("qwen3_5", "mamba", "gemma4", "rwkv")] + [("lora", f) for f in ("qwen3_5", "llama4")]


@pytest.mark.parametrize(("tuning", "family"), VERBS)
def test_every_verb(tmp_path: Path, family: str, tuning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "TOKENS", 8 * 24)
    targets = ("q_proj", "v_proj") if family == "llama4" else "all-linear"  # its router is a linear layer of its own
    lora = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "targets": targets}
    config = config_of(tmp_path, family, **({"tuning": lora} if tuning == "lora" else {}))
    found = run_preflight(config)
    assert [f for f in found.findings if f.severity == "blocking"] == []
    assert {"engine log-probs", "time", "memory"} <= {f.check for f in found.findings}
    distill(config, out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    trained = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    before = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = torch.tensor([[3, 10, 4, 22, 17]])
    with torch.no_grad():
        assert (trained(input_ids=ids).logits - before(input_ids=ids).logits).abs().max() > 1e-3
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["tuning"]["type"] == tuning
    if tuning == "full":
        summary = evaluate(config, out=tmp_path / "eval")
        assert summary["problems"] == 6
        diagnose(config, out=tmp_path / "diagnosis")
        assert (tmp_path / "diagnosis" / "diagnose" / "recommendation.json").exists()


def test_the_words_reach_every_verb(tmp_path: Path) -> None:
    """A model that cannot be run is refused before anything is made, in words."""
    config = config_of(tmp_path, "mistral")
    shape: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = randomized(hf.BertGenerationDecoder(hf.BertGenerationConfig(**shape, intermediate_size=64)))
    write_checkpoint(tmp_path / "student", encoder, word_tokenizer())
    words = r"student: BertGenerationDecoder can be neither sampled nor trained here"
    with pytest.raises(ModelError, match=words):
        distill(config, out=tmp_path / "run")
    with pytest.raises(ModelError, match=words):
        evaluate(config, out=tmp_path / "eval")
    with pytest.raises(ModelError, match=words):
        diagnose(config, out=tmp_path / "diagnosis")
    blocking = [f for f in run_preflight(config).findings if f.severity == "blocking"]
    assert any("BertGenerationDecoder can be neither" in f.message for f in blocking)
    assert not any((tmp_path / name).exists() for name in ("run", "eval", "diagnosis"))
