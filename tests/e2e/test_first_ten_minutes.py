"""A new user's first ten minutes, as they would be typed: two model folders, a prompt file, and nothing else.

Every command speaks early and is never silent for long: what is written is timed as it arrives.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from bench.watch import watch

import headstart
from headstart.config.loader import load
from headstart.tasks.tiny import TinyTask

TINY = Path(headstart.__file__).parent / "data" / "tiny"
FIRST_WORD, SILENCE = 10.0, 15.0
"""Seconds. On an idle machine the first word takes under five."""
PROMPTS = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the user has: two model folders and a prompt file, with the digit each problem ends at as its answer."""
    for name in ("student", "teacher"):
        shutil.copytree(TINY / name, tmp_path / "models" / name)
    rows = [{"question": p.messages[0]["content"], "answer": p.answer} for p in TinyTask("train", PROMPTS).problems()]  # type: ignore[index]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
def test_from_init_to_chat(folder: Path) -> None:
    def typed(line: str, *more: str, codes: tuple[int, ...] = (0,)) -> str:
        seen = watch([sys.executable, "-m", "headstart", *line.split(), *more], cwd=folder)
        assert seen.code in codes, seen.output
        shared = max(1.0, seen.wall_s / seen.cpu_s)  # what a machine with other work makes of a second
        assert seen.first_word_s < FIRST_WORD * shared, line
        assert seen.longest_silence_s < SILENCE * shared, line
        return seen.output

    said = typed("init --student models/student --teacher models/teacher --prompts mine.jsonl --task tiny")
    assert "headstart preflight run.yaml" in said
    assert load(folder / "run.yaml").prompts.answer_column == "answer"

    assert "preflight: " in typed("preflight run.yaml --quick", codes=(0, 1))

    assert "written: diagnosis" in typed("diagnose run.yaml --out diagnosis --minutes 0.5")

    said = typed("distill run.yaml --out first training.steps=4 evaluation.limit=8")
    assert "4 steps" in said
    assert (folder / "first/model/config.json").exists()

    assert "8 problems" in typed("evaluate first/model --task tiny --out judged limit=8")
    assert "written to first" in typed("explain first --only samples evaluation.limit=4")
    assert (folder / "first/explain/samples.json").exists()

    typed("report first diagnosis")
    assert (folder / "first/comparison.html").stat().st_size > 10_000

    question = json.loads((folder / "mine.jsonl").read_text().splitlines()[0])["question"]
    assert "plan first we use" in typed("chat first --prompt", question)
