"""What is shown of work that takes long: lines in a pipe, a live picture on a terminal."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headstart import progress
from headstart.cli.main import app
from headstart.interfaces import OnProgress, silent
from headstart.progress import Doing, doing, printing, report, shown, shows, through
from headstart.study.run import _last_line


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOOK", 0.02)
    monkeypatch.setattr(progress, "BEAT", 0.1)


@contextmanager
def piped() -> Iterator[io.StringIO]:
    out = io.StringIO()
    yield out
    assert progress._stack == []
    assert progress._screen is None
    assert "\x1b" not in out.getvalue()


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert happened()


def terminal(**more: Any) -> tuple[io.StringIO, Console]:
    out = io.StringIO()
    kind = {"force_terminal": True, "force_interactive": True, "width": 100, "_environ": {"TERM": "xterm"}}
    return out, Console(file=out, **(kind | more))


def test_first_line_at_once_and_a_heartbeat_while_nothing_is_said() -> None:
    with piped() as out:
        with shown("preflight", Console(file=out)) as told:
            assert out.getvalue() == "[0:00] preflight\n"
            told(5, 14, "engine log-probs")
            wait_for(lambda: out.getvalue().count("\n") >= 4)
        lines = [line.partition("] ")[2] for line in out.getvalue().splitlines()]
        assert lines[1:4] == ["preflight: engine log-probs (5 of 14)"] * 3
        before = out.getvalue()
        time.sleep(0.2)
        assert out.getvalue() == before, "no heartbeat afterwards"


def test_lines_come_for_what_is_done_and_not_for_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BEAT", 60.0)
    with piped() as out, shown("distill", Console(file=out)):
        for text in ("loading the weights of a", "loading the weights of b"):
            with doing(text):
                wait_for(lambda: text in out.getvalue())  # noqa: B023
        with shown("training") as told:
            for step in range(20):
                told(step, 20, f"loss {1 / (step + 1):.4f}")
                with doing(f"step {step}"), doing("rollout"):
                    time.sleep(0.01)
            wait_for(lambda: "training" in out.getvalue())
        time.sleep(0.1)
    lines = [line.partition("] ")[2] for line in out.getvalue().splitlines()]
    assert lines[:3] == ["distill", "distill, loading the weights of a", "distill, loading the weights of b"]
    assert len(lines) == 4, lines
    assert re.match(r"distill, training: loss \d\.\d+ \(\d+ of 20", lines[3])


def test_a_line_printed_by_others_is_a_sign_of_life_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BEAT", 0.8)
    with piped() as out, shown("distill", Console(file=out)):
        for _ in range(12):
            printing(Console(file=io.StringIO())).print("step")
            time.sleep(0.1)
    assert out.getvalue() == "[0:00] distill\n"


def test_what_has_no_time_to_say_how_far_it_is_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    rows = Doing("sampling tokens", lambda: (50, 200), began=(100.0, 0))
    now[0] += 20
    assert rows.numbers() == ["50 of 200", "about 1:00 left"]
    outer = Doing("evaluation", began=(100.0, 0))
    outer(1, 64)
    assert outer.numbers(rows) == ["1 of 64"], "that sixty-three others would take as long is not true"
    own = Doing("evaluate")
    own(500, 2000)  # resumed: what was done before says nothing of the time
    assert own.numbers() == ["500 of 2,000"]
    now[0] += 10
    own(600, 2000)
    assert own.numbers() == ["600 of 2,000", "about 2:20 left"]
    now[0] += 5
    assert own.numbers() == ["600 of 2,000", "about 3:28 left"], "it has become slower"
    own = Doing("training")
    own(0, 3)
    now[0] += 60
    own(1, 3, "loss 0.5")
    now[0] += 45
    assert own.numbers()[1] == "about 1:15 left", "a step that is under way has been paid in part"
    now[0] += 45
    assert own.numbers()[1] == "about 1:15 left", "one that takes longer counts, as if it ended now"
    between = Doing("evaluation at step 1", told=True)
    assert own.numbers(between)[1] == "about 2:00 left", "an evaluation says nothing of how long a step takes"
    own.even = False
    assert own.numbers() == ["1 of 3"]


def test_a_terminal_gets_a_moving_picture_that_leaves_nothing_behind() -> None:
    out, console = terminal()
    with shown("distill", console) as told:
        told(3, 200, "loss 0.4123")
        with doing("step 4"), doing("sampling tokens", lambda: (512, 6400)):
            wait_for(lambda: len(set(re.findall("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", out.getvalue()))) > 1)  # the spinner moves
            console.print("a line above it")
    text = out.getvalue()
    for part in ("distill: loss 0.4123", "3 of 200", "step 4: sampling tokens", "512 of 6,400", "a line above it"):
        assert part in text
    assert "\x1b[?25l" in text
    assert text.rstrip("\n").endswith("\x1b[2K")
    assert text.rindex("\x1b[?25h") > text.rindex("distill"), "the cursor is back"


def test_long_names_give_way_to_numbers() -> None:
    out, console = terminal(width=70)
    with shown("loading the weights of /a/very/long/path/to/some/model/of/mine", console) as told:
        told(3, 200)
        time.sleep(0.3)
    assert "…" in out.getvalue()
    assert "3 of 200" in out.getvalue()


def test_a_part_of_what_is_shown_is_not_shown_twice() -> None:
    before = threading.active_count()
    with piped() as out, shown("pilot", Console(file=out)), shown("training", terminal()[1]) as told:
        told(1, 4)
        wait_for(lambda: "training (1 of 4" in out.getvalue())
        assert threading.active_count() <= before + 1
    assert "pilot, training (1 of 4" in out.getvalue()


def test_a_part_that_redirects_its_output_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, console = terminal()
    with shown("pilot", console):
        assert printing() is console
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        assert printing() is not console
    assert printing() is not console


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with shown("distill") as told:
        told(1, 2)
        report(1, 2)
    assert capsys.readouterr().err == ""


def test_verbs_from_python_are_shown_unless_they_are_given_a_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BEAT", 60.0)

    @shows("measure")
    def verb(amount: int, *, progress: OnProgress | None = None) -> int:
        (progress or report)(amount, 4)
        return amount

    heard: list[tuple[Any, ...]] = []
    assert verb(1) == 1
    assert capsys.readouterr().err == "[0:00] measure\n"
    assert verb(2, progress=silent) == verb(2, progress=lambda *told: heard.append(told)) == 2
    assert heard == [(2, 4)]
    assert capsys.readouterr().err == ""
    report(1, 2)  # nothing is shown


def test_a_pipe_that_closes_ends_nothing() -> None:
    class Closed(io.StringIO):
        tried = 0

        def write(self, text: str) -> int:
            self.tried += 1
            raise BrokenPipeError

    pipe = Closed()
    with shown("distill", Console(file=pipe)), doing("reading"):
        wait_for(lambda: pipe.tried > 2)  # whoever listens again would hear


def test_a_fork_has_no_heartbeat_and_ends() -> None:
    with piped() as out, shown("distill", Console(file=out)):
        child = os.fork()
        if child == 0:
            alive = threading.active_count()
            with shown("a child"):
                time.sleep(0.15)
            os._exit(alive + 10 * out.getvalue().count("a child"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize("where", [lambda: terminal()[1], lambda: Console(file=io.StringIO())])
def test_an_error_comes_through_and_leaves_nothing_running(where: Callable[[], Console]) -> None:
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt), shown("distill", where()), doing("reading"):
        raise KeyboardInterrupt
    wait_for(lambda: threading.active_count() == threads)
    assert progress._stack == []
    assert progress._screen is None


PAIR = ("student.path=a", "teacher.path=b", "prompts.source=tiny")
VERBS = [
    ("headstart.quickstart", ["quickstart", "--out", "nowhere"]),
    ("headstart.checks.run", ["preflight", *PAIR]),
    ("headstart.diagnosis.run", ["diagnose", *PAIR]),
    ("headstart.distillation.run", ["distill", *PAIR]),
    ("headstart.evaluation.run", ["evaluate", "a", "--task", "tiny"]),
    ("headstart.explanation.run", ["explain", "nowhere"]),
    ("headstart.study.run", ["compare", str(Path(__file__).parents[2] / "studies" / "horizon.yaml")]),
]


@pytest.mark.parametrize(("module", "words"), VERBS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_every_verb_says_a_word_before_it_imports_torch(
    module: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == module:
                raise ImportError(capsys.readouterr().err)

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Slow, *sys.meta_path])
    with pytest.raises(ImportError, match=r"^\[0:00\] loading torch and transformers\n$"):
        app(words, standalone_mode=False)


def test_what_comes_before_the_first_token_says_nothing_of_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts take 100 s to encode, then a token comes every second: 30 of 90 tokens are 60 s from the end."""
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    tokens = 0
    sampling = Doing("sampling tokens", lambda: (tokens, 90))
    clock = 100.0
    assert sampling.numbers() == ["0 of 90"]
    clock, tokens = 130.0, 30
    assert sampling.numbers() == ["30 of 90", "about 1:00 left"]


def test_what_is_worked_through_is_counted() -> None:
    with piped() as out, shown("evaluate", Console(file=out)):
        for place, item in enumerate(through("abcd", "encoding 64 prompts")):
            assert item == "abcd"[place]
            if item == "c":
                wait_for(lambda: "evaluate, encoding 64 prompts (2 of 4" in out.getvalue())


def test_a_study_shows_what_its_run_last_said(tmp_path: Path) -> None:
    log = tmp_path / "seed-0.log"
    assert _last_line(log) == ""
    log.write_text("x" * 5000 + "\nstep 3/60  loss 0.2823\n")
    assert _last_line(log) == "step 3/60  loss 0.2823"
    log.write_text(log.read_text() + "[8:22] distill, training (3 of 60), step 4\n\n")
    assert _last_line(log) == "distill, training (3 of 60), step 4"
