"""Run a program against tests in a sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from headstart.errors import SandboxError
from headstart.tasks.grading import sandbox
from headstart.tasks.grading.inside.values import frame

TIMEOUT = 10.0
"""CPU seconds of one program: one reference solution of MBPP (task 123) needs more than 5."""
ORDER: tuple[sandbox.Mode, ...] = ("bwrap", "unshare")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one program.

    `status`: `passed`; `failed` (a test failed, or the program raised, crashed, left early or hit a limit); `timeout`;
    `error` (the sandbox or the tests broke: not the program's fault). `seconds` is wall-clock time, start included.
    """

    status: Literal["passed", "failed", "timeout", "error"]
    detail: str
    seconds: float


class CodeRunner:
    """Runs untrusted Python programs, each in a separate sandbox; may be called from several threads at once.

    `mode` "auto" takes the first of bubblewrap and unshare that works here; `self.mode` says which it was. Raises
    SandboxError when none does, or when the mode asked for does not work. "unsafe" is taken only when asked for.

    The tests run in a process that the program cannot reach and see only plain values (see `inside`). What a program
    can still do: answer from memory (the tests of public benchmarks are public), use its CPU time and memory to the
    limit, and, in any sandbox that shares a kernel, exploit a hole of that kernel. In `unsafe` it can do what the user
    can do with files (see `sandbox`): nothing that matters may be within the user's reach.
    """

    def __init__(self, mode: Literal["auto", "bwrap", "unshare", "unsafe"] = "auto") -> None:
        candidates = ORDER if mode == "auto" else (mode,)
        reasons = {}
        for candidate in candidates:
            reasons[candidate] = _reason_against(candidate)
            if reasons[candidate] is None:
                self.mode: sandbox.Mode = candidate
                return
        tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise SandboxError(
            f"no sandbox for untrusted code works here ({tried}). Install bubblewrap (Debian, Ubuntu: apt-get install "
            "bubblewrap) or allow user namespaces; or, only where nothing is at stake, ask for the sandbox "
            "'unsafe', in which programs can read, change and delete all of the user's files, and read the environment "
            "and memory of the user's other processes"
        )

    def run(
        self, program: str, tests: str, entry_point: str, timeout: float = TIMEOUT, *, also: Sequence[str] = ()
    ) -> Outcome:
        """Execute `tests` with `entry_point` (and the names in `also`) standing for what `program` defines under them.

        The tests pass when they run to their end. `timeout` limits the program's CPU seconds in all calls together;
        waiting for it ends after three times that. Arguments and results travel by value: the tests do not see an
        argument changed in place. Never raises on hostile programs.
        """
        return _run(self.mode, program, tests, (entry_point, *also), timeout)


@cache
def _reason_against(mode: sandbox.Mode) -> str | None:
    """Why `mode` cannot be used here, or None. Tried once per process."""
    reason = sandbox.missing(mode)
    if reason is None:
        outcome = _run(mode, "def double(x):\n    return 2 * x", "assert double(4) == 8", ("double",), TIMEOUT)
        reason = None if outcome.status == "passed" else outcome.detail
    return reason


def _run(mode: sandbox.Mode, program: str, tests: str, names: Sequence[str], timeout: float) -> Outcome:
    # The program cannot know this: it runs in a process forked before the judge has read the job.
    nonce = secrets.token_hex(16)
    job = json.dumps({"nonce": nonce, "tests": tests, "names": list(names)}).encode()
    work = sandbox.modules() + frame(program.encode(errors="surrogatepass")) + frame(job)
    start = time.monotonic()
    with _folder(mode) as folder:
        try:
            # The judge ends a slow program itself; this deadline is for a judge stuck in a comparison.
            output, problem = _communicate(sandbox.command(mode, timeout, folder), work, sandbox.deadline(timeout))
        except OSError as error:
            output, problem = b"", str(error)
    seconds = time.monotonic() - start
    if output is None:
        return Outcome("timeout", f"no verdict after {seconds:.0f} s", seconds)
    try:
        verdict = json.loads(output)
        if verdict["nonce"] == nonce:
            return Outcome(verdict["status"], verdict["detail"], seconds)
        problem = "the verdict is not the judge's"
    except (ValueError, KeyError, TypeError):
        pass
    return Outcome("error", f"no verdict: {problem.strip()[-300:] or 'the sandbox ended silently'}", seconds)


@contextlib.contextmanager
def _folder(mode: sandbox.Mode) -> Iterator[str]:
    """Where the program works: a new folder in `unsafe`, else the sandbox's own /tmp."""
    folder = tempfile.mkdtemp(prefix="headstart-code-") if mode == "unsafe" else "/tmp"
    try:
        yield folder
    finally:
        if mode == "unsafe":  # shutil.rmtree fails on folders nested a thousand deep
            subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL, check=False)


def _communicate(command: Sequence[str], work: bytes, deadline: float) -> tuple[bytes | None, str]:
    """Standard output (None after the deadline) and standard error."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=sandbox.ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            output, problem = process.communicate(work, timeout=deadline)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            # Also when this thread is interrupted: nothing of the session may stay.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    return output, problem.decode(errors="replace")
