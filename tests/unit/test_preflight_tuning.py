from pathlib import Path

import pytest
import torch

from headstart.checks.tuning import gradients, trainable
from preflight_pairs import loaded, speak
from support import make_config

LORA = "tuning={type: lora, r: 4}"


@pytest.mark.parametrize("tuning", ["tuning.type=full", LORA])
def test_what_is_asked_for_is_trained_and_reached(tmp_path: Path, tuning: str) -> None:
    pair, prompts = loaded(make_config(tmp_path, tuning))
    (finding,) = trainable(pair)
    expected = sum(p.numel() for p in pair.student.model.parameters() if p.requires_grad)
    assert finding.severity == "ok"
    assert finding.figures["trainable"] == expected
    assert finding.figures["tied_head"] is True
    reached = gradients(pair, speak(pair, prompts, 12, 2))
    assert reached.severity == "ok", reached.message
    # B is zero at the start, so half of an adapter's matrices wait for it.
    assert reached.figures["waiting"] == (reached.figures["tensors"] // 2 if tuning == LORA else 0)
    assert all(p.grad is None for p in pair.student.model.parameters())


def test_a_gradient_is_found_where_student_and_teacher_agree(tmp_path: Path) -> None:
    """Self-distillation starts at divergence zero; that says nothing against the adapter."""
    pair, prompts = loaded(make_config(tmp_path, LORA, f"teacher.path={tmp_path / 'student'}"))
    assert gradients(pair, speak(pair, prompts, 12, 2)).severity == "ok"


def test_the_head_is_told(tmp_path: Path) -> None:
    pair, _ = loaded(make_config(tmp_path, "tuning.type=full"))
    assert "tied to the input embeddings" in trainable(pair)[0].message
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


def test_a_weight_that_the_model_does_not_use_warns(tmp_path: Path) -> None:
    pair, prompts = loaded(make_config(tmp_path, "tuning.type=full"))
    pair.student.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    finding = gradients(pair, speak(pair, prompts, 12, 2))
    assert finding.severity == "warning"
    assert finding.figures["zero"] == ["unused"]


def test_a_gradient_that_reaches_nothing_blocks(tmp_path: Path) -> None:
    """The checkpoint's code detaches its output."""
    pair, prompts = loaded(make_config(tmp_path, LORA))

    head = pair.student.head
    pair.student.head = lambda hidden_mD: head(hidden_mD.detach())  # type: ignore[method-assign]
    finding = gradients(pair, speak(pair, prompts, 12, 2))
    assert finding.severity == "blocking"
    assert finding.message.startswith("no gradient reaches")


def test_a_gradient_that_is_not_finite_blocks(tmp_path: Path) -> None:
    pair, prompts = loaded(make_config(tmp_path, "tuning.type=full"))
    rollouts = speak(pair, prompts, 12, 2)
    weight = pair.student.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    finding = gradients(pair, rollouts)
    assert finding.severity == "blocking"
    assert finding.figures["not_finite"] == ["model.layers.0.mlp.up_proj.weight"]
