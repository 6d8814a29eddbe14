"""Real architectures, tiny and random, through the whole loop: sample, train, export, load with plain transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from headstart.config.schema import Config
from headstart.distillation.run import distill
from headstart.errors import ModelError
from headstart.models.causal import CausalModel
from headstart.models.collate import collate
from headstart.records import Rollout, Sampling
from headstart.rollout.engine import InProcessEngine
from headstart.testing import ARCHITECTURES, Architecture, random_model
from headstart.train.parts import Parts
from headstart.train.step import train_step
from support import drawn_logprobs, make_config, make_parts

LORA = "tuning={type: lora, r: 4, alpha: 8, dropout: 0.05}"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own loading
QUICK = ("training.steps=3", "optimizer.lr=0.01", "training.prompts_per_step=4")
SYSTEM = "prompts.system=w30 w31"
GEMMA = ("gemma2", "gemma3")
BOTH = [("full", "merged"), ("lora", "both")]
RUNS = [(a, *how) for a in ARCHITECTURES for how in BOTH] + [("qwen3", "lora", "merged"), ("gemma2", "lora", "adapter")]


@dataclass(frozen=True)
class Finished:
    """A finished run of one architecture."""

    folder: Path
    config: Config
    tuning: str

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def model(self) -> Path:
        return self.run / "model"

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]


def config_of(folder: Path, architecture: Architecture, tuning: str, *overrides: str) -> Config:
    how = [LORA] if tuning == "lora" else []
    return make_config(folder, *how, *QUICK, SYSTEM, *overrides, architecture=architecture)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture, str, str], Finished]:
    """A run per (architecture, tuning, output format), made once."""
    known: dict[tuple[str, str, str], Finished] = {}

    def make(architecture: Architecture, tuning: str, form: str) -> Finished:
        key = (architecture, tuning, form)
        if key not in known:
            folder = tmp_path_factory.mktemp("-".join(key))
            config = config_of(folder, architecture, tuning, f"output.format={form}")
            if architecture in GEMMA:
                with pytest.warns(UserWarning, match="no system role"):
                    distill(config, out=folder / "run")
            else:
                distill(config, out=folder / "run")
            known[key] = Finished(folder, config, tuning)
        return known[key]

    return make


def probe_logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[3, 10, 4, 22, 17, 9, 41, 5, 12, 30, 8, 7]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def trained_by_hand(done: Finished) -> Any:
    """The student as it came plus what the last checkpoint holds, put together without peft."""
    model = AutoModelForCausalLM.from_pretrained(done.config.student.path)
    moved = load_file(done.run / "checkpoints" / "step_000003" / "model.safetensors")
    if done.tuning == "full":
        assert not model.load_state_dict(moved, strict=False).unexpected_keys
        return model
    weights = dict(model.named_parameters())
    for name, a in moved.items():
        if ".lora_A." in name:
            b = moved[name.replace(".lora_A.", ".lora_B.")]
            plain = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            weights[plain].data += (8 / 4) * b @ a
    return model


@pytest.mark.parametrize(("architecture", "tuning", "form"), RUNS)
def test_the_exported_model_is_the_trained_one(
    finished: Any, architecture: Architecture, tuning: str, form: str
) -> None:
    done = finished(architecture, tuning, form)
    expected = probe_logits(trained_by_hand(done))
    before = probe_logits(AutoModelForCausalLM.from_pretrained(done.config.student.path))
    assert (expected - before).abs().max() > 1e-2, "training moved nothing"
    loaded = []
    if form != "adapter":
        model, info = AutoModelForCausalLM.from_pretrained(done.model, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        loaded.append(model)
    if form != "merged":
        from peft import AutoPeftModelForCausalLM

        loaded.append(AutoPeftModelForCausalLM.from_pretrained(done.model / ("adapter" if form == "both" else "")))
    for model in loaded:
        torch.testing.assert_close(probe_logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("architecture", "tuning", "form"), RUNS)
def test_the_exported_folder_is_complete(finished: Any, architecture: Architecture, tuning: str, form: str) -> None:
    done = finished(architecture, tuning, form)
    assert json.loads((done.model / "generation_config.json").read_text())["eos_token_id"] == [1]
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    ids = tokenizer("w3 w4")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(done.config.student.path)("w3 w4")["input_ids"]
    assert len(set(ids)) > 1
    assert tokenizer.chat_template is not None
    assert not list(done.model.rglob("*.bin"))

    steps = done.metrics()
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in steps)
    _, header, body = (done.model / "README.md").read_text().split("---\n", 2)
    assert "base_model" not in yaml.safe_load(header)  # the hub refuses a folder there
    facts = [
        done.config.student.path,
        done.config.teacher.path,
        "LoRA r 4, alpha 8, dropout 0.05" if tuning == "lora" else "all weights",
        "first 6 completion tokens",
        "reverse_kl, support full",
        "3 with 4 prompts each, peak learning rate 0.01",
        f"| generated tokens | {steps[-1]['generated_tokens']} |",
        "token ids 1.",
    ]
    assert [fact for fact in facts if fact not in body] == []
    assert ("AutoPeftModelForCausalLM" in body) == (form == "adapter")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture, str], Parts]:
    """Parts after two steps, so that adapters are not zero."""
    known: dict[tuple[str, str], Parts] = {}

    def make(architecture: Architecture, tuning: str) -> Parts:
        if (architecture, tuning) not in known:
            folder = tmp_path_factory.mktemp(f"{architecture}-{tuning}")
            parts = make_parts(folder / "run", config_of(folder, architecture, tuning, "prompts.system=null"))
            for step in range(2):
                train_step(parts, step, 0)
            known[architecture, tuning] = parts
        return known[architecture, tuning]

    return make


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampling_and_training_see_the_same_distribution(
    trained: Any, architecture: Architecture, tuning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached, left-padded, shrinking-batch decoding gives the log-probabilities of the training forward pass."""
    parts: Parts = trained(architecture, tuning)
    drawn = drawn_logprobs(monkeypatch)
    key = (5, "rollout", 0)
    engine = InProcessEngine(parts.student, [1, *range(20, 26)])  # many stop tokens, so that rows leave the batch
    rollouts = engine.generate(
        parts.prompts[:8], samples=2, max_tokens=24, sampling=Sampling(1.0, 1.0, 0), key=key, batch_size=10
    )
    assert len({len(r.completion_ids) for r in rollouts}) > 2, "rows must finish at different times"
    batch = collate(rollouts, "student", parts.student.pad_id, parts.student.device)
    with parts.student.sampling_mode():
        logits_MV = parts.student.head(parts.student.completion_hidden(batch))
    trained_M = logits_MV.log_softmax(-1).gather(-1, batch.tokens_M[:, None])[:, 0]
    torch.testing.assert_close(drawn(rollouts, key, 24), trained_M, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_rollouts_equal_generate(trained: Any, architecture: Architecture) -> None:
    parts: Parts = trained(architecture, "lora")
    rollouts = parts.engine.generate(
        parts.prompts[:6], samples=1, max_tokens=20, sampling=Sampling(0.0, 1.0, 0), key=(0, "rollout", 0)
    )
    assert len({r.completion_ids for r in rollouts}) > 1
    for rollout in rollouts:
        assert list(rollout.completion_ids) == generated(parts, rollout)


def generated(parts: Parts, rollout: Rollout) -> list[int]:
    """What `generate` of transformers makes of the same prompt, alone and without padding."""
    ids = torch.tensor([rollout.prompt.token_ids])
    with parts.student.sampling_mode():
        output = parts.student.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=list(parts.vocabulary.stop_ids),
            pad_token_id=0,
        )
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", GEMMA)
def test_a_system_prompt_reaches_a_template_without_system_role(tmp_path: Path, architecture: Architecture) -> None:
    with pytest.warns(UserWarning, match="no system role"):
        parts = make_parts(tmp_path / "run", config_of(tmp_path, architecture, "full"))
    first = parts.prompts[0].token_ids
    text = AutoTokenizer.from_pretrained(parts.config.student.path).decode(first)
    assert text.split() == ["<user>", "w30", "w31", "w0", "<end>", "<assistant>"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_check_head_accepts_every_precision(architecture: Architecture, dtype: torch.dtype) -> None:
    """Gemma soft-caps in bfloat16 itself and we in float32: that difference is no reason to refuse it."""
    CausalModel(random_model(architecture, 46).to(dtype), 46, 0).check_head("student")


def soft_capped(logits: torch.Tensor) -> torch.Tensor:
    return 2 * torch.tanh(logits / 2)


def biased(logits: torch.Tensor) -> torch.Tensor:
    return logits + torch.linspace(-0.1, 0.1, logits.shape[-1])


def scaled(logits: torch.Tensor) -> torch.Tensor:
    return 1.05 * logits


@pytest.mark.parametrize("change", [soft_capped, biased, scaled])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "phi"])
def test_check_head_refuses_a_head_that_does_more(architecture: Architecture, change: Any) -> None:
    model = random_model(architecture, 46)

    def tamper(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    handle = model.register_forward_hook(tamper)
    with pytest.raises(ModelError, match=r"my-model: the head of .* does more than projection"):
        CausalModel(model, 46, 0).check_head("my-model")
    handle.remove()
    CausalModel(model, 46, 0).check_head("my-model")


def test_check_head_needs_the_whole_head() -> None:
    """Forgetting what the configuration names would be noticed too: soft-capping, scale and bias one by one."""
    for architecture, forget in (("gemma2", "_softcap"), ("cohere", "_scale"), ("phi", "bias")):
        model = CausalModel(random_model(architecture, 46), 46, 0)  # type: ignore[arg-type]
        if forget == "bias":
            linear = model._projection
            model._projection = torch.nn.Linear(*linear.weight.T.shape, bias=False)
            model._projection.weight = linear.weight
        else:
            setattr(model, forget, {"_softcap": None, "_scale": 1.0}[forget])
        with pytest.raises(ModelError, match="does more"):
            model.check_head("student")
