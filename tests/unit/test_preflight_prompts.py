"""Prompts, and whether a step fits into the device."""

from pathlib import Path

import pytest

from headstart.assemble.cost import Cost, Seconds
from headstart.assemble.memory import Memory
from headstart.checks.budget import memory_finding, time_finding
from headstart.checks.prompts import duplicates, evaluation_overlap, overlong
from headstart.config.schema import Config
from headstart.models.memory import GIB
from headstart.tasks.overlap import Overlap
from preflight_pairs import prompt
from support import make_config


@pytest.mark.parametrize(("repeats", "severity"), [(0, "ok"), (1, "note"), (2, "warning")])
def test_duplicates(repeats: int, severity: str) -> None:
    prompts = [prompt(5, max(repeats, i), index=i) for i in range(40)]
    finding = duplicates(prompts)
    assert (finding.severity, finding.figures["duplicates"]) == (severity, repeats)


@pytest.mark.parametrize(("dropped", "severity"), [(0, "ok"), (1, "note"), (2, "warning")])
def test_overlong(dropped: int, severity: str) -> None:
    finding = overlong([prompt(5, 6, index=i) for i in range(38)], dropped, 64)
    assert (finding.severity, finding.figures["dropped"]) == (severity, dropped)
    assert finding.figures["longest"] == 2


@pytest.mark.parametrize(("exact", "near", "severity"), [((), (), "ok"), ((), (3,), "note"), ((1,), (3,), "warning")])
def test_overlap(exact: tuple[int, ...], near: tuple[int, ...], severity: str) -> None:
    finding = evaluation_overlap(Overlap(100, 50, exact, near), "math500")
    assert finding.severity == severity
    assert (finding.figures["exact"], finding.figures["near"]) == (len(exact), len(near))
    assert (finding.remedy is not None) == bool(exact)


PHASES = {"rollout": 2.0, "teacher": 3.0, "student": 9.0, "optimizer": 4.0}


@pytest.mark.parametrize(
    ("free", "severity"), [(13.0, "ok"), (12.3, "ok"), (12.1, "warning"), (11.1, "warning"), (10.9, "blocking")]
)
def test_memory_against_what_is_free(free: float, severity: str) -> None:
    """2 GiB of states and 9 of the student: 11 are needed; the weights are loaded already."""
    finding = memory_finding(Memory(weights=7.0, states=2.0, **PHASES), int(free * GIB), 100, "cuda")
    assert finding.severity == severity
    assert finding.figures["needed_gib"] == 11.0
    assert finding.figures["free_gib"] == pytest.approx(free)
    assert (finding.remedy is None) == (severity == "ok")


@pytest.mark.parametrize(
    ("phase", "remedy"), [("rollout", "rollout.batch_size"), ("student", "checkpointing"), ("optimizer", "lora")]
)
def test_the_remedy_fits_the_phase_that_needs_most(phase: str, remedy: str) -> None:
    finding = memory_finding(Memory(weights=1.0, states=1.0, **PHASES | {phase: 20.0}), GIB, 100, "cpu")
    assert remedy in (finding.remedy or "")
    assert f"most in the {phase} phase" in finding.message


def test_time_is_told_by_phase_and_for_the_run(tmp_path: Path) -> None:
    config: Config = make_config(tmp_path, "training.steps=200")
    nothing = Memory(weights=0.0, states=0.0, **PHASES)
    finding = time_finding(Cost(100, Seconds(3.0, 1.0, 1.5, 0.5), nothing), config)
    assert (finding.figures["total"], finding.figures["run"]) == (6.0, 1200.0)
    assert "20 min" in finding.message
    assert time_finding(Cost(100, None, nothing), config).severity == "note"
