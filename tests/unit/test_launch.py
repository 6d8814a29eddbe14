"""What the launcher says of a process: refused where ranks would not know of each other."""

from __future__ import annotations

import sys

import pytest

from headstart.errors import ConfigError
from headstart.ranks.launch import Launch, disagreements, read_launch, versions

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["headstart", "distill", "run.yaml"])


def test_what_torchrun_says() -> None:
    assert read_launch(TORCHRUN) == Launch(3, 4, 1)
    assert read_launch(TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}) == Launch()
    assert read_launch({}) == Launch(0, 1, 0)
    by_hand = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}
    assert read_launch(by_hand) == Launch(3, 4, None)


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_launch_that_is_not_whole_is_refused(name: str) -> None:
    rest = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is 4, but {name} are not set; start the ranks with torchrun"):
        read_launch(rest)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 'four', not a whole number"):
        read_launch(TORCHRUN | {"WORLD_SIZE": "four"})
    with pytest.raises(ConfigError, match=r"RANK is 4, which is not from 0 to 3"):
        read_launch(TORCHRUN | {"RANK": "4"})


@pytest.mark.parametrize(
    "found",
    [
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "5"},
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "1", "SLURM_PROCID": "5"},
        {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"},
        {"MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_RANK": "5"},
        {"PMI_SIZE": "8", "PMI_RANK": "5"},
    ],
    ids=lambda found: next(iter(found)),
)
def test_ranks_that_do_not_know_of_each_other_are_refused_with_the_line_to_use(found: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as refused:
        read_launch(found)
    message = str(refused.value)
    assert message.startswith(f"{next(iter(found))} says that 8 processes were started together")
    assert "torchrun --nproc-per-node=8 -m headstart distill run.yaml\n" in message
    assert message.endswith("Or set WORLD_SIZE=1 where this process is alone, or each of them is a run of its own")
    assert read_launch(found | {"WORLD_SIZE": "1"}) == Launch()
    assert read_launch(found | TORCHRUN) == Launch(3, 4, 1)


def test_srun_over_several_machines_becomes_one_torchrun_on_each() -> None:
    with pytest.raises(ConfigError) as refused:
        read_launch({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NNODES": "2"})
    assert (
        '  srun --ntasks-per-node=1 --ntasks=2 torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" '
        '--rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" '
        "--nproc-per-node=4 -m headstart distill run.yaml\n"
    ) in str(refused.value)


@pytest.mark.parametrize(
    "found",
    [
        {"SLURM_NTASKS": "8"},  # the shell of salloc: no task of srun
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_one_process_alone_is_no_launch(found: dict[str, str]) -> None:
    assert read_launch(found) == Launch()


def test_disagreements_name_what_differs_and_where() -> None:
    everyone = [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1, "b": "x", "c": None}]
    assert disagreements(everyone) == [
        "b is x on ranks 0, 2 and y on rank 1",
        "c is missing on ranks 0, 1 and None on rank 2",
    ]
    assert disagreements([{"a": rank > 0} for rank in range(20)]) == [
        "a is False on rank 0 and True on ranks 1, 2, 3, 4, 5, 6, 7, 8 and others"
    ]
    assert disagreements(everyone[:1] * 4) == []


def test_versions_are_those_of_the_packages_that_decide_results() -> None:
    import torch

    found, running = str(versions()["torch"]), torch.__version__  # of which only one may name the build
    assert found.split("+")[0] == running.split("+")[0]
    assert {"headstart", "transformers", "peft", "tokenizers"} < versions().keys()
