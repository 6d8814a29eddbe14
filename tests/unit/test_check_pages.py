"""scripts/check_pages.py: what it refuses, and what it leaves alone."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/check_pages.py"


@pytest.fixture
def check(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "there.md").write_text("# Two `words`, here\n\ntext\n====\n")

    def run(text):
        (tmp_path / "page.md").write_text(text)
        script = tmp_path / "scripts/check_pages.py"
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n<<<<<<< HEAD\nb\n", "page.md:2: a merge-conflict marker"),
        ("a\nb\n>>>>>>> late\n", "page.md:3: a merge-conflict marker"),
        ("see [it](gone.md)\n", "page.md:1: the link to gone.md leads nowhere"),
        ("![picture](images/gone.png)\n", "leads nowhere"),
        ("[it](there.md#one-word)\n", "there.md has no heading #one-word"),
        ("# A\n[it](#b)\n", "page.md has no heading #b"),
        ("so `headstart distill --resum RUN` it\n", "page.md:1: `headstart distill` has no --resum"),
        ("```sh\nheadstart distil a.yaml\n```\n", "page.md:2: there is no `headstart distil`"),
        ("```\nheadstart evaluate a \\\n  --compares b\n```\n", "page.md:3: `headstart evaluate` has no --compares"),
        ("```sh\ntorchrun --nproc-per-node=4 -m headstart distill --nproc\n```\n", "has no --nproc"),
    ],
)
def test_refused(check, text, said):
    code, output = check(text)
    assert code == 1
    assert said in output


@pytest.mark.parametrize(
    "text",
    [
        "[it](there.md) [and](there.md#two-words-here) [web](https://example.org/x) [mail](mailto:a@b.org)\n",
        "A heading\n=======\n",  # an underline, not the middle of a conflict
        "```\n[not](a-link.md)\n```\nand `[neither](this.md)`\n",
        "# A b\n[it](#a-b)\n",
        "a headstart in --life, `pip install headstart`\n\n```python\nheadstart as --hs\n```\n",
        "`headstart distill --resume RUN training.steps=3 | tail --lines 3` and `headstart --version`\n",
    ],
)
def test_left_alone(check, text):
    assert check(text) == (0, "")
