"""The cluster recipes: their syntax, and that every flag and setting in them exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from headstart.cli.main import app
from headstart.config.loader import load

CLUSTER = Path(__file__).parents[2] / "recipes/cluster"
SCRIPT = (CLUSTER / "train.sbatch").read_text()
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))
TRAINING: str = next(o for o in OBJECTS if o["kind"] == "Job")["spec"]["template"]["spec"]["containers"][0]["args"][0]


@pytest.mark.parametrize("script", [SCRIPT, TRAINING, (CLUSTER.parents[1] / "tests/nodes/two_nodes.sh").read_text()])
def test_scripts_are_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_objects_name_each_other() -> None:
    kinds = {(o["kind"], o["metadata"]["name"]): o for o in OBJECTS}
    job = kinds["Job", "headstart"]["spec"]
    assert job["completions"] == job["parallelism"] == int(re.findall(r"--nnodes (\d+)", TRAINING)[0])
    labels = job["template"]["metadata"]["labels"].items()
    assert kinds["Service", "headstart"]["spec"]["selector"].items() <= labels
    assert job["template"]["spec"]["subdomain"] == "headstart"
    assert "//headstart-teacher:8000" in TRAINING
    for o in OBJECTS:
        for container in o["spec"].get("template", {}).get("spec", {}).get("containers", []):
            volumes = {v["name"] for v in o["spec"]["template"]["spec"]["volumes"]}
            assert {m["name"] for m in container["volumeMounts"]} <= volumes


def launched(text: str) -> tuple[str, str]:
    """The arguments of torchrun, and those of `headstart distill`."""
    joined = text.replace("\\\n", " ")
    return re.findall(r"torch\.distributed\.run (.*?)-m headstart distill(.*)", joined)[0]


@pytest.mark.parametrize("text", [SCRIPT, TRAINING], ids=["slurm", "kubernetes"])
def test_flags_exist(text: str) -> None:
    torchrun, _ = launched(text)
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert set(re.findall(r"--[a-z-]+", torchrun)) <= known
    assert "--rdzv-endpoint" in torchrun
    arguments = " ".join(re.findall(r"arguments=\((.*?)\)\n", text, flags=re.S))
    distill: Any = typer.main.get_command(app).commands["distill"]  # type: ignore[attr-defined]
    options = {option for parameter in distill.params for option in parameter.opts}
    assert set(re.findall(r"(?<!\w)--[a-z-]+", arguments)) <= options
    assert {"--resume", "--out"} <= set(re.findall(r"--[a-z-]+", arguments))


@pytest.mark.parametrize("text", [SCRIPT, TRAINING], ids=["slurm", "kubernetes"])
def test_settings_exist(text: str) -> None:
    """Shell variables become words; what is left is what `headstart distill` would read."""
    found = re.findall(r'(?:^|[\s"])([a-z_]+(?:\.[a-z_]+)*=(?:\{.*?\}|[^\s")]+))', "".join(
        re.findall(r"arguments=\((.*?)\)\n", text, flags=re.S)))  # fmt: skip
    overrides = [re.sub(r"\$(\w+)", r"\1", setting) for setting in found]
    assert [o.partition("=")[0] for o in overrides] == ["sharding.type", "divergence.support.type", "teacher"]
    config = load("recipe:math-32b", overrides)
    assert config.sharding.type == "fsdp"
    assert config.teacher.type == "server"
