"""The code of docs/reference/python.md and the commands of the tutorial do what their pages say."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

import quick
from headstart.testing import random_model, word_tokenizer

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    tokenizer = word_tokenizer()
    student, teacher = (random_model("llama", len(tokenizer), seed=seed) for seed in (1, 2))
    for model in (student, teacher):
        model.config.max_position_embeddings = 4096
    names = {
        "student_logits": torch.randn(2, 5, 7, requires_grad=True),
        "teacher_logits": torch.randn(2, 5, 7),
        "labels": torch.tensor([[-100, 1, 2, 3, 4]] * 2),
        "hidden": torch.randn(2, 5, student.config.hidden_size, requires_grad=True),
        "teacher_hidden": torch.randn(2, 5, teacher.config.hidden_size),
        "student_model": student,
        "teacher_model": teacher,
        "tokenizer": tokenizer,
        "copy": copy,
        "datasets": datasets,
    }
    found = blocks("reference/python.md", "python")
    assert len(found) == 9
    for block in found:
        lines = [line for line in block.splitlines() if line and not line.startswith("import")]
        assert len(lines) <= 5, "a user of one piece needs no more than five lines"
        exec(block, names)
    assert names["advice"].tokens > 0  # type: ignore[attr-defined]
    assert (tmp_path / "runs/python/report.html").exists()
    assert names["run"].model is student  # type: ignore[attr-defined]
    assert (tmp_path / "runs/study/study.html").exists()


@pytest.mark.slow
def test_the_tutorial_from_its_first_line_to_its_last(tmp_path: Path) -> None:
    (run_file,) = blocks("tutorials/first-pair.md", "yaml")
    (tmp_path / "first.yaml").write_text(run_file)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    said = []
    for block in blocks("tutorials/first-pair.md", "sh"):
        done = subprocess.run(
            quick.shell() + block, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    preflight, diagnosis, training, explanation, report = said
    assert "warning" not in preflight
    assert re.search(r"Start with N = (16|32);", diagnosis)
    before, after = (float(x) for x in re.search(r"accuracy +([\d.]+)% +([\d.]+)%", training).groups())  # type: ignore[union-attr]
    assert before < 55
    assert after > 85
    assert "mixture" in explanation
    assert "comparison.html" in report
    assert (tmp_path / "runs/first/comparison.html").stat().st_size > 10_000
