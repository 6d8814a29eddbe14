from pathlib import Path

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from headstart.checks.findings import Finding
from headstart.checks.tuning import trainable
from headstart.testing import random_model, word_tokenizer, write_checkpoint
from preflight_pairs import loaded, speak
from support import make_config, write_prompts

LORA = "tuning={type: lora, r: 4}"


@pytest.mark.parametrize("tuning", ["tuning.type=full", LORA])
def test_what_is_asked_for_is_trained_and_reached(tmp_path: Path, tuning: str) -> None:
    pair, prompts = loaded(make_config(tmp_path, tuning))
    (finding,) = trainable(pair)
    expected = sum(p.numel() for p in pair.student.model.parameters() if p.requires_grad)
    assert finding.severity == "ok"
    assert finding.figures["trainable"] == expected
    assert finding.figures["tied_head"] is True
    reached = trainable(pair, speak(pair, prompts, 12, 2))[-1]
    assert reached.severity == "ok", reached.message
    # B is zero at the start, so half of an adapter's matrices wait for it.
    assert reached.figures["waiting"] == (reached.figures["tensors"] // 2 if tuning == LORA else 0)
    assert all(p.grad is None for p in pair.student.model.parameters())


def test_a_gradient_is_found_where_student_and_teacher_agree(tmp_path: Path) -> None:
    """Self-distillation starts at divergence zero; that says nothing against the adapter."""
    pair, prompts = loaded(make_config(tmp_path, LORA, f"teacher.path={tmp_path / 'student'}"))
    assert trainable(pair, speak(pair, prompts, 12, 2))[-1].severity == "ok"


def test_the_head_is_told(tmp_path: Path) -> None:
    pair, _ = loaded(make_config(tmp_path, "tuning.type=full"))
    assert "the output head is trained, tied to the input embeddings (one weight)" in trainable(pair)[0].message
    pair, _ = loaded(make_config(tmp_path, LORA))
    assert "the output head stays as it is" in trainable(pair)[0].message


def test_a_frozen_weight_blocks_full_tuning(tmp_path: Path) -> None:
    pair, _ = loaded(make_config(tmp_path, "tuning.type=full"))
    pair.student.model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    (finding,) = trainable(pair)
    assert finding.severity == "blocking"
    assert finding.figures["wrong"] == ["model.layers.1.mlp.up_proj.weight"]


def test_a_weight_beyond_the_adapter_blocks(tmp_path: Path) -> None:
    pair, _ = loaded(make_config(tmp_path, LORA))
    pair.student.backbone.norm.weight.requires_grad_(True)
    (finding,) = trainable(pair)
    assert finding.severity == "blocking"
    assert finding.figures["wrong"] == ["base_model.model.model.norm.weight"]


def test_nothing_trainable_blocks(tmp_path: Path) -> None:
    pair, _ = loaded(make_config(tmp_path, LORA))
    pair.student.model.requires_grad_(False)
    assert trainable(pair)[0].severity == "blocking"
    assert "no weight is trainable" in trainable(pair)[0].message


def test_a_target_that_fits_nothing_blocks(tmp_path: Path) -> None:
    """peft adapts q_proj and says nothing of the misspelt one."""
    pair, _ = loaded(make_config(tmp_path, "tuning={type: lora, r: 4, targets: [q_proj, vproj]}"))
    finding = trainable(pair)[-1]
    assert finding.severity == "blocking"
    assert finding.figures == {"missing": ["vproj"]}
    assert "adapted are q_proj" in (finding.remedy or "")
    good, _ = loaded(make_config(tmp_path, "tuning={type: lora, r: 4, targets: [q_proj, v_proj]}"))
    assert [f.severity for f in trainable(good)] == ["ok"]


def moe(folder: Path, tuning: str) -> list[Finding]:
    """The findings of a small Qwen2-MoE, whose experts are fused: 44% of its weights."""
    for who, seed in (("student", 1), ("teacher", 2)):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
        config = Qwen2MoeConfig(
            vocab_size=46, shared_expert_intermediate_size=32, pad_token_id=0, eos_token_id=1, **sizes, **heads
        )
        write_checkpoint(folder / who, Qwen2MoeForCausalLM(config), word_tokenizer())
    write_prompts(folder)
    return trainable(loaded(make_config(folder, tuning))[0])


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj]", "[q_proj, gate_proj, up_proj, down_proj]"])
def test_experts_without_an_adapter_warn_with_their_share(tmp_path: Path, targets: str) -> None:
    finding = moe(tmp_path, f"tuning={{type: lora, r: 4, targets: {targets}}}")[0]
    assert finding.severity == "warning"
    assert "no adapter changes the fused experts" in finding.message
    assert "experts 44%" in finding.message.partition("not beside")[2]
    assert "tuning.type=full" in (finding.remedy or "")
    assert finding.figures["fused_without_adapter"] == pytest.approx(0.44, abs=0.01)
    assert finding.figures["without_adapter"]["experts"] == finding.figures["fused_without_adapter"]


@pytest.mark.parametrize(
    ("tuning", "beside"),
    [
        ("tuning={type: lora, r: 4}", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("tuning={type: lora, r: 4, targets: [q_proj, v_proj]}", {"q_proj", "v_proj"}),
        ("tuning={type: lora, r: 4, targets: [layers.1.mlp.up_proj]}", {"up_proj"}),
    ],
)
def test_shares_are_those_of_the_base_weights(tmp_path: Path, tuning: str, beside: set[str]) -> None:
    pair, _ = loaded(make_config(tmp_path, tuning))
    (finding,) = trainable(pair)
    figures = finding.figures
    assert finding.severity == "ok"
    assert set(figures["adapted"]) == beside
    assert sum(figures["adapted"].values()) + sum(figures["without_adapter"].values()) == pytest.approx(1)
    base = {n: p.numel() for n, p in random_model("llama", 46).named_parameters()}
    for kind in beside:
        expected = sum(n for name, n in base.items() if f".{kind}." in name) / sum(base.values())
        assert figures["adapted"][kind] + figures["without_adapter"].get(kind, 0.0) == pytest.approx(expected)
    assert figures["without_adapter"]["embed_tokens"] == pytest.approx(46 * 32 / sum(base.values()))
    assert f"beside {sum(figures['adapted'].values()):.0%} (" in finding.message


@pytest.mark.parametrize("targets", ["[embed_tokens]", "[lm_head]", "[embed_tokens, lm_head, q_proj]"])
def test_adapters_on_embeddings_wait_for_their_partner_too(tmp_path: Path, targets: str) -> None:
    """Of an embedding's adapter A is zero at the start, of a linear layer's B."""
    config = make_config(tmp_path, f"tuning={{type: lora, r: 4, targets: {targets}}}", architecture="phi")
    pair, prompts = loaded(config)
    (finding,) = trainable(pair)
    assert finding.severity == "ok"
    assert ("head is trained" in finding.message) == ("lm_head" in targets)
    reached = trainable(pair, speak(pair, prompts, 12, 2))[-1]
    assert reached.severity == "ok", reached.message
    assert reached.figures["waiting"] == reached.figures["tensors"] // 2


def test_a_weight_that_the_model_does_not_use_warns(tmp_path: Path) -> None:
    pair, prompts = loaded(make_config(tmp_path, "tuning.type=full"))
    pair.student.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    finding = trainable(pair, speak(pair, prompts, 12, 2))[-1]
    assert finding.severity == "warning"
    assert finding.figures["zero"] == ["unused"]


def test_a_gradient_that_reaches_nothing_blocks(tmp_path: Path) -> None:
    """The checkpoint's code detaches its output."""
    pair, prompts = loaded(make_config(tmp_path, LORA))

    head = pair.student.head
    pair.student.head = lambda hidden_mD: head(hidden_mD.detach())  # type: ignore[method-assign]
    finding = trainable(pair, speak(pair, prompts, 12, 2))[-1]
    assert finding.severity == "blocking"
    assert finding.message.startswith("no gradient reaches")


def test_a_gradient_that_is_not_finite_blocks(tmp_path: Path) -> None:
    pair, prompts = loaded(make_config(tmp_path, "tuning.type=full"))
    rollouts = speak(pair, prompts, 12, 2)
    weight = pair.student.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    finding = trainable(pair, rollouts)[-1]
    assert finding.severity == "blocking"
    assert finding.figures["not_finite"] == ["model.layers.0.mlp.up_proj.weight"]
