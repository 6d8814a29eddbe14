"""The program that compares answers with math-verify. It runs as processes of its own and is never imported.

The nursery (the program as it is started) imports math-verify once and then forks a worker for every connection its
owner hands it: importing takes a second, a fork a few milliseconds, so the nursery is the warm spare of every worker.
It reads no answers itself and therefore cannot hang: when its owner's end of the control socket closes, however the
owner died, it kills its workers and ends. Where the kernel offers it (Linux), workers also die with the nursery.

Control messages are four bytes, a process id. With a connection attached: fork a worker for it, answer with its id.
Without: kill that worker. Only the nursery kills, because only it reaps: an id cannot have passed to a stranger.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import warnings
from multiprocessing.connection import Connection
from typing import Any

import sympy  # type: ignore[import-untyped]
from math_verify import LatexExtractionConfig, grader, parse  # type: ignore[import-untyped]

WORD = 4  # bytes of a control message
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
    expected, found = (parse(f"${text}$", _LATEX, parsing_timeout=None) for text in (gold, answer))
    alternatives = found[0].args if found and isinstance(found[0], sympy.FiniteSet) else ()  # "1/2 or 0.5"
    if grader.verify(expected, found, timeout_seconds=None) or (
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
    if found := sympy.solve(relation, symbols):
        return found
    raise ValueError("no solution")


_ABSOLUTE_EQ = grader.sympy_numeric_eq
grader.sympy_numeric_eq, grader.solve = _numeric_eq, _solve


def _serve(channel: Connection) -> None:
    """Answer requests until the owner hangs up. After an unexpected error the worker cannot be trusted and ends."""
    while True:
        try:
            request = json.loads(channel.recv_bytes())
        except EOFError:
            return
        try:
            status = judge(**request)
        except BaseException:  # math-verify's own timeout derives from BaseException
            channel.send_bytes(b"error")
            return
        channel.send_bytes(status.encode())


def _confine(memory: int, nursery: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != nursery:  # the nursery died before the line above
        os._exit(1)
    limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    for kind, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(kind, (value, value))


def _fork(control: socket.socket, connection: int, memory: int) -> int:
    nursery = os.getpid()
    child = os.fork()
    if child:
        os.close(connection)
        return child
    try:
        control.close()
        _confine(memory, nursery)
        with contextlib.suppress(BrokenPipeError):
            _serve(Connection(connection))
    finally:
        os._exit(0)


def _nurse(control: socket.socket, memory: int) -> None:
    children: set[int] = set()
    try:
        while message := _receive(control):
            number, connection = message
            if connection is not None:
                child = _fork(control, connection, memory)
                children.add(child)
                control.sendall(child.to_bytes(WORD, sys.byteorder))
            elif number in children:
                children.remove(number)
                _end(number)
    finally:
        for child in children:
            _end(child)


def _receive(control: socket.socket) -> tuple[int, int | None] | None:
    """A control message: its number and the connection that came along; None once the owner is gone."""
    owner = os.getppid()
    while True:
        try:
            data, ancillary, _, _ = control.recvmsg(WORD, socket.CMSG_SPACE(array.array("i").itemsize))
            break
        except TimeoutError:
            if os.getppid() != owner:  # dead, while a process that it forked still holds the socket open
                return None
        except ConnectionResetError:
            return None
    if not data:
        return None
    descriptors = array.array("i")
    for _, _, payload in ancillary:
        descriptors.frombytes(payload)
    return int.from_bytes(data, sys.byteorder), descriptors[0] if descriptors else None


def _end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main() -> None:
    """Usage: `math_worker.py CONTROL_FD MEMORY_BYTES`. One message (zero) says that the nursery is ready."""
    control, memory = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    # What sympy imports and compiles on first use is then there in every worker.
    for gold, answer in (("\\frac{x}{2}", "0.5x"), ("(1,2]", "(1,3]"), ("\\sqrt{2}", "x=1.5")):
        judge(gold, answer)
    gc.freeze()  # a collection in a worker would otherwise copy every page of the nursery
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    control.settimeout(5)
    control.sendall(bytes(WORD))
    _nurse(control, memory)


if __name__ == "__main__":
    main()
