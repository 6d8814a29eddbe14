"""Run a program against tests in a sandbox, and find the program in a model's response."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
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
    """Runs untrusted Python programs, each in a sandbox of its own; may be called from several threads at once.

    `mode` "auto" takes the first of bubblewrap and unshare that works here; `self.mode` says which it was. Raises
    SandboxError when none does, or when the mode asked for does not work. "unsafe" is taken only when asked for.

    The tests run in a process that the program cannot reach and see only plain values (see `inside`). What a program
    can still do: answer from memory (the tests of public benchmarks are public), use its CPU time and memory to the
    limit, and, in any sandbox that shares a kernel, exploit a hole of that kernel. `unsafe` also lets it read and write
    the user's files.
    """

    def __init__(self, mode: Literal["auto", "bwrap", "unshare", "unsafe"] = "auto") -> None:
        candidates = ORDER if mode == "auto" else (mode,)
        reasons = {}
        for candidate in candidates:
            reasons[candidate] = _reason_against(candidate)
            if reasons[candidate] is None:
                self.mode: sandbox.Mode = candidate
                return
        found = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise SandboxError(
            f"no sandbox for untrusted code works here ({found}). Install bubblewrap (Debian, Ubuntu: apt-get install "
            "bubblewrap) or allow user namespaces; or, only where nothing is at stake, ask for the sandbox 'unsafe'"
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


def _folder(mode: sandbox.Mode) -> contextlib.AbstractContextManager[str]:
    """Where the program works: a new folder in `unsafe`, else the sandbox's own /tmp."""
    if mode != "unsafe":
        return contextlib.nullcontext("/tmp")
    return tempfile.TemporaryDirectory(prefix="headstart-code-", ignore_cleanup_errors=True)


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


_FENCE = re.compile(r"^([ \t]*)(```+|~~~+)[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_DEFINITION = r"import |from \S+ import |(?:async )?def |class |@|if __name__"
# Blanks, not \s: over line ends the search would take quadratic time on "a,\na,\na,".
_ASSIGNMENT = r"[A-Za-z_][\w.\[\]]*(?:,[ \t]*[A-Za-z_][\w.\[\]]*)*[ \t]*(?:[-+*/%|&^@]|//|\*\*|<<|>>)?=(?!=)"
_KEYWORD = r"(?:return|if|for|while|try|with|raise|yield|pass|assert|nonlocal|global|else|elif|except|finally|del)\b"
_START = re.compile(rf"^(?:{_DEFINITION}|{_ASSIGNMENT})", re.MULTILINE)
_STATEMENT = re.compile(rf"{_DEFINITION}|{_ASSIGNMENT}|{_KEYWORD}|[A-Za-z_][\w.]*\(|[#)\]}}'\"]")


def extract_code(response: str, entry_point: str, prompt: str = "") -> str | None:
    """The program in a response, or None when there is no code in it.

    The last fenced block that defines `entry_point` counts, else the last fenced block; without fences, the text
    without the prose around it. With a `prompt` (code that ends inside the function to be completed) the result is
    prompt and response together: a whole function replaces the prompt's stub, anything else continues it and ends at
    the first line that is not indented. Text only, linear in its length: nothing is parsed or run.
    """
    defines = re.compile(rf"^(?:async )?(?:def|class)[ \t]+{re.escape(entry_point)}\b", re.MULTILINE)
    blocks = _fenced(response)
    if blocks:
        code = next((block for block in reversed(blocks) if defines.search(block)), blocks[-1])
    else:
        code = _without_prose(response) if defines.search(response) or not prompt else response
    if not code.strip():
        return None
    if not prompt:
        return code
    if defines.search(code):
        return _with_imports(prompt, code)
    body = _continuation(code)
    return None if body is None else prompt.rstrip("\n") + "\n" + body


def _without_prose(text: str) -> str:
    """From the first line that can start a program to the last before a line that cannot belong to it."""
    start = _START.search(text)
    if start is None:
        return ""
    lines, kept, quoted = text[start.start() :].split("\n"), [], False
    for line in lines:
        if not quoted and line[:1].strip() and not _STATEMENT.match(line):
            break
        kept.append(line)
        quoted ^= (line.count('"""') + line.count("'''")) % 2 == 1  # any text may stand in a long string
    return "\n".join(kept)


def _fenced(text: str) -> list[str]:
    """The contents of fenced code blocks; one that is never closed (a truncated response) runs to the end."""
    blocks, opened = [], None
    for mark in _FENCE.finditer(text):
        if opened is None:
            opened = mark
        elif mark[2][0] == opened[2][0] and len(mark[2]) >= len(opened[2]) and not mark[3]:
            blocks.append(_dedent(text[opened.end() + 1 : mark.start()], opened[1]))
            opened = None
    if opened is not None:
        blocks.append(_dedent(text[opened.end() + 1 :], opened[1]))
    return [block for block in blocks if block.strip()]


def _dedent(block: str, indent: str) -> str:
    """A block in a list item is indented with its fence."""
    return "\n".join(line.removeprefix(indent) for line in block.split("\n")) if indent else block


def _with_imports(prompt: str, code: str) -> str:
    """The prompt's imports and helpers in front of a whole function; `__future__` imports must stay first."""
    future = [line for line in code.split("\n") if line.startswith("from __future__ import ")]
    rest = [line for line in code.split("\n") if not line.startswith("from __future__ import ")]
    return "\n".join([*future, prompt, *rest])


def _continuation(code: str) -> str | None:
    """The part of `code` that continues a function's body: up to the first line without indentation."""
    lines = code.split("\n")
    first = next(number for number, line in enumerate(lines) if line.strip())
    if not lines[first][0].isspace():
        if not _STATEMENT.match(lines[first]):
            return None  # prose
        # Leading white space is often lost with the prompt's last line; then only the first line misses it.
        lines[first] = "    " + lines[first]
    body = lines[: first + 1]
    for line in lines[first + 1 :]:
        if line.strip() and not line[0].isspace():
            break
        body.append(line)
    return "\n".join(body) + "\n"
