"""How a process ends: signals, memory and disks that run out, and what the console can print."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headstart.reports.contents
from headstart.cli.main import main
from headstart.errors import MemoryBudgetError, ModelError, StopRequested, out_of_memory
from headstart.ranks.runtime import Runtime
from headstart.train.signals import ECHO, StopSignals
from run_folders import write_run
from support import beside_progress


def raised(work: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        work()
    return caught.value


def caused(cause: BaseException, *, hidden: bool = False) -> ModelError:
    try:
        try:
            raise cause
        except type(cause):
            if hidden:
                raise ModelError("something else") from None
            raise ModelError("it cannot be loaded")  # noqa: B904
    except ModelError as error:
        return error


LACKS = [
    MemoryError(),
    raised(lambda: np.ones(2**50)),
    raised(lambda: torch.ones(2**50)),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("unable to mmap 12 bytes from file <x>: Cannot allocate memory (12)"),
    RuntimeError("can't start new thread"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    caused(MemoryError()),
]
OTHERS = [
    OSError(errno.ENOENT, "No such file or directory"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("a primitive type is expected"),
    caused(MemoryError(), hidden=True),
]


@pytest.mark.parametrize("error", LACKS, ids=repr)
def test_a_lack_of_memory_is_recognised(error: BaseException) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_no_lack_of_memory(error: BaseException) -> None:
    assert not out_of_memory(error)


ENDS = [
    (MemoryError(), 1, "memory ran out: MemoryError. Free memory, or lower"),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nframe #0"),
        1,
        "9 bytes. Free memory, or lower",
    ),
    (MemoryBudgetError("one rollout does not fit"), 1, "error: one rollout does not fit\n"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "a/b cannot be written: No space left on device"),
    (OSError(errno.EFBIG, "File too large"), 1, "a file cannot be written: File too large"),
    (StopRequested(15), 143, "stopped by SIGTERM"),
    (StopRequested(2), 130, "stopped by SIGINT"),
]


def command(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any]) -> int:
    """`headstart report` with `work` in the place of the report; the exit code."""
    monkeypatch.setattr(headstart.reports.contents, "write_report", work)
    monkeypatch.setattr(sys, "argv", ["headstart", "report", "run"])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(("error", "code", "told"), ENDS, ids=lambda value: repr(value)[:40])
def test_what_ends_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, told: str
) -> None:
    def work(*_: object) -> None:
        raise error

    assert command(monkeypatch, work) == code
    said = beside_progress(capsys.readouterr().err)
    assert told in said
    assert said.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(headstart.reports.contents, "write_report", work)
    monkeypatch.setattr(sys, "argv", ["headstart", "report", "run"])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="a bug"):
        main()
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_any_command_and_only_the_first_rank_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, number: signal.Signals
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert command(monkeypatch, lambda *_: os.kill(os.getpid(), number)) == 128 + number
    assert beside_progress(capsys.readouterr().err).count("\n") == (rank == "0")


def test_of_several_ranks_a_second_signal_at_once_is_the_first_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == signal.SIGTERM
        with StopSignals() as inner:
            assert inner.requested == signal.SIGTERM, "asked before the loop began"
            inner._since -= ECHO
            with pytest.raises(SystemExit, match="143"):
                os.kill(os.getpid(), signal.SIGTERM)
        assert StopSignals.current is signals
    assert StopSignals.current is None


def test_signals_are_ignored_once_the_ranks_have_agreed() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with StopSignals(interruptible=True), StopSignals() as signals:
            signals.ignore()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_work_that_was_stopped_on_one_rank_is_stopped_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.start("cpu")
    assert runtime.gather_unless_stopped(lambda: None) == [None]

    def stopped() -> None:
        raise StopRequested(15)

    with pytest.raises(StopRequested, match="15"):
        runtime.gather_unless_stopped(stopped)
    monkeypatch.setattr("headstart.ranks.runtime._endless", object)
    monkeypatch.setattr("headstart.ranks.runtime._gathered", lambda item, *_: [(item[0], (2,)), item])
    with pytest.raises(StopRequested, match="2"):  # the other one was stopped
        replace(runtime, world_size=2).gather_unless_stopped(lambda: 1)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_console_prints_any_name(tmp_path: Path, encoding: str) -> None:
    run = write_run(tmp_path / os.fsdecode(b"r\xff \xe2\x98\x83 [b]"), [(0, 0.0, 0, 0.5), (5, 1.0, 100, 0.9)])
    done = subprocess.run(
        [sys.executable, "-m", "headstart", "report", os.fsencode(run)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert b"written: " in done.stdout
    assert b"\\udcff" in done.stdout
    assert (run / "report.html").read_text(encoding="utf-8").count(r"\udcff") > 0
