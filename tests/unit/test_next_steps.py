"""The last lines of a verb are commands that exist, about the folder or the file that it was given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from headstart.cli import next_steps, verbs
from headstart.cli.main import app
from headstart.config.render import resolved
from support import make_config


def commands(text: str) -> list[list[str]]:
    """The `headstart ...` commands in what was printed, as a shell reads them."""
    found = re.findall(r"headstart (.+?)(?:, then|  \(|$)", text, re.MULTILINE)
    return [shlex.split(command) for command in found]


def test_every_command_that_is_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("my runs/it's")
    for verb in next_steps.NEXT:
        next_steps.say_next(verb, folder, horizon="horizon.tokens=9")
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = commands(capsys.readouterr().out)
    assert {command[0] for command in found} <= {*known, "init"}
    assert len(found) >= len(next_steps.NEXT)
    assert {word for command in found for word in command if "my" in word} == {str(folder)}


def test_distill_and_report_end_with_what_to_do_next(tmp_path: Path) -> None:
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(resolved(make_config(tmp_path, "training.steps=1")))
    done = CliRunner().invoke(app, ["distill", str(file), "--out", str(run)])
    assert done.exit_code == 0, done.exception
    assert commands(done.stdout)[-3:] == [["chat", str(run)], ["explain", str(run)], ["report", str(run)]]
    page = CliRunner().invoke(app, ["report", str(run)])
    assert commands(page.stdout) == [["explain", str(run)]]
    (run / "explain").mkdir()
    assert commands(CliRunner().invoke(app, ["report", str(run)]).stdout) == []


@pytest.mark.parametrize(("kind", "horizon"), [("fixed", []), ("full", ["horizon.type=fixed"])])
def test_a_diagnosis_ends_with_its_horizon_where_it_supports_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, horizon: list[str]
) -> None:
    from headstart.diagnosis import run as diagnosis

    window: Any = SimpleNamespace(tokens=37)

    def measured(*_: object, **__: object) -> Any:
        empty = SimpleNamespace(to_json=dict)
        return SimpleNamespace(decay=empty, positions={}, recommendation=SimpleNamespace(window=window, to_json=dict))

    monkeypatch.setattr(diagnosis, "diagnose", measured)
    monkeypatch.setattr(verbs, "show", lambda blocks: None)
    monkeypatch.setattr("headstart.reports.readings.reading_blocks", lambda name, readings: [])
    file = tmp_path / "run.yaml"
    file.write_text(resolved(make_config(tmp_path, f"horizon.type={kind}")))
    arguments = ["diagnose", str(file), "training.seed=3", "--out", str(tmp_path / "d")]
    expected = ["distill", str(file), "training.seed=3", *horizon, "horizon.tokens=37"]
    assert commands(CliRunner().invoke(app, arguments).stdout) == [expected]
    window = None
    assert commands(CliRunner().invoke(app, arguments).stdout) == []
