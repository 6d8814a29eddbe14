"""The examples: the teaching loop has the library's loss, and TRL trains with our horizon."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from examples import loop

import headstart as hs
from headstart.train.step import sample_rollouts, train_step
from support import make_config, make_parts


@pytest.mark.parametrize("teacher_view", [[], ["prompts.teacher_view.system=w7"]])
def test_the_loop_has_the_loss_of_the_library_s_step(tmp_path: Path, teacher_view: list[str]) -> None:
    parts = make_parts(tmp_path / "run", make_config(tmp_path, "optimizer.lr=1e-9", *teacher_view))
    rollouts = sample_rollouts(parts, 0, parts.horizon.tokens(0))
    assert {r.stopped for r in rollouts} == {True, False}
    pair = hs.Pair(
        parts.student, parts.teacher.model, loop_tokenizer(), runtime=parts.runtime, vocabulary=parts.vocabulary
    )
    report, _ = train_step(parts, 0, 0)
    assert loop.loss_of(pair, rollouts).item() == pytest.approx(report.metrics["loss"], abs=1e-6)


def loop_tokenizer() -> object:
    return type("Tokenizer", (), {"pad_token_id": 0, "chat_template": None, "get_chat_template": lambda self: None})()


def test_the_loop_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loop, "STEPS", 20)
    torch.set_num_threads(1)
    loop.main()
    lines = capsys.readouterr().out.splitlines()
    before, after = (float(lines[place].split()[1].rstrip("%")) for place in (0, -1))
    assert after > before + 15


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (the extra `bench`)")
def test_trl_trains_with_a_growing_horizon() -> None:
    from examples import trl_horizon

    used = trl_horizon.main(steps=4, problems=12).used
    assert used[0] < 100
    assert used[-1] == trl_horizon.LONGEST
    assert used == sorted(used)
