"""The benchmarks' own arithmetic, and that they run: nothing here looks at how long anything took."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import accuracy, picture, scaling, step
from bench.contenders import lora_config
from bench.cost import PHASES, Cost, Rates, completion_pass, costs, floor, key_value_weights, layer_weights, prompt_pass
from bench.workloads import WORKLOADS, Shape, Workload, small
from torch.utils.flop_counter import FlopCounterMode

from headstart.assemble.cost import nonnegative

TINY = Workload("tiny", small(32), small(64), 64, prompts=4, tokens=6)
SHAPE = Shape(hidden=32, layers=3, heads=4, kv_heads=2, head_dim=16, intermediate=48)


def counted(model: Any, tokens: int) -> int:
    """FLOPs of products with weights, forward and backward, the head at every token, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        ids = torch.arange(tokens)[None] % 50
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))


def last_layer(work: Workload, lengths: Sequence[int]) -> int:
    """What a plain forward does for prompts in its last layer and nobody needs."""
    shape = work.student
    return 2 * sum(p - 1 for p in lengths) * (layer_weights(shape) - key_value_weights(shape))


def test_flops_of_a_training_pass_are_what_torch_counts() -> None:
    work = replace(TINY, student=SHAPE, prompts=1, tokens=7)
    model = SHAPE.model(work.vocabulary, 1, "cpu", torch.float32)
    found = costs(work, [11])
    head = 6 * SHAPE.hidden * work.vocabulary
    expected = found["prompt"].linear + found["student"].linear + 17 * head + 3 * last_layer(work, [11])
    assert counted(model, 11 + 6) == expected
    assert found["head"].linear == 7 * head + 2 * 7 * work.teacher.hidden * work.vocabulary


def test_flops_under_lora_are_what_torch_counts() -> None:
    from peft import get_peft_model

    work = replace(TINY, student=SHAPE, prompts=1, tokens=7, lora=4)
    model = get_peft_model(SHAPE.model(work.vocabulary, 1, "cpu", torch.float32), lora_config(4))
    found = costs(work, [11])
    head = 4 * 17 * SHAPE.hidden * work.vocabulary
    expected = found["prompt"].linear + found["student"].linear + head + 2 * last_layer(work, [11])
    # Nothing goes back past the first layer's projections q, k and v, whose inputs are frozen embeddings.
    inputs = SHAPE.head_dim * (SHAPE.heads + 2 * SHAPE.kv_heads) + 3 * 4
    assert counted(model, 17) == expected - 2 * 17 * SHAPE.hidden * inputs
    assert found["optimizer"].moved == 7 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_attention_counts_every_pair_that_is_seen() -> None:
    lengths, samples, tokens = [5, 3], 2, 4
    per_pair = 4 * SHAPE.heads * SHAPE.head_dim
    whole = [sum(1 for i in range(p) for j in range(p) if j <= i) for p in lengths]
    assert prompt_pass(SHAPE, lengths).attention == per_pair * ((SHAPE.layers - 1) * sum(whole) + sum(lengths))
    seen = sum(p + t for p in lengths for _ in range(samples) for t in range(1, tokens))
    assert completion_pass(SHAPE, lengths, samples, tokens).attention == per_pair * SHAPE.layers * seen


def test_bytes_of_decoding() -> None:
    work = replace(TINY, student=SHAPE, samples=2, tokens=4)
    lengths = [5, 3]
    cached = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim
    moved = 0
    for t in range(4):  # the first token needs the head alone
        moved += SHAPE.hidden * work.vocabulary
        if t:
            moved += SHAPE.layers * layer_weights(SHAPE) + cached * (sum(lengths) + 2 * 2 * t)
    assert costs(work, lengths)["decode"].moved == 4 * moved


def test_samples_share_their_prompt_and_the_floor_takes_the_slower_of_two_rates() -> None:
    one, four = costs(TINY, [9] * 4), costs(replace(TINY, prompts=1, samples=4), [9])
    assert one["prompt"].linear == 4 * four["prompt"].linear
    assert one["head"] == four["head"]
    assert Cost(linear=6.0, attention=4.0, moved=3.0).seconds(Rates(flops=5.0, bytes=1.0)) == 3.0
    assert Cost(linear=6.0, attention=4.0, moved=1.0).seconds(Rates(flops=5.0, bytes=1.0)) == 2.0
    assert floor(TINY, [9] * 4, Rates(1e9, 1e9)).keys() == PHASES.keys()


def test_a_fit_finds_the_coefficients_that_made_the_figures() -> None:
    rows = [[1.0, a, b] for a, b in itertools.product((1.0, 5.0, 20.0), (2.0, 3.0, 30.0))]
    seconds = [0.5 + 0.25 * a for _, a, _ in rows]  # nothing of b
    assert nonnegative(rows, seconds) == pytest.approx([0.5, 0.25, 0.0], abs=1e-9)
    assert max(scaling.errors_left_out(rows, seconds)) < 1e-9
    seconds[4] *= 2
    assert max(scaling.errors_left_out(rows, seconds)) > 0.4
    falling = [2.0 - 0.05 * a for _, a, _ in rows]
    assert min(nonnegative(rows, falling)) >= 0.0


def test_ratios_are_made_within_rounds() -> None:
    found = step.ratios({"headstart": [1.0, 2.0, 4.0], "trl": [2.0, 6.0, 4.0]})
    assert found == {"trl": {"median": 2.0, "min": 1.0, "max": 3.0}}
    assert step.ratios({"trl": [1.0]}) == {}


def test_seconds_to_an_accuracy() -> None:
    assert accuracy.seconds_to([(0.0, 0.4), (1.0, 0.8), (3.0, 1.0)], 0.9) == pytest.approx(2.0)
    assert accuracy.seconds_to([(0.0, 0.4), (1.0, 0.8)], 0.9) is None
    curves = {"esr": [[(0.0, 0.0), (1.0, 0.9)]] * 3, "full": [[(0.0, 0.0), (t, 0.9)] for t in (2.0, 4.0, 8.0)]}
    found = accuracy.compared(curves, 0.9)
    assert found["ratios"] == pytest.approx([2.0, 4.0, 8.0])
    assert found["ratio"] == pytest.approx(4.0)
    assert found["interval"][0] == pytest.approx(4.0 / 2 ** (4.30 / 3**0.5))
    never = accuracy.compared({"esr": [[(0.0, 0.0)]], "full": [[(0.0, 0.0)]]}, 0.9)
    assert "never" in accuracy.sentence(never | {"target": 0.9})


@pytest.mark.parametrize("lora", [None, 2])
def test_a_measurement_has_all_its_parts_and_a_picture(tmp_path: Path, lora: int | None) -> None:
    result = step.measure(replace(TINY, lora=lora), ["headstart", "plain", "liger"], rounds=1)
    assert set(result["median"]) >= {"headstart", "plain"}
    assert max(result["gradient_error"].values()) < 1e-5
    assert all(len(values) == 1 for values in result["seconds"].values())
    for name, phases in result["phases"].items():
        assert sum(phases.values()) == pytest.approx(result["median"][name])
        assert all(phases[phase] > 0 for phase in ("rollout", "teacher", "student", "optimizer"))
    assert "liger" in result["median"] or result["unavailable"]["liger"]
    record = {"runs": [{"environment": step.environment(), "workloads": {"tiny": result}}]}
    assert json.loads(json.dumps(record)) == record
    picture.steps(record, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 5000
    assert "| tiny | headstart |" in step.table(record["runs"][0])


def test_both_malloc_settings_run_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run_with(variables: dict[str, str], arguments: list[str]) -> dict[str, Any]:
        seen.append(variables)
        return {"environment": {"malloc": variables}, "workloads": {}}

    monkeypatch.setattr(step, "run_with", run_with)
    step.main(["C1", "--malloc", "both", "--out", str(tmp_path / "step.json")])
    assert seen == [{}, step.MALLOC]
    assert len(json.loads((tmp_path / "step.json").read_text())["runs"]) == 2


def test_scaling_writes_its_figures_and_a_picture(tmp_path: Path) -> None:
    scaling.main(["--tiny", "--rounds", "1", "--out", str(tmp_path / "scaling.json")])
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert record["fit"].keys() == scaling.TERMS.keys()
    for point in record["sweeps"]["N"]:
        assert point["gib"] > 0
        assert point["fitted"].keys() == point["seconds"].keys() == scaling.TERMS.keys()
    assert (tmp_path / "scaling.png").stat().st_size > 5000


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_workloads_can_be_made(name: str) -> None:
    work = replace(WORKLOADS[name], device="meta")
    student, teacher = work.models()
    assert teacher.num_parameters() > 1.5 * student.num_parameters()
    assert student.num_parameters() == work.student.layers * layer_weights(work.student) + (
        work.vocabulary * work.student.hidden
        + work.student.layers * (2 * work.student.hidden + 2 * work.student.head_dim)
        + work.student.hidden
    )
    lengths = work.lengths(0)
    assert len(lengths) == work.prompts
    assert 81 <= min(lengths) <= max(lengths) <= 122
    assert all(cost.flops + cost.moved > 0 for cost in costs(work, lengths).values())


def test_a_teacher_is_shared_by_its_weights_alone() -> None:
    model = SHAPE.model(64, 1, "cpu", torch.float32)
    other = step.sharing(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other.base_model.forward = None
    assert model.base_model.forward is not None
    assert other.config is not model.config
