"""How many ranks a model is divided over, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headstart.checks.run import run_preflight, unwise
from headstart.config.schema import FsdpSharding, NoSharding
from headstart.diagnosis.run import diagnose
from headstart.distillation.run import distill
from headstart.errors import ConfigError
from headstart.evaluation.run import evaluate
from headstart.models.causal import layers_of
from headstart.models.sharded import mesh_of, shape
from headstart.ranks.runtime import Runtime
from headstart.testing import ARCHITECTURES, random_model
from support import make_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "replicate", "world", "found"),
    [
        (None, None, 8, (8, 1)),
        (4, None, 8, (4, 2)),
        (None, 2, 8, (4, 2)),
        (4, 2, 8, (4, 2)),
        (1, None, 8, None),  # copies alone: every rank has whole models
        (None, 8, 8, None),
    ],
)
def test_what_is_left_at_null_is_what_the_ranks_give(
    size: int | None, replicate: int | None, world: int, found: tuple[int, int] | None
) -> None:
    assert shape(FsdpSharding(size=size, replicate=replicate), world) == found
    assert shape(NoSharding(), world) is None


@pytest.mark.parametrize(
    ("size", "replicate", "world", "ranks"), [(3, None, 8, 6), (None, 3, 8, 6), (4, 4, 8, 16), (8, None, 1, 8)]
)
def test_what_does_not_divide_the_ranks_is_refused(
    size: int | None, replicate: int | None, world: int, ranks: int
) -> None:
    with pytest.raises(ConfigError, match=rf"needs {ranks} ranks \(.*but there are {world}; start as many"):
        shape(FsdpSharding(size=size, replicate=replicate), world)


def test_one_process_divides_nothing_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="divides nothing over one process; start several with torchrun"):
        assert mesh_of(FsdpSharding(), Runtime(0, 1, CPU)) is None
    config = make_config(tmp_path, "sharding.type=fsdp", "training.steps=1")
    with pytest.warns(UserWarning, match="divides nothing"):
        assert distill(config, out=tmp_path / "run").progress.step == 1


def test_a_wrong_size_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    wrong = make_config(tmp_path, "sharding={type: fsdp, size: 2}", "prompts.source=nowhere.jsonl")
    with pytest.raises(ConfigError, match="needs 2 ranks"):
        distill(wrong, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_verbs_of_one_process_refuse_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, "evaluation={task: {type: tiny}}")
    monkeypatch.setattr(Runtime, "start", lambda device="auto": Runtime(0, 2, CPU))
    for verb in (diagnose, evaluate):
        with pytest.raises(ConfigError, match=r"runs in one process \(found 2 ranks\); leave out torchrun, or divide"):
            verb(config, out=tmp_path / "out")
    (finding,) = run_preflight(config).findings
    assert (finding.severity, "in one process" in finding.message) == ("blocking", True)


def test_divided_weights_of_half_precision_are_no_warning(tmp_path: Path) -> None:
    half = make_config(tmp_path, "student.dtype=bfloat16")
    divided = make_config(tmp_path, "student.dtype=bfloat16", "sharding.type=fsdp")
    assert [f.severity for f in unwise(half, Runtime(0, 2, CPU))] == ["warning"]
    assert unwise(divided, Runtime(0, 2, CPU)) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_are_found_in_every_architecture(architecture: str) -> None:
    model = random_model(architecture, 46)  # type: ignore[arg-type]
    assert layers_of(model, model.model) == [*model.model.layers]
