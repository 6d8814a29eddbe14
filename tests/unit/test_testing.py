"""The public test doubles do what they are told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

import headstart as hs
from headstart.testing import ScriptedEngine, ScriptedTeacher
from headstart.train.loop import run
from support import make_config, make_parts

PROMPTS = [hs.Prompt(0, "a", (5, 6), (5, 6)), hs.Prompt(1, "b", (7,), (7,))]
HOW = {"sampling": hs.Sampling(), "key": (0, "test", 0)}


def test_the_engine_says_its_script_and_cuts_at_the_horizon() -> None:
    engine: hs.RolloutEngine = ScriptedEngine({"a": [(8, 9, 1), (8,)], "b": [(4, 4, 4, 4)]})
    heard: list[hs.Rollout] = []
    rollouts = engine.generate(PROMPTS, samples=2, max_tokens=3, finished=heard.append, **HOW)
    assert [r.completion_ids for r in rollouts] == [(8, 9, 1), (8,), (4, 4, 4), (4, 4, 4)]
    assert [r.stopped for r in rollouts] == [True, False, False, False]
    assert heard == rollouts
    (short, long) = engine.generate(PROMPTS, samples=1, max_tokens=[1, 2], **HOW)
    assert (short.completion_ids, short.stopped, long.completion_ids) == ((8,), False, (4, 4))
    assert engine.calls == [(("a", "b"), 2, 3, (0, "test", 0)), (("a", "b"), 1, (1, 2), (0, "test", 0))]


def test_the_teacher_judges_every_position_from_what_came_before() -> None:
    teacher: hs.Teacher = ScriptedTeacher(lambda prefix: [float(len(prefix)), float(sum(prefix)), 0.0])
    rollouts = [hs.Rollout(PROMPTS[0], 0, (2, 1), True), hs.Rollout(PROMPTS[1], 0, (2,), False)]
    scores = teacher.score(rollouts)
    torch.testing.assert_close(scores.logits(slice(0, 3)), torch.tensor([[0.0, 0, 0], [1, 2, 0], [0, 0, 0]]))
    torch.testing.assert_close(scores.logits(torch.tensor([1])), torch.tensor([[1.0, 2, 0]]))
    assert teacher.scored == rollouts


def test_a_run_with_an_engine_and_a_teacher_of_other_kinds(tmp_path: Path) -> None:
    """What has `generate` and `score` alone trains: no model behind it, no prefill, memory counted without it."""
    parts = make_parts(tmp_path / "run", make_config(tmp_path, "training.memory_budget_gib=auto", "optimizer.lr=1e-2"))
    liked = [3.0 * (token == 5) for token in range(parts.student.vocabulary)]
    engine = ScriptedEngine({prompt.problem_id: [(5, 6, 7, 5, 6, 7, 8)] for prompt in parts.prompts})
    teacher = ScriptedTeacher(lambda prefix: liked)
    run(replace(parts, engine=engine, teacher=teacher))
    assert [asked[2] for asked in engine.calls] == [6, 6, 6, 6]
    assert len(teacher.scored) == 4 * 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert losses[3] < 0.8 * losses[0]
