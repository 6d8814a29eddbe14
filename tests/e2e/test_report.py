"""`headstart report` on folders that the real commands made: every section is there, without torch, and a browser shows
it without a complaint."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headstart.config.loader import load
from headstart.diagnosis.run import diagnose
from headstart.distillation.run import distill
from headstart.explanation.run import explain
from headstart.reports.contents import write_report
from headstart.reports.readings import BUILDERS
from headstart.reports.run import read_run

SMALL = ["training.steps=2", "evaluation.limit=6", "evaluation.samples=2", "evaluation.every=1", "diagnosis.problems=6"]
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Early stopping, full rollouts, a diagnosis; everything a user can have but a pilot."""
    base = tmp_path_factory.mktemp("report")
    esr, full, diagnosis = base / "esr", base / "full", base / "diagnosis"
    distill(load("recipe:tiny-esr", SMALL), out=esr)
    distill(load("recipe:tiny-full", SMALL), out=full)
    diagnose(load("recipe:tiny-esr", SMALL), out=diagnosis)
    explain(esr, twin=full)
    return esr, full, diagnosis


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process that fails when torch was imported."""
    code = "import sys; from headstart.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    words = [sys.executable, "-c", code, "report", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_every_real_file_has_its_section_and_torch_is_not_imported(folders: tuple[Path, Path, Path]) -> None:
    out = folders[0].parent / "pages" / "all.html"
    done = command(*folders, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"written: {out}" in done.stdout
    assert "student before" in done.stdout
    text = out.read_text(encoding="utf-8")
    assert "cannot be" not in text
    names = {name for folder in folders for name in read_run(folder).readings}
    assert names == set(BUILDERS) - {"diagnose/pilot", "diagnose/plan"}
    for name in names:
        assert f"<h2>{BUILDERS[name][0]} (" in text.replace("&#39;", "'")
    assert text.count("<img ") == text.count(' alt="') == 8


def test_one_folder_and_a_wrong_one(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    done = command(folders[0])
    assert done.returncode == 0, done.stderr
    assert (folders[0] / "report.html").exists()
    assert (folders[0] / "report.md").exists()
    wrong = command(tmp_path)
    assert wrong.returncode == 1
    assert "is not a run folder (it has no config.yaml)" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def browse(page: Path, *options: str) -> tuple[str, list[str]]:
    """The page's DOM after loading, and what the browser's console said."""
    assert BROWSER is not None
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}"]
    words += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_console_errors(
    folders: tuple[Path, Path, Path], tmp_path: Path, scheme: str
) -> None:
    page = tmp_path / "page.html"
    write_report(folders, page)
    dom, console = browse(page, f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}")
    assert console == []
    assert dom.count("<h2>") == page.read_text(encoding="utf-8").count("<h2>") > 12
    assert dom.rstrip().endswith("</html>")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_the_console_is_heard_and_the_page_lets_nothing_in(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The control of the test above: a script and an outside image in the page are refused, and that is said."""
    page = tmp_path / "page.html"
    write_report(folders[:1], page)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</main>", "<script>1</script><img src='http://localhost/x.png' alt=''></main>"))
    _, console = browse(page)
    assert len(console) == 2
    assert all("Content Security Policy" in line for line in console)
