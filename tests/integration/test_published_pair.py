"""Two published checkpoints of different families, SmolLM2-135M-Instruct taught by Qwen2.5-Coder-0.5B-Instruct.

HEADSTART_MODELS names a folder that holds `smollm2-135m-instruct` and `qwen2.5-coder-0.5b-instruct` in Hugging Face
format. Takes about half an hour on one core.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from headstart.checks.run import run_preflight
from headstart.config.loader import parse
from headstart.config.schema import Config
from headstart.diagnosis.run import diagnose
from headstart.distillation.run import distill
from real_tokenizers import real_data

pytestmark = pytest.mark.slow


@pytest.fixture
def config() -> Config:
    folder = Path(os.environ.get("HEADSTART_MODELS", "nowhere"))
    student, teacher = folder / "smollm2-135m-instruct", folder / "qwen2.5-coder-0.5b-instruct"
    if not (student.is_dir() and teacher.is_dir()):
        pytest.skip("HEADSTART_MODELS names no folder with smollm2-135m-instruct and qwen2.5-coder-0.5b-instruct")
    mbpp = real_data("mbpp/mbpp.jsonl")
    return parse(
        {
            "student": {"path": str(student)},
            "teacher": {"path": str(teacher)},
            "tuning": {"type": "lora", "r": 32, "alpha": 64, "dropout": 0.0},
            "prompts": {"source": str(mbpp), "column": "text", "limit": 200},
            "horizon": {"type": "fixed", "tokens": 50},
            "optimizer": {"lr": 2e-4},
            "schedule": {"type": "constant", "warmup": 0.1},
            "training": {"steps": 20, "prompts_per_step": 4, "device": "cpu"},
            "diagnosis": {
                "task": {"type": "mbpp", "data": str(mbpp.with_name("sanitized-mbpp.json"))},
                "problems": 32,
                "max_tokens": 96,
                "grid": [16, 48],
                "batch_size": 64,
            },
        }
    )


def test_preflight(config: Config) -> None:
    findings = {f.check: f for f in run_preflight(config).findings}
    assert not [f for f in findings.values() if f.severity == "blocking"]
    assert findings["vocabulary"].figures["shared_tokens"] > 20_000
    assert findings["alignment"].figures["scored"] > 0.8
    assert findings["self-test"].severity == "ok"


def test_diagnosis(config: Config, tmp_path: Path) -> None:
    result = diagnose(config, out=tmp_path / "diagnosis")
    assert [point.prefix_tokens for point in result.decay.points] == [0, 16, 48]
    positions = json.loads((tmp_path / "diagnosis/diagnose/positions.json").read_text())
    assert positions["share_scored"] > 0.7
    assert 0 <= positions["prefixes_cut_back"] < 0.5


def test_the_divergence_falls(config: Config, tmp_path: Path) -> None:
    distill(config, out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    nats = [step["divergence"] for step in steps]
    assert len(nats) == 20
    assert sum(nats[-10:]) / 10 < 0.8 * sum(nats[:3]) / 3
    assert all(step["share_scored"] > 0.8 and step["rollouts_dropped"] == 0 for step in steps)
