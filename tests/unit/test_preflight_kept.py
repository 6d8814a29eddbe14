"""A preflight that ends before its end: what it had is shown and written, and what it had not is named."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from headstart.checks import run as building
from headstart.checks.findings import Finding, Preflight
from headstart.checks.run import run_preflight
from headstart.cli.main import main
from headstart.config.render import resolved
from headstart.reports.page import Text
from headstart.reports.readings import reading_blocks
from support import make_config

SAMPLED = ["alignment", "chat template", "self-test", "teacher determinism", "engine log-probs", "gradients", "time"]


def ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str
) -> tuple[int, str, dict[str, Any]]:
    recipe = folder / "run.yaml"
    recipe.write_text(resolved(make_config(folder)))
    command = ["headstart", "preflight", str(recipe), "--out", str(folder / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    written = json.loads((folder / "out" / "diagnose" / "preflight.json").read_text())
    assert isinstance(stop.value.code, int)
    captured = capsys.readouterr()
    return stop.value.code, captured.out + captured.err, written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_preflight_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    monkeypatch.setattr(building, "determinism", lambda *_: signal.raise_signal(number))
    code, text, written = ended(monkeypatch, capsys, tmp_path)
    assert code == 128 + number
    assert f"stopped by {number.name}" in text
    assert [f["check"] for f in written["findings"]][-2:] == ["chat template", "self-test"]
    assert written["not_made"] == ["teacher determinism", "engine log-probs", "gradients", "memory", "time"]
    assert "Not made: teacher determinism, engine log-probs, gradients, memory, time." in text
    assert "self-test" in text
    assert "Traceback" not in text


def test_a_check_that_fails_by_a_fault_of_its_own_does_not_take_the_others_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(building, "self_test", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ended(monkeypatch, capsys, tmp_path)
    written = json.loads((tmp_path / "out" / "diagnose" / "preflight.json").read_text())
    assert written["findings"][-1]["check"] == "chat template"
    assert written["not_made"][0] == "self-test"
    assert "chat template" in capsys.readouterr().out


def test_quick_samples_and_differentiates_nothing_and_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("headstart.assemble.pair.Pair.sample", lambda *_, **__: pytest.fail("sampled"))
    code, text, written = ended(monkeypatch, capsys, tmp_path, "--quick")
    assert code == 0
    assert written["not_made"] == SAMPLED
    assert {"trainable weights", "stop tokens", "memory"} <= {f["check"] for f in written["findings"]}
    assert f"Not made: {', '.join(SAMPLED)}." in text


def test_a_whole_preflight_leaves_nothing_out(tmp_path: Path) -> None:
    """And samples no more than its budget, of which the horizon needs less."""
    kept: list[Preflight] = []
    result = run_preflight(make_config(tmp_path), kept=kept.append)
    assert result.not_made == ()
    assert kept[0].not_made == building.UNLOADED
    assert kept[1].not_made[0] == "vocabulary"
    assert len(kept) == len(kept[1].not_made) + 1
    (stops,) = [f for f in result.findings if f.check == "stop tokens"]
    assert stops.figures["student_responses"] == 8
    assert "teacher_responses" not in stops.figures, "both stop at the same id"
    (agreement,) = [f for f in result.findings if f.check == "engine log-probs"]
    assert agreement.figures["tokens"] <= 4 * 6


def test_the_report_says_what_was_left_out() -> None:
    record = Preflight((Finding("a", "ok", "text"),), ("time",)).to_json()
    assert Text("Not made: time.", "soft") in reading_blocks("diagnose/preflight", {"diagnose/preflight": record})
    del record["not_made"]  # as older versions wrote it
    assert not [b for b in reading_blocks("diagnose/preflight", {"diagnose/preflight": record}) if isinstance(b, Text)]
