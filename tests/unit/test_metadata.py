"""What the package says about itself: one version everywhere, and Python versions that can read its source."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from headstart.version import __version__

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLAIMED = [found[1] for line in PROJECT["classifiers"] if (found := re.search(r"Python :: (3\.\d+)$", line))]
COMPILE = (
    "import pathlib, sys; [compile(p.read_text('utf-8'), p, 'exec') for p in pathlib.Path(sys.argv[1]).rglob('*.py')]"
)


def test_one_version_and_one_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == citation["version"] == __version__
    assert [author["name"] for author in citation["authors"]] == [a["name"] for a in PROJECT["authors"]]
    assert citation["references"][0]["url"] == PROJECT["urls"]["Paper"]


def test_the_oldest_claimed_version_is_the_least_that_is_required() -> None:
    assert PROJECT["requires-python"] == f">={CLAIMED[0]}"


@pytest.mark.parametrize("version", CLAIMED)
def test_claimed_versions_compile_the_source_without_a_warning(version: str) -> None:
    """Whether it also runs there is what `make test-python PYTHON=python3.x` says."""
    homes = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")]
    works = [home for home in homes if home and not subprocess.run([home, "-V"], capture_output=True).returncode]
    if not works:
        pytest.skip(f"there is no python{version} on this machine")
    command = [works[0], "-I", "-W", "error", "-c", COMPILE, str(ROOT / "src")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
