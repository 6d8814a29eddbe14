"""Every horizon policy, in real runs with probes: saved after three steps and restored, it ends bit-equal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headstart.train import loop
from headstart.train.checkpoint import load_newest
from headstart.train.loop import Progress
from headstart.train.parts import Parts
from headstart.train.step import train_step
from support import make_config, make_parts

BOUNDS = "min_tokens: 2, max_tokens: 12"
PLUG_IN = "{type: custom, path: 'examples.horizons."
POLICIES = {
    "fixed": "{type: fixed, tokens: 4}",
    "fraction": f"{{type: fraction, share: 0.3, {BOUNDS}}}",
    "kl_coverage": f"{{type: kl_coverage, {BOUNDS}}}",
    "damage": f"{{type: damage, tokens: 4, {BOUNDS}}}",
    "recoverability": f"{{type: recoverability, tokens: 4, {BOUNDS}}}",
    "mixed": "{type: mixed, tokens: 4, max_tokens: 12, every: 3}",
    "roulette": "{type: roulette, tokens: 3, max_tokens: 12, weighted: true}",
    "scheduled": "{type: scheduled, tokens: 3, max_tokens: 12, increment: 2, every: 1}",
    "gated by overlap": "{type: scheduled, tokens: 3, max_tokens: 12, shape: linear, gate: overlap, threshold: 0.1}",
    "gated by R": "{type: scheduled, tokens: 3, max_tokens: 12, shape: linear, gate: recoverability, threshold: 0.0}",
    "overlap": f"{{type: overlap, tokens: 6, {BOUNDS}}}",
    "low_kl_stop": f"{PLUG_IN}low_kl_stop:LowKLStop', arguments: {{tokens: 6, {BOUNDS}, window: 2, patience: 1}}}}",
    "change_point": f"{PLUG_IN}loss_side:ChangePoint', arguments: {{max_tokens: 12, segment: 2}}}}",
    "soft_weight": f"{PLUG_IN}loss_side:SoftWeights', arguments: {{max_tokens: 8}}}}",
    "gradient_audit": f"{PLUG_IN}gradient_audit:GradientAudit', arguments: {{{BOUNDS}, every: 4}}}}",
}


def parts_of(folder: Path, name: str, run: str) -> Parts:
    """A run with answers to judge by, and a probe on every second step."""
    lora = ["tuning.type=lora", "tuning.r=2", "tuning.dropout=0.1", "tuning.targets=[q_proj]"]
    make_config(folder)
    prompts = folder / "prompts.jsonl"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps({**row, "answer": "w1"}) + "\n" for row in rows))
    config = make_config(
        folder,
        f"horizon={POLICIES[name]}",
        "prompts.answer_column=answer",
        "diagnosis.grader=exact",
        "probes={every: 2, prompts: 4, max_tokens: 16}",
        *(lora if name == "gradient_audit" else []),
        *(["training.denominator=sum"] if "weighted" in POLICIES[name] else []),
    )
    return make_parts(folder / run, config)


def go(parts: Parts, progress: Progress, steps: int) -> tuple[Progress, list[object]]:
    told: list[object] = []
    while progress.step < steps:
        report, _ = train_step(parts, progress.step, progress.generated_tokens)
        progress = replace(progress, step=report.step, generated_tokens=report.metrics["generated_tokens"])
        told.append({k: v for k, v in report.metrics.items() if "second" not in k and "memory" not in k})
    return progress, told


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.filterwarnings("ignore")
def test_a_restored_policy_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole = parts_of(tmp_path, name, "whole")
    _, told = go(whole, Progress(), 6)
    first = parts_of(tmp_path, name, "first")
    progress, _ = go(first, Progress(), 3)
    loop.save(first, progress)
    second = parts_of(tmp_path, name, "second")
    checkpoint = load_newest(tmp_path / "first" / "checkpoints", print)
    assert checkpoint is not None
    _, after = go(second, loop.restore(second, checkpoint), 6)
    assert after == told[3:]
    ends = [parts.student.trainable() for parts in (whole, second)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert any(step["probe_tokens"] > 0 for step in told)  # type: ignore[index]
