"""Every fenced command of the README works as printed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quick
from headstart.config.loader import load
from headstart.config.recipes import recipes
from headstart.quickstart import arms

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, as a user would have cloned it, that shares this checkout's environment."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("the README's commands need the .venv that make builds; run the tests with `make test`")
    copy = tmp_path_factory.mktemp("readme") / "headstart"
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", ".*_cache", "__pycache__", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    return copy


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["sh", "-ec", command], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def test_the_readme_is_short_and_has_exactly_two_set_up_commands() -> None:
    assert README.count("\n") <= 150
    assert re.findall(r"^make \w+$", README, flags=re.MULTILINE) == ["make quickstart", "make test"]
    assert {language for language, _ in BLOCKS} == {"sh", "python"}


def test_make_test_is_what_runs_this(checkout: Path) -> None:
    """Run for real it would never end; the plan of `make test` must be the checks and this very suite."""
    plan = run("make --dry-run --always-make test", checkout).stdout
    assert "scripts/check" in plan
    assert ".venv/bin/python -m pytest" in plan
    assert plan.count("pip install") == 2
    assert plan.count("--constraint constraints.txt") == 2


@pytest.mark.slow
def test_make_quickstart(checkout: Path) -> None:
    done = run("make quickstart", checkout)
    (folder,) = (checkout / "runs").glob("quickstart-*")
    for name in ("report.html", "report.md", "report_figures/accuracy.svg"):
        assert (folder / name).stat().st_size > 1000
    assert "student before" in done.stdout
    assert "full rollouts" in done.stdout


@pytest.mark.parametrize("number", [i for i, (_, text) in enumerate(BLOCKS) if not text.startswith("make ")])
def test_fenced_commands(checkout: Path, number: int) -> None:
    language, text = BLOCKS[number]
    if language == "python":
        (checkout / "snippet.py").write_text(text)
        text = ".venv/bin/python snippet.py"
    run(quick.shell() + text, checkout)


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_valid_and_take_local_paths(name: str) -> None:
    one = [] if load(f"recipe:{name}").teachers else ["teacher.path=there"]
    config = load(f"recipe:{name}", ["student.path=here", *one, "prompts.source=file.jsonl"])
    assert (config.student.path, config.prompts.source) == ("here", "file.jsonl")


@pytest.mark.parametrize("name", ["math-lora", "math-full-finetuning", "code", "function-calling"])
def test_full_rollout_twins_differ_in_the_horizon_only(name: str) -> None:
    esr, full = load(f"recipe:{name}"), load(f"recipe:{name}-full")
    assert (esr.horizon.type, full.horizon.type) == ("fixed", "full")
    assert esr.model_dump(exclude={"horizon"}) == full.model_dump(exclude={"horizon"})


@pytest.mark.parametrize("name", ["esr", "full"])
def test_tiny_recipes_are_the_quickstarts_arms(name: str) -> None:
    recipe, config = load(f"recipe:tiny-{name}"), arms("strong", 0)[name]
    for section in ("student", "teacher", "tuning", "prompts", "rollout", "horizon", "divergence", "optimizer",
                    "schedule"):  # fmt: skip
        assert getattr(recipe, section) == getattr(config, section), section
    assert recipe.training.model_copy(update={"device": "cpu"}) == config.training


def test_the_cross_quickstart_changes_the_teacher_only() -> None:
    for name, config in arms("cross", 0).items():
        plain = arms("strong", 0)[name]
        assert config.teacher.path == "tiny:teacher-cross"
        assert config.model_dump(exclude={"teacher"}) == plain.model_dump(exclude={"teacher"})
