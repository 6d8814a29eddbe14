"""The model that is written is the model that was trained, for every kind of layer that can be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from headstart.assemble.pair import open_pair
from headstart.config.schema import ModelConfig
from headstart.distillation.run import distill
from headstart.errors import ModelError
from headstart.models.export import export_model, written_dtype
from headstart.models.load import load_model, stored_dtype
from headstart.testing import ARCHITECTURES, random_model, word_tokenizer, write_checkpoint
from headstart.train.step import train_step
from support import make_config, make_parts, write_prompts

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's own loading
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:UserWarning"),
]
IDS = torch.tensor([[3, 10, 4, 22, 17, 9, 41, 5, 12, 30, 8, 7]])
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DENSE = "llama-tied"


def small(kind: str, seed: int) -> Any:
    """A random model of two layers; `kind` is an architecture, with `-tied` where its head is its embedding."""
    name, _, tied = kind.partition("-")
    shared: dict[str, Any] = {
        "vocab_size": len(word_tokenizer()),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "tie_word_embeddings": bool(tied),
    }
    grouped = {**shared, "num_key_value_heads": 2, "max_position_embeddings": 512, "intermediate_size": 64}
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config: Any = {
        "llama": lambda: LlamaConfig(**grouped),
        "gpt2": lambda: GPT2Config(**shared, n_positions=512, **no_dropout),
        "mixtral": lambda: MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": lambda: Qwen3MoeConfig(**grouped, **ROUTED, head_dim=8),
        "qwen2_moe": lambda: Qwen2MoeConfig(**grouped, **ROUTED, shared_expert_intermediate_size=32),
        "gpt_oss": lambda: GptOssConfig(
            **grouped, num_local_experts=4, num_experts_per_tok=2, head_dim=8, layer_types=["full_attention"] * 2
        ),
    }[name]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    model.generation_config.eos_token_id = 1
    return model


def write_small_pair(folder: Path, kind: str) -> None:
    for who, seed in (("student", 1), ("teacher", 2)):
        write_checkpoint(folder / who, small(kind, seed), word_tokenizer())
    write_prompts(folder)


def lora(*targets: str, dropout: float = 0.0) -> str:
    named = f", targets: [{', '.join(targets)}]" if targets else ""
    return f"tuning={{type: lora, r: 4, alpha: 8, dropout: {dropout}{named}}}"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits.float()
    return found


ALL = lora()
TRAINED = [
    (DENSE, "tuning.type=full"),
    ("llama", "tuning.type=full"),
    ("gpt2-tied", "tuning.type=full"),
    ("mixtral", "tuning.type=full"),
    (DENSE, ALL),
    (DENSE, lora(dropout=0.1)),
    (DENSE, lora("q_proj", "v_proj")),
    (DENSE, lora("model.layers.1.self_attn.q_proj", "layers.0.mlp.up_proj")),
    ("llama", lora("down_proj")),
    ("llama", lora("lm_head")),
    ("llama", lora("embed_tokens")),
    ("llama", lora("embed_tokens", "lm_head", "o_proj")),
    ("gpt2-tied", ALL),
    ("gpt2", lora("c_attn", "wte", "lm_head")),
    ("mixtral", ALL),
    ("mixtral", lora("q_proj", "w1", "w2", "w3")),
    ("qwen3_moe", ALL),
    ("qwen3_moe", lora("q_proj", "down_proj")),
    ("qwen2_moe", lora(dropout=0.1)),
    ("gpt_oss", ALL),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "tuning"), TRAINED)
def test_every_form_of_the_written_model_gives_the_trained_ones_logits(
    tmp_path: Path, kind: str, tuning: str, dtype: str
) -> None:
    write_small_pair(tmp_path, kind)
    forms = ["merged"] if "full" in tuning else ["merged", "adapter", "both"]
    for form in forms:
        config = make_config(tmp_path, tuning, f"output.format={form}", f"student.dtype={dtype}", "optimizer.lr=0.02")
        parts = make_parts(tmp_path / f"run-{form}", config)
        before = logits(parts.student.model)
        for step in range(2):
            train_step(parts, step, 0)
        trained = logits(parts.student.model)
        moved = float((trained - before).abs().max())
        assert moved > 0.05, "training moved nothing"
        model = tmp_path / f"model-{form}"
        parts.export(parts.student.model, model, 1, None)
        read: list[Any] = []
        torch_type = getattr(torch, dtype)
        if form != "adapter":
            whole, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            assert whole.dtype == torch_type
            read.append(whole)
            read.append(load_model(ModelConfig(path=str(model), dtype=dtype), torch.device("cpu")))
        if form != "merged":
            adapter = str(model / "adapter" if form == "both" else model)
            base = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch_type)
            read.append(PeftModel.from_pretrained(base, adapter))
            source = ModelConfig(path=str(tmp_path / "student"), adapter=adapter, dtype=dtype)
            read.append(load_model(source, torch.device("cpu")))
        # Merged in bfloat16, an update is rounded to 8 bits of the weight beside it; a router may then choose another
        # expert for one token, so the bound is on the mean there.
        scale, change = trained.abs().max(), (trained - before).abs().mean()
        for found in map(logits, read):
            gap = (found - trained).abs()
            if dtype == "float32":
                assert gap.max() <= 1e-4 * scale
            assert gap.mean() <= 0.25 * change


@pytest.mark.parametrize("tuning", ["tuning.type=full", lora("embed_tokens", "lm_head", "q_proj"), lora(dropout=0.1)])
def test_a_resumed_run_writes_the_same_model(tmp_path: Path, tuning: str) -> None:
    write_small_pair(tmp_path, "llama")
    config = make_config(tmp_path, tuning, "optimizer.lr=0.02", "training.steps=4")
    straight = distill(config, out=tmp_path / "straight").path
    broken = distill(config, out=tmp_path / "broken").path
    for name in ("step_000003", "step_000004"):
        for file in (broken / "checkpoints" / name).glob("*"):
            file.unlink()
        (broken / "checkpoints" / name).rmdir()
    for file in (broken / "model").glob("*"):
        file.unlink()
    (broken / "model").rmdir()
    resumed = distill(resume=broken).path
    first, second = (load_file(path / "model" / "model.safetensors") for path in (straight, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(p / "model")) for p in (straight, resumed)))


TIED = [
    ("llama-tied", ("lm_head",), "lm_head, one weight with model.embed_tokens"),
    ("llama-tied", ("embed_tokens",), "model.embed_tokens, one weight with lm_head"),
    ("llama-tied", ("q_proj", "lm_head"), "lm_head, one weight with model.embed_tokens"),
    ("llama-tied", ("lm_head", "embed_tokens"), "one weight with"),
    ("gpt2-tied", ("wte",), "transformer.wte, one weight with lm_head"),
    ("gpt2-tied", ("c_attn", "lm_head"), "lm_head, one weight with transformer.wte"),
    ("mixtral-tied", ("lm_head",), "lm_head, one weight with model.embed_tokens"),
]


@pytest.mark.parametrize(("kind", "targets", "said"), TIED)
def test_a_tied_weight_with_an_adapter_is_untied_and_written_so(
    tmp_path: Path, kind: str, targets: tuple[str, ...], said: str
) -> None:
    write_small_pair(tmp_path, kind)
    with pytest.warns(UserWarning, match=said):
        distill(
            make_config(tmp_path, lora(*targets), "output.format=both", "training.steps=3", "optimizer.lr=0.02"),
            out=tmp_path / "run",
        )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert merged.config.tie_word_embeddings is False
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    trained = logits(PeftModel.from_pretrained(base, str(tmp_path / "run/model/adapter")))
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4 * float(trained.abs().max()))
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")))


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in ("qwen2", "phi")])
def test_every_architecture_that_ties_its_head_is_seen(tmp_path: Path, architecture: Any) -> None:
    with pytest.warns(UserWarning, match="it gets a copy of its own"):
        pair = open_pair(make_config(tmp_path, lora("lm_head"), architecture=architecture))
    assert all("lm_head" in name for name in pair.student.trainable())


@pytest.mark.parametrize("architecture", ["qwen2", "phi"])
def test_an_untied_head_is_adapted(tmp_path: Path, architecture: Any) -> None:
    pair = open_pair(make_config(tmp_path, lora("lm_head"), architecture=architecture))
    assert all("lm_head" in name for name in pair.student.trainable())


def make_adapter(folder: Path, kind: str, **settings: Any) -> Path:
    """A random adapter on the student in `folder`, made with peft."""
    write_small_pair(folder, kind)
    torch.manual_seed(5)
    made = get_peft_model(small(kind, 1), LoraConfig(r=4, init_lora_weights=False, **settings))
    made.save_pretrained(folder / "adapter")
    return folder / "adapter"


ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    (DENSE, {"target_modules": "all-linear", "use_rslora": True}),
    (DENSE, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    (DENSE, {"target_modules": r".*layers\.1\..*(up|q)_proj"}),
    (DENSE, {"target_modules": ["q_proj"], "rank_pattern": {"1.self_attn.q_proj": 7}}),
    (DENSE, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    ("gpt2-tied", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    (DENSE, {"target_modules": ["lm_head"]}),
    (DENSE, {"target_modules": ["embed_tokens", "q_proj"]}),
    ("mixtral", {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "settings"), ADAPTERS)
def test_adapters_of_others_are_merged_as_peft_applies_them(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    adapter = make_adapter(tmp_path, kind, **settings)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    own = logits(PeftModel.from_pretrained(base, str(adapter)))
    merged = load_model(ModelConfig(path=str(tmp_path / "student"), adapter=str(adapter)), torch.device("cpu"))
    torch.testing.assert_close(logits(merged), own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors")


def set_key(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "change",
    [
        lose_a_weight,
        set_key(r=10**9),
        set_key(r="4"),
        set_key(r=0),
        set_key(peft_type="PROMPT_TUNING", num_virtual_tokens=3),
        set_key(peft_type="EVIL"),
        set_key(target_modules=["nothing"]),
        set_key(megatron_config={"x": 1}, megatron_core="os.path"),
        lambda folder: (folder / "adapter_config.json").write_text("["),
        lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "adapter_config.json").unlink(),
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes((2**60).to_bytes(8, "little")),
    ],
)
def test_a_malformed_adapter_is_refused(tmp_path: Path, change: Any) -> None:
    adapter = make_adapter(tmp_path, DENSE, target_modules=["q_proj"])
    change(adapter)
    with pytest.raises(ModelError, match="adapter") as error:
        load_model(ModelConfig(path=str(tmp_path / "student"), adapter=str(adapter)), torch.device("cpu"))
    assert "\n" not in str(error.value)
    assert str(adapter) in str(error.value)


def test_a_head_that_only_the_configuration_ties_is_written_as_untied(tmp_path: Path) -> None:
    """The checkpoint holds a head of its own; a reader that follows the configuration would throw it away."""
    write_small_pair(tmp_path, "llama")
    path = tmp_path / "student" / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    parts = make_parts(tmp_path / "run", make_config(tmp_path, "tuning.type=full", "optimizer.lr=0.02"))
    train_step(parts, 0, 0)
    trained = logits(parts.student.model)
    parts.export(parts.student.model, tmp_path / "model", 1, None)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), trained)


def test_dropout_beside_fused_experts_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write_small_pair(tmp_path, "qwen3_moe")
    with pytest.raises(ModelError, match=r"fused experts, beside which peft puts no dropout; set tuning\.dropout=0"):
        open_pair(make_config(tmp_path, lora(dropout=0.05)))


def test_a_padding_id_beyond_the_embeddings_is_not_used(tmp_path: Path) -> None:
    """A padding token that was added to the tokenizer without new rows in the embeddings."""
    config = make_config(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "student")
    assert tokenizer.pad_token_id == 46
    pair = open_pair(config)
    assert pair.student.pad_id == 45
    assert random_model("llama", 46).get_input_embeddings().weight.shape[0] == 46


def trained_in_float32(folder: Path, *overrides: str, stored: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """A student of `stored` weights, trained in float32: the folder of its model, and its last checkpoint."""
    write_small_pair(folder, "llama")
    student = load_file(folder / "student" / "model.safetensors")
    save_file({n: w.to(stored) for n, w in student.items()}, folder / "student" / "model.safetensors", {"format": "pt"})
    distill(make_config(folder, "training.steps=1", *overrides), out=folder / "run")
    return folder / "run" / "model", folder / "run" / "checkpoints" / "step_000001"


@pytest.mark.parametrize(("asked", "written"), [("auto", "bfloat16"), ("float32", "float32")])
def test_the_model_is_written_in_the_type_of_the_checkpoint_unless_asked_otherwise(
    tmp_path: Path, asked: str, written: str
) -> None:
    folder, checkpoint = trained_in_float32(tmp_path, f"output.dtype={asked}")
    exported, trained = (load_file(path / "model.safetensors") for path in (folder, checkpoint))
    dtype = getattr(torch, written)
    assert {w.dtype for w in trained.values()} == {torch.float32}
    assert {n: w.to(dtype) for n, w in trained.items()}.keys() == exported.keys()
    assert all(torch.equal(exported[name], weight.to(dtype)) for name, weight in trained.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == written
    otherwise = "" if written == "float32" else "; trained and evaluated in float32"
    assert f"| weights | {written}{otherwise} |" in (folder / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype


def test_weights_beyond_float16_are_written_as_they_were_trained(tmp_path: Path) -> None:
    model = small("llama", 1)
    model.model.norm.weight.data[0] = 1e5
    with pytest.warns(UserWarning, match="too large for float16"):
        assert written_dtype(model, "float16", None) == torch.float32
    assert written_dtype(model, "auto", None) == torch.float32
    assert written_dtype(model, "auto", torch.bfloat16) == torch.bfloat16
    assert written_dtype(model.bfloat16(), "auto", torch.float32) == torch.bfloat16


def test_the_type_on_disk(tmp_path: Path) -> None:
    write_small_pair(tmp_path, "llama")
    assert stored_dtype(ModelConfig(path=str(tmp_path / "student"))) == torch.float32
    (tmp_path / "student" / "model.safetensors").unlink()
    assert stored_dtype(ModelConfig(path=str(tmp_path / "student"))) is None
    assert stored_dtype(ModelConfig(path="in memory")) is None


def test_what_an_architecture_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    model = small("llama", 1)
    model._keep_in_fp32_modules_strict = {"norm"}
    stops = {"format": "merged", "stop_ids": (1,), "card": ""}
    export_model(model, word_tokenizer(), tmp_path / "model", **stops, dtype=torch.bfloat16)
    types = {name: weight.dtype for name, weight in load_file(tmp_path / "model" / "model.safetensors").items()}
    assert {name for name, dtype in types.items() if dtype == torch.float32} == {"model.norm.weight"}
