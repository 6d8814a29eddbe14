"""Probes of a step, the loss side, the gradient audit and the shuffled teacher, with small random models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from examples.shuffled_teacher import ShuffledTeacher

import quick
from headstart.config.render import resolved
from headstart.losses.readings import overlap_and_margin
from headstart.records import Rollout
from headstart.train.metrics import Clock
from headstart.train.parts import Parts
from headstart.train.step import backward, sample_rollouts, train_step
from support import make_config, make_parts

SOFT = "horizon={type: custom, path: 'examples.horizons.loss_side:SoftWeights', arguments: {max_tokens: 6}}"

GREEDY = ("rollout.temperature=0", "probes={every: 2, prompts: 4, max_tokens: 14}")


def with_answers(folder: Path, *overrides: str) -> Parts:
    """A run whose training prompts have answers, read as the whole response."""
    make_config(folder)
    prompts = folder / "prompts.jsonl"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"], "answer": "w1"}) + "\n" for row in rows))
    answers = ("prompts.answer_column=answer", "diagnosis.grader=exact")
    return make_parts(folder / "run", make_config(folder, *answers, *overrides))


def said(parts: Parts, who: str, rollout: Rollout, prefix: int, longest: int = 14) -> tuple[int, ...]:
    """The prefix finished greedily, token by token, with plain forward passes."""
    model = parts.student if who == "student" else parts.teacher.model  # type: ignore[attr-defined]
    view = rollout.prompt.token_ids if who == "student" else rollout.prompt.teacher_token_ids
    ids = list(rollout.completion_ids[:prefix])
    while len(ids) < longest and (not ids or ids[-1] not in parts.vocabulary.stop_ids):
        with model.sampling_mode():
            logits = model.model(torch.tensor([[*view, *ids]])).logits[0, -1, : parts.vocabulary.size]
        ids.append(int(logits.argmax()))
    return tuple(ids)


def test_a_probe_finishes_the_step_s_own_rollouts(tmp_path: Path) -> None:
    """Greedy, so that both models' endings are known from plain forward passes; costs count what was generated."""
    parts = with_answers(tmp_path, *GREEDY)
    rollouts = sample_rollouts(parts, 0, 6)
    assert parts.prober(1, rollouts) is None
    probe = parts.prober(0, rollouts)
    assert probe is not None
    mine = rollouts[:4]
    whole = [said(parts, "student", r, len(r.completion_ids)) for r in mine]
    long = probe.long()
    assert long.lengths_B.tolist() == [len(ids) for ids in whole]
    assert long.stopped_B.tolist() == [ids[-1] in parts.vocabulary.stop_ids for ids in whole]
    assert len(long.position_M) == sum(map(len, whole)) == len(long.divergence_M) == len(long.overlap_M)
    generated = sum(len(ids) - len(r.completion_ids) for ids, r in zip(whole, mine, strict=True))
    assert probe.metrics()["probe_tokens"] == generated > 0
    found = probe.continuations(3)
    after = [said(parts, "teacher", replace(r, completion_ids=ids), 3) for r, ids in zip(mine, whole, strict=True)]
    right = ["".join(parts.decode(ids)).replace("<end>", "").strip() == "w1" for ids in after]
    assert found.after == tuple(right)
    generated += sum(len(ids) - 3 for ids in after)
    probe.continuations(3)  # nothing is asked twice
    assert probe.metrics()["probe_tokens"] == generated


def test_a_probe_counts_in_the_step_s_totals_and_leaves_the_training_alone(tmp_path: Path) -> None:
    probed = with_answers(tmp_path / "a", *GREEDY)
    plain = with_answers(tmp_path / "b", "rollout.temperature=0")
    reports = [train_step(parts, 0, 100)[0].metrics for parts in (probed, plain)]
    assert reports[0]["loss"] == reports[1]["loss"]
    assert reports[0]["generated_tokens"] == 100 + reports[0]["tokens"] + reports[0]["probe_tokens"]
    assert reports[0]["seconds"] > reports[0]["seconds_probe"] > 0
    assert (reports[1]["probe_tokens"], "probe_length_mean" in reports[1]) == (0, False)
    ends = [parts.student.trainable() for parts in (probed, plain)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_label_free_judging_by_the_teacher_s_majority(tmp_path: Path) -> None:
    """A greedy teacher always agrees with itself, so it is right on all problems, and a continued prefix of its own
    leaves it there."""
    parts = make_parts(
        tmp_path / "run", make_config(tmp_path, *GREEDY, "probes.label_free=true", "diagnosis.grader=exact")
    )
    probe = parts.prober(0, sample_rollouts(parts, 0, 6))
    assert probe is not None
    own, again = probe.teacher(2)
    assert own == again == (True,) * 4
    assert len(probe.continuations(2).after) == 4


def test_a_window_s_gradient_against_the_whole(tmp_path: Path) -> None:
    """`gradient` against two backward passes of two fresh runs; the step's own gradient is left as it was."""
    found: list[np.ndarray] = []

    class Asking:
        def tokens(self, step: int) -> int:
            return 6

        def observe(self, seen: object) -> None:
            found.extend(seen.gradient(n).numpy() for n in (2, 6, None))  # type: ignore[attr-defined]

    def gradient(n: int) -> np.ndarray:
        parts = make_parts(tmp_path / f"by hand {n}", config)
        parts.student.model.train()
        rollouts = [
            replace(r, completion_ids=r.completion_ids[:n], stopped=r.stopped and len(r.completion_ids) <= n)
            for r in sample_rollouts(parts, 0, 6)
        ]
        backward(parts, rollouts, 0, Clock(parts.runtime))
        return np.concatenate([p.grad.flatten().double().numpy() for p in parts.student.trainable().values()])  # type: ignore[union-attr]

    config = make_config(tmp_path)
    asking = replace(make_parts(tmp_path / "asking", config), horizon=Asking())  # type: ignore[arg-type]
    plain = make_parts(tmp_path / "plain", config)
    train_step(asking, 0, 0)
    train_step(plain, 0, 0)
    a, b = gradient(2), gradient(6)
    for vector, expected in zip(found, (a, b, b), strict=True):
        assert vector == pytest.approx(expected, abs=1e-7)
    ends = [parts.student.trainable() for parts in (asking, plain)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_factors_multiply_each_token_s_share_of_the_loss(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "run", make_config(tmp_path, SOFT))
    rollouts = sample_rollouts(parts, 0, 6)
    readings = backward(parts, rollouts, 0, Clock(parts.runtime))[0]
    end = 0
    for rollout in rollouts:
        n = len(rollout.completion_ids)
        part = slice(end, end + n)
        size = np.abs(readings.student_logprob[part] - readings.teacher_logprob[part]).astype(np.float64)
        before = (np.cumsum(size) - size) / size.sum()
        assert readings.weight[part] == pytest.approx((1 + 0.5 * (1 - before)) / (n * len(rollouts)), rel=1e-5)
        end += n


def test_the_shuffled_teacher_scores_the_next_rollout(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "run", make_config(tmp_path, "rollout.samples_per_prompt=1"))
    rollouts = [
        replace(r, completion_ids=r.completion_ids[:n], stopped=False)
        for r, n in zip(sample_rollouts(parts, 0, 6)[:3], (3, 1, 2), strict=True)
    ]
    straight = parts.teacher.score(rollouts).logits(slice(0, 6))
    shuffled = ShuffledTeacher(parts.teacher).score(rollouts).logits(slice(0, 6))
    torch.testing.assert_close(shuffled, straight[[3, 3, 3, 4, 0, 1]])


def test_overlap_and_margin_against_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 40, generator=generator)
    found = overlap_and_margin(a, b, k=5)
    for row in range(7):
        s, t = set(a[row].topk(5).indices.tolist()), set(b[row].topk(5).indices.tolist())
        best = sorted((float(b[row, i]) for i in s), reverse=True)
        assert found[row].tolist() == pytest.approx([len(s & t) / 5, best[0] - best[1]])


def test_two_ranks_choose_the_horizons_of_one(tmp_path: Path) -> None:
    horizon = "horizon={type: overlap, tokens: 6, min_tokens: 2, max_tokens: 12, rate: 0.9}"
    config = make_config(tmp_path, horizon, "probes={every: 2, prompts: 3, max_tokens: 14}")
    file = tmp_path / "run.yaml"
    file.write_text(resolved(config))
    lines = []
    for ranks, name in ((1, "one"), (2, "two")):
        done = quick.ranks(ranks, "distill", file, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr[-3000:]
        lines.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    for a, b in zip(*lines, strict=True):
        assert (a["horizon"], a["tokens"], a["probe_tokens"]) == (b["horizon"], b["tokens"], b["probe_tokens"])
    assert len({a["horizon"] for a in lines[0]}) > 1
