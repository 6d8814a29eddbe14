"""The cost model of many GPUs: its parts by hand, the way each knob moves it, and the pages that quote it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench.scale import (
    Card,
    Job,
    Model,
    break_even,
    break_even_table,
    decode,
    gather,
    layouts,
    learn,
    paper_job,
    score,
    seconds,
    size_table,
    step_table,
    sync,
    sync_table,
    update,
    wire_table,
)

from headstart.config.schema import ModelConfig
from headstart.models.load import load_outline

DOCS = Path(__file__).parents[2] / "docs"
SHAPES = Path(__file__).parents[2] / "recipes/shapes"
JOB = paper_job()


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen3-1.7b", "qwen2.5-32b", "qwen2.5-72b"])
def test_weights_are_those_of_the_real_shape(name: str) -> None:
    import torch

    real = load_outline(ModelConfig(path=str(SHAPES / name)), torch.device("cuda"))
    assert Model.of(name).weights == pytest.approx(sum(p.numel() for p in real.parameters()), rel=2e-4)


def test_parts_by_hand() -> None:
    """32B: 65.5 GB; 64 layers with 8 heads of 128 for keys and values; 72B: 72.7e9 weights."""
    assert Model.of("qwen2.5-32b").bytes == pytest.approx(65.5e9, rel=1e-3)
    assert Model.of("qwen2.5-32b").token_cache == 2 * 64 * 8 * 128 * 2
    at = replace(JOB, shard=8, gathered=True, tokens=1000, prompt=10)
    rows, context = 8, 510
    token = (65.5e9 + rows * context * 262_144) / (0.6 * 3.35e12)
    assert decode(at) == pytest.approx(1000 * token + 65.5e9 * 7 / 8 / (0.7 * 450e9), rel=0.01)
    served = replace(JOB, teacher_gpus=8, tokens=1)
    assert score(served) == pytest.approx(512 * 2 * 70e9 * 200 / 8 / (0.4 * 989e12), rel=0.05)
    assert gather(JOB, 64e9) == pytest.approx(63e9 / (0.7 * 50e9))
    assert gather(replace(JOB, shard=8), 64e9) == pytest.approx(56e9 / (0.7 * 450e9))
    full = replace(JOB, lora=None)
    assert update(full) == pytest.approx(28 * 32.76e9 / 64 / (0.6 * 3.35e12), rel=1e-3)
    long = replace(JOB, shard=8, tokens=8192)
    assert learn(long) == pytest.approx(3 * 8 * 2 * 32e9 * 8392 / (0.4 * 989e12), rel=0.2)
    assert sync(replace(JOB, how="checkpoint")) == pytest.approx(2 * 65.5e9 / 2e9, rel=1e-3)
    assert seconds(JOB)["sync"] == 0, "nothing is served"


def test_every_phase_moves_the_right_way() -> None:
    for job in layouts(JOB).values():
        short, long = seconds(job), seconds(replace(job, tokens=8192))
        assert all(long[phase] >= short[phase] for phase in short)
        assert sum(long.values()) > 20 * sum(short.values())
        slow = replace(job, card=replace(job.card, network=job.card.network / 2, nvlink=job.card.nvlink / 2))
        assert sum(seconds(slow).values()) > sum(seconds(job).values())
    assert decode(replace(JOB, gathered=True)) < decode(JOB)
    assert sum(seconds(replace(JOB, shard=8)).values()) < sum(seconds(JOB).values()), "links of a node are quicker"
    assert learn(replace(JOB, lora=None)) > learn(JOB)
    assert all(j.trainers + j.teacher_gpus + j.rollout_gpus == 64 for j in layouts(JOB).values())
    assert all(j.trainers % j.shard == 0 for j in layouts(replace(JOB, lora=None)).values())


def test_a_server_pays_from_some_horizon_on() -> None:
    job = Job(Model.of("qwen2.5-32b"), Model.of("qwen2.5-72b"), rollouts=64, trainers=8, shard=8, gathered=True)
    found = [break_even(job, how) for how in ("adapter", "transfer", "checkpoint")]
    assert None not in found
    assert found[1] is not None
    assert found[2] is not None
    assert found[1] < found[2], "a whole checkpoint through a file system costs most"
    slow = replace(job, card=replace(Card(), storage=1e3))
    assert break_even(slow, "adapter") is None


def test_a_served_adapter_decodes_slower() -> None:
    served = replace(JOB, rollout_gpus=16, tokens=1000)
    assert 1.3 < decode(served) / decode(replace(served, how="checkpoint")) < 1.4


@pytest.mark.parametrize(
    ("page", "lines"),
    [
        ("explanation/scale.md", size_table() + step_table(paper_job()) + step_table(paper_job(None))),
        ("how-to/scale.md", wire_table() + sync_table() + break_even_table()),
    ],
)
def test_pages_quote_what_the_script_says(page: str, lines: list[str]) -> None:
    text = (DOCS / page).read_text()
    assert not [line for line in lines if line not in text], "run python -m bench.scale and copy its tables"
