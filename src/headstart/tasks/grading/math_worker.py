"""The program that compares answers with math-verify. It runs in separate processes and is never imported.

The program imports math-verify once and forks the process that compares: importing takes a second, a fork a few
milliseconds, so one that hangs is killed and replaced at once, on SIGTERM. The program itself reads no answers and
therefore cannot hang: when its owner is gone, however it died, it kills its fork and ends. Where the kernel offers it
(Linux), the fork also dies with the program.

Messages are JSON: `[number, gold, answer]` is answered by `[number, status]`; `[null, "error"]` says that the fork
died and another one has its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import select
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from typing import Any

import sympy  # type: ignore[import-untyped]
from math_verify import LatexExtractionConfig, grader, parse  # type: ignore[import-untyped]

_PR_SET_PDEATHSIG = 1
_LATEX = (LatexExtractionConfig(),)  # only LaTeX: the plain-number patterns would find a 3 in an unreadable answer


def judge(gold: str, answer: str) -> str:
    """`correct`, `wrong` or `bad_gold`. Both are LaTeX without dollars.

    A percentage is also equal to the number before its sign. `bad_gold`: gold has no expression to compare with, and
    it is not the same string either.
    """
    if gold.endswith("%") != answer.endswith("%"):
        bare = [text.removesuffix(r"\%") for text in (gold, answer)]
        if judge(*bare) == "correct":
            return "correct"
    expected, given = (parse(f"${text}$", _LATEX, parsing_timeout=None) for text in (gold, answer))
    alternatives = given[0].args if given and isinstance(given[0], sympy.FiniteSet) else ()  # "1/2 or 0.5"
    if grader.verify(expected, given, timeout_seconds=None) or (
        alternatives and all(grader.verify(expected, [one], timeout_seconds=None) for one in alternatives)
    ):
        return "correct"
    return "bad_gold" if all(isinstance(reading, str) for reading in expected) else "wrong"


def _numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    """math-verify's comparison of values, made relative: it rounds at a fixed decimal, where 1/20! and 1/21! are 0."""
    return _ABSOLUTE_EQ(a, b, float_rounding, numeric_precision) and _close(a, b)


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, sympy.MatrixBase | sympy.MatrixExpr):
        return True  # its elements have been compared one by one
    values = [grader.is_atomic_or_pct_atomic(value, sympy.Number) for value in (a, b)]
    decimals = [grader.is_atomic_or_pct_atomic(value, sympy.Float) for value in (a, b)]
    if any(values) and not any(decimals):
        return True  # compared exactly
    a, b = a.doit(), b.doit()
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if symbols:  # a decimal in a formula is exact
        point = {symbol: sympy.Rational(2 * place + 3, 7) for place, symbol in enumerate(symbols)}
        a, b = (sympy.nsimplify(value, rational=True).subs(point) for value in (a, b))
    tolerance = 5e-5 if any(decimals) else 1e-12 if a.has(sympy.Float) or b.has(sympy.Float) else 1e-60
    try:
        return bool(abs((a - b).evalf()) <= tolerance * max(abs(a.evalf()), abs(b.evalf())))
    except TypeError:
        return False


def _solve(relation: Any, symbols: Any) -> Any:
    """sympy's, but that two equations are not equal because neither has a solution."""
    if solutions := sympy.solve(relation, symbols):
        return solutions
    raise ValueError("no solution")


_ABSOLUTE_EQ = grader.sympy_numeric_eq
grader.sympy_numeric_eq, grader.solve = _numeric_eq, _solve


def _serve(channel: Connection) -> None:
    """Answer requests until the owner hangs up."""
    while True:
        try:
            number, gold, answer = json.loads(channel.recv_bytes())
        except EOFError:
            return
        channel.send_bytes(json.dumps([number, judge(gold, answer)]).encode())


def _confine(memory: int, parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    for kind, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(kind, (value, value))


def _fork(channel: Connection, memory: int) -> int:
    """The process id of a fork that serves. After an unexpected error it cannot be trusted and ends."""
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _confine(memory, parent)
        _serve(channel)
        os._exit(0)
    finally:  # also after math-verify's own timeout, which derives from BaseException
        os._exit(1)


def _watch(channel: Connection, memory: int) -> None:
    """Keep one fork serving until the owner is gone."""
    owner = os.getppid()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # both only end the wait below
    signal.set_wakeup_fd(wake)
    child = _fork(channel, memory)
    while True:
        ready, _, _ = select.select([woken], [], [], 1)
        asked = bool(ready) and signal.SIGTERM in os.read(woken, 64)
        orphaned = os.getppid() != owner  # while a process that the owner forked may hold the connection open
        if asked or orphaned:
            os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, 0 if asked or orphaned else os.WNOHANG)
        if orphaned or (ended and status == 0):
            return
        if ended:
            while select.select([channel], [], [], 0)[0] and os.read(channel.fileno(), 2**16):
                pass  # a request that the dead fork did not read, or only half
            channel.send_bytes(b'[null, "error"]')
            child = _fork(channel, memory)


def main() -> None:
    """Usage: `math_worker.py CONNECTION_FD MEMORY_BYTES`. An empty message says that it is ready."""
    channel, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    # What sympy imports and compiles on first use is then there in every fork.
    for gold, answer in (("\\frac{x}{2}", "0.5x"), ("(1,2]", "(1,3]"), ("\\sqrt{2}", "x=1.5")):
        judge(gold, answer)
    gc.freeze()  # a collection in a fork would otherwise copy every page
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        channel.send_bytes(b"")
        _watch(channel, memory)


if __name__ == "__main__":
    main()
