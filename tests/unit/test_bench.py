"""The benchmarks' own arithmetic, and that they run: nothing here looks at how long anything took."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import accuracy, kinds, picture, scaling, step, workloads
from bench.contenders import lora_config
from bench.cost import (
    PHASES,
    Cost,
    Rates,
    completion_pass,
    costs,
    floor,
    key_value_weights,
    layer_weights,
    phase_products,
    prompt_pass,
    shape_rates,
)
from bench.workloads import FROM_FOLDERS, WORKLOADS, Shape, Workload, from_folders, small
from torch.utils.flop_counter import FlopCounterMode

from headstart.assemble.cost import nonnegative

TINY = Workload("tiny", small(32), small(64), 64, prompts=4, tokens=6)
SHAPE = Shape(hidden=32, layers=3, heads=4, kv_heads=2, head_dim=16, intermediate=48)


@pytest.fixture
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of products from one call each: all that is measured otherwise takes some seconds."""

    def once(work: Workload, run: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    monkeypatch.setattr(step.cost, "_fastest", once)


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
    assert Cost(linear=6.0, attention=4.0, moved=3.0).seconds(Rates(5.0, 5.0, 1.0)) == 3.0
    assert Cost(linear=6.0, attention=4.0, moved=1.0).seconds(Rates(5.0, 5.0, 1.0)) == 2.0
    assert Cost(linear=6.0, attention=4.0, moved=1.0).seconds(Rates(linear=6.0, attention=2.0, bytes=1.0)) == 3.0
    assert floor(TINY, [9] * 4, Rates(1e9, 1e9, 1e9)).keys() == PHASES.keys()


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


@pytest.mark.usefixtures("timed_once")
@pytest.mark.parametrize("lora", [None, 2])
def test_a_measurement_has_all_its_parts_and_a_picture(tmp_path: Path, lora: int | None) -> None:
    result = step.measure(replace(TINY, lora=lora), ["headstart", "plain", "liger"], rounds=1)
    assert set(result["median"]) >= {"headstart", "plain"}
    assert max(result["gradient_error"].values()) < 1e-5
    assert sum(result["floor"].values()) > 0 < sum(result["floor_at_best_rate"].values())
    assert all(len(values) == 1 for values in result["seconds"].values())
    for name, phases in result["phases"].items():
        assert sum(phases.values()) == pytest.approx(result["median"][name])
        assert all(phases[phase] > 0 for phase in ("rollout", "teacher", "student", "optimizer"))
    assert "liger" in result["median"] or result["unavailable"]["liger"]
    record = {"runs": [{"environment": step.environment(), "workloads": {"tiny": result}, "skipped": {}}]}
    assert json.loads(json.dumps(record)) == record
    picture.steps(record, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 5000
    assert "| tiny | headstart |" in step.table(record["runs"][0])
    assert "| tiny | rollout |" in step.phase_table(record["runs"][0])


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


@pytest.mark.parametrize("name", ["headstart", "plain"])
def test_kinds_of_calls_are_those_of_the_phases(name: str) -> None:
    found = kinds.measure(name, TINY)
    assert found["phases"].keys() == found["kinds"].keys()
    for phase, seconds in found["phases"].items():
        assert sum(found["kinds"][phase].values()) == pytest.approx(seconds)
    for phase in ("rollout", "teacher", "student"):
        assert found["kinds"][phase]["products"] > 0
        assert found["kinds"][phase]["attention"] > 0
    assert f"| tiny | {name} | rollout |" in kinds.table({"workloads": {"tiny": {name: found}}})


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_workloads_can_be_made(name: str) -> None:
    work = replace(WORKLOADS[name], device="meta")
    student, teacher = work.models()
    shape = work.student
    assert teacher.num_parameters() >= student.num_parameters()
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.layout == "qwen3" else 0)
    biases = shape.head_dim * (shape.heads + 2 * shape.kv_heads) if shape.layout == "qwen2" else 0
    assert student.num_parameters() == shape.layers * layer_weights(shape) + (
        work.vocabulary * shape.hidden + shape.layers * (norms + biases) + shape.hidden
    )
    lengths, (least, most) = work.lengths(0), work.prompt_words
    assert len(lengths) == work.prompts
    assert least <= min(lengths) <= max(lengths) <= most
    assert all(cost.flops + cost.moved > 0 for cost in costs(work, lengths).values())


@pytest.mark.parametrize("layout", ["llama", "qwen2"])
@pytest.mark.parametrize("lora", [None, 4])
def test_flops_of_other_layouts_are_what_torch_counts(layout: str, lora: int | None) -> None:
    from peft import get_peft_model

    shape = replace(SHAPE, layout=layout, tied=False)
    work = replace(TINY, student=shape, prompts=1, tokens=7, lora=lora)
    model = shape.model(work.vocabulary, 1, "cpu", torch.float32)
    assert Shape.of(model.config) == shape
    model = get_peft_model(model, lora_config(lora)) if lora else model
    found, head = costs(work, [11]), 17 * 2 * shape.hidden * work.vocabulary
    expected = found["prompt"].linear + found["student"].linear + (2 if lora else 3) * (head + last_layer(work, [11]))
    if lora:  # nothing goes back past the first layer's q, k and v
        expected -= 2 * 17 * shape.hidden * (shape.head_dim * (shape.heads + 2 * shape.kv_heads) + 3 * 4)
    assert counted(model, 17) == expected
    moved = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 2)
    assert found["optimizer"].moved == 7 * 4 * moved


def test_products_of_a_phase_have_its_flops() -> None:
    work = replace(TINY, student=SHAPE, teacher=SHAPE)
    lengths = [9] * 4
    whole, found = costs(work, lengths), phase_products(work, lengths)

    def flops(phase: str) -> float:
        return sum(p.flops for p in found[phase][0])

    rows, fed = 4, 4 * 9 + 4 * 5
    per_row = 2 * layer_weights(SHAPE)
    assert flops("prompt") == 4 * 9 * per_row
    assert flops("decode") == rows * (per_row + 2 * SHAPE.hidden * 64)
    assert flops("teacher") == fed * per_row
    assert flops("student") == 3 * fed * per_row
    assert sum(p.flops for p in phase_products(replace(work, lora=2), lengths)["student"][0]) == 2 * fed * per_row
    assert flops("head") == 256 / (4 * 6) * whole["head"].linear
    group, keys = SHAPE.heads // SHAPE.kv_heads, 9 + 6 // 2
    assert [(p.batch, p.rows, p.inner, p.columns) for p in found["decode"][1]] == [
        (rows * SHAPE.kv_heads, group, SHAPE.head_dim, keys),
        (rows * SHAPE.kv_heads, group, keys, SHAPE.head_dim),
    ]
    # Four samples of one prompt read its keys once.
    shared, _, own, _ = phase_products(replace(work, prompts=1, samples=4), [9])["decode"][1]
    assert (shared.batch, shared.rows, shared.columns) == (SHAPE.kv_heads, 4 * group, 9)
    assert (own.batch, own.rows, own.columns) == (4 * SHAPE.kv_heads, group, 6 // 2)


def test_rates_of_every_phase() -> None:
    found = shape_rates(TINY, [9] * 4, repeats=1)
    assert found.keys() == PHASES.keys()
    assert all(rates.linear > 0 and rates.attention > 0 and rates.bytes > 0 for rates in found.values())


@pytest.mark.usefixtures("timed_once")
def test_two_tokenizers_are_measured_alone() -> None:
    work = replace(TINY, teacher_vocabulary=96)
    result = step.measure(work, ["headstart", "trl", "plain"], rounds=1, warm_up=0)
    assert list(result["median"]) == ["headstart"]
    assert result["gradient_error"] == {"headstart": None}
    assert result["unavailable"].keys() == {"trl", "plain"}
    assert costs(work, [9] * 4)["head"].logits == 4 * 6 * (64 + 96)


@pytest.mark.usefixtures("timed_once")
def test_checkpoints_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart.testing import CHAT, word_tokenizer

    words = word_tokenizer([f"w{i}" for i in range(50)])
    words.chat_template = CHAT
    for name, vocabulary in (("student", len(words)), ("teacher", len(words))):
        replace(SHAPE, layout="llama").model(vocabulary, 1, "cpu", torch.float32).save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"question": " ".join(f"w{(i + j) % 50}" for j in range(90))}) + "\n" for i in range(64))
    )
    for student, teacher, said in (
        (None, None, "R1 needs folders: --student DIR --teacher DIR"),
        (tmp_path / "none", tmp_path / "teacher", f"R1 needs {tmp_path / 'none' / 'config.json'}"),
    ):
        with pytest.raises(LookupError, match=said):
            from_folders("R1", student, teacher)
    both = tmp_path / "student", tmp_path / "teacher"
    monkeypatch.setattr(workloads, "QUESTIONS", tmp_path / "none.jsonl")
    with pytest.raises(LookupError, match=r"none\.jsonl"):
        from_folders("R1", *both)
    monkeypatch.setattr(workloads, "QUESTIONS", questions)
    with pytest.raises(LookupError, match="R3 is for two tokenizers"):
        from_folders("R3", *both)
    monkeypatch.setitem(FROM_FOLDERS, "R1", {"prompts": 2, "tokens": 3})
    work = from_folders("R1", tmp_path / "student", tmp_path / "student")
    student, teacher = work.models()
    assert not torch.equal(student.lm_head.weight, teacher.lm_head.weight)  # a pair of equals has no gradient
    result = step.measure(work, ["headstart", "plain"], rounds=1, warm_up=0)
    assert max(result["gradient_error"].values()) < 1e-5
    assert "".join(work.step_texts(0)).count("w") >= 180


def test_rows_that_need_folders_are_skipped_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tmp_path / "part.json"
    step.main(["R1", "--part", str(part)])
    run = json.loads(part.read_text())
    assert run["skipped"] == {"R1": "R1 needs folders: --student DIR --teacher DIR"}
    assert "| R1 | not run: R1 needs folders" in step.table(run)


def test_a_teacher_is_shared_by_its_weights_alone() -> None:
    model = SHAPE.model(64, 1, "cpu", torch.float32)
    other = step.sharing(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other.base_model.forward = None
    assert model.base_model.forward is not None
    assert other.config is not model.config
