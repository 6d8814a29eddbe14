"""Position readings against float64 references, and their bins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headstart.assemble.pair import Pair, open_pair
from headstart.diagnosis.positions import EDGES, TokenReadings, binned, coverage, coverage_interval, read_tokens
from headstart.losses.readings import pair_readings
from headstart.records import Prompt, Rollout
from support import make_config


def test_pair_readings_agree_with_a_float64_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 50, generator=generator) * 3 for _ in range(2))
    found = pair_readings(student, teacher, k=5)
    for m in range(7):
        p, q = (np.exp(x[m].double().numpy()) for x in (student, teacher))
        p, q = p / p.sum(), q / q.sum()
        top_p, top_q = np.argsort(-p)[:5], np.argsort(-q)[:5]
        assert float(found["student_top"][m]) == pytest.approx(p.max(), rel=1e-5)
        assert float(found["teacher_top"][m]) == pytest.approx(q.max(), rel=1e-5)
        assert bool(found["agree"][m]) == (top_p[0] == top_q[0])
        assert float(found["overlap"][m]) == pytest.approx(len({*top_p} & {*top_q}) / 5)
        assert float(found["shared_mass"][m]) == pytest.approx(q[top_p].sum(), rel=1e-5)
        assert found["teacher_ids"][m].tolist() == top_q[:3].tolist()
        assert found["teacher_probs"][m].tolist() == pytest.approx(q[top_q[:3]].tolist(), rel=1e-5)


def test_two_equal_models_agree_everywhere_and_tiny_vocabularies_are_no_trouble() -> None:
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    found = pair_readings(logits, logits)
    assert found["agree"].all()
    assert found["overlap"].tolist() == [1.0] * 4
    assert found["shared_mass"].tolist() == pytest.approx([1.0] * 4)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return open_pair(make_config(tmp_path))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, str(i), (4, 6 + i, 5), (4, 6 + i, 5)) for i in range(count)]


def test_batching_does_not_change_a_reading_and_rows_stay_in_order(pair: Pair) -> None:
    rollouts = pair.sample(prompts(6), who="student", max_tokens=12, purpose="test", samples=2)
    together, alone = read_tokens(pair, rollouts, batch_size=12), read_tokens(pair, rollouts, batch_size=1)
    assert together.row.tolist() == [i for i, r in enumerate(rollouts) for _ in r.completion_ids]
    assert together.position.tolist() == [n for r in rollouts for n in range(len(r.completion_ids))]
    for name in TokenReadings.__slots__:
        assert getattr(together, name) == pytest.approx(getattr(alone, name), abs=2e-5), name
    assert together.of_rows([3, 5]).row.tolist() == [i for i in (3, 5) for _ in rollouts[i].completion_ids]


def test_a_model_beside_itself_diverges_nowhere(pair: Pair) -> None:
    same = pair.with_student(pair.teacher)
    readings = read_tokens(same, same.sample(prompts(3), who="student", max_tokens=8, purpose="test"))
    assert readings.divergence == pytest.approx(np.zeros(len(readings.row)), abs=1e-6)
    assert readings.agree.all()
    assert coverage(readings, 0.5) == 0 or readings.divergence.sum() > 0


def test_the_speaker_samples_from_its_own_view_and_keeps_both(pair: Pair) -> None:
    views = [Prompt(0, "0", (4, 6, 5), (4, 7, 7, 5))]
    told = pair.sample(views, who="teacher", max_tokens=6, purpose="test")
    as_student = pair.with_student(pair.teacher).sample(
        [Prompt(0, "0", (4, 7, 7, 5), (4, 6, 5))], who="student", max_tokens=6, purpose="test"
    )
    assert told[0].prompt == views[0]
    assert told[0].completion_ids == as_student[0].completion_ids


def test_bins_hold_means_over_tokens_and_errors_over_rollouts(pair: Pair) -> None:
    rollouts = [Rollout(prompts(1)[0], s, (7, 8, 9, 10, 11, 1), True) for s in range(3)]
    readings = read_tokens(pair, rollouts)
    first, second = binned(readings, edges=(0, 4, 8))
    assert (first["first"], first["last"], first["tokens"], first["rollouts"]) == (0, 3, 12, 3)
    assert second["tokens"] == 6
    assert first["divergence"]["mean"] == pytest.approx(float(readings.divergence[readings.position < 4].mean()))
    assert first["divergence"]["se"] == pytest.approx(0.0, abs=1e-6)  # three times the same rollout
    assert second["divergence_share"] == pytest.approx(1.0)
    assert sum(first["rank"].values()) == pytest.approx(1.0)
    assert len(EDGES) == len(set(EDGES))


def test_coverage_is_the_first_length_that_holds_the_share(pair: Pair) -> None:
    readings = read_tokens(pair, pair.sample(prompts(4), who="student", max_tokens=10, purpose="test"))
    total = readings.divergence.sum()
    for share in (0.1, 0.5, 0.9):
        N = coverage(readings, share)
        assert readings.divergence[readings.position < N].sum() >= share * total * (1 - 1e-5)
        assert readings.divergence[readings.position < N - 1].sum() < share * total


def test_the_interval_of_the_coverage_is_a_bootstrap_over_rollouts(pair: Pair) -> None:
    readings = read_tokens(pair, pair.sample(prompts(12), who="student", max_tokens=10, purpose="test"))
    draws = np.random.default_rng(0)
    found = []
    for _ in range(400):
        rows = draws.integers(0, 12, 12)
        mass = sum(
            np.bincount(readings.position[of], readings.divergence[of], 10)
            for of in (readings.row == row for row in rows)
        )
        found.append(1 + int(np.argmax(np.cumsum(mass) >= 0.5 * mass.sum())))
    low, high = coverage_interval(readings, 0.5)
    assert low <= coverage(readings, 0.5) <= high
    assert low == pytest.approx(np.percentile(found, 2.5), abs=1)
    assert high == pytest.approx(np.percentile(found, 97.5), abs=1)
    alone = readings.of_rows([0])
    assert coverage_interval(alone, 0.5) == (coverage(alone, 0.5),) * 2, "one rollout has no other to draw"
