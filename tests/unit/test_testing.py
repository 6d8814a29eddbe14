"""The public test doubles do what they are told."""

from __future__ import annotations

import torch

import headstart as hs
from headstart.testing import ScriptedEngine, ScriptedTeacher

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
