"""A command as the person before it sees it: when the first word comes, and how long it is ever silent."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Watched:
    """Seconds of wall clock, but for `cpu_s`; silence also counts before the first word and after the last."""

    code: int
    wall_s: float
    cpu_s: float
    first_word_s: float
    longest_silence_s: float
    output: str


def watch(
    command: Sequence[str], *, cwd: Path | None = None, answers: str = "", environment: Mapping[str, str] | None = None
) -> Watched:
    """Run `command` to its end with `answers` on stdin; what it writes, on either stream, is timed as it arrives."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        began = last = time.monotonic()
        first, longest, pieces = None, 0.0, []
        assert process.stdin
        assert process.stdout
        process.stdin.write(answers.encode())
        process.stdin.close()
        while piece := os.read(process.stdout.fileno(), 2**16):
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            first = now - began if first is None else first
            pieces.append(piece)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - began
    return Watched(
        code=process.returncode,
        wall_s=round(wall, 2),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 2),
        first_word_s=round(wall if first is None else first, 2),
        longest_silence_s=round(max(longest, began + wall - last), 2),
        output=b"".join(pieces).decode(errors="replace"),
    )
