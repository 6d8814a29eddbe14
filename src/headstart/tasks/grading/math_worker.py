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

from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

WORD = 4  # bytes of a control message
_PR_SET_PDEATHSIG = 1
_LATEX = (LatexExtractionConfig(),)  # only LaTeX: the plain-number patterns would find a 3 in an unreadable answer


def judge(gold: str, answer: str, prose: bool) -> str:
    """`correct`, `wrong`, `no_answer` or `bad_gold`. `gold` and (without `prose`) `answer` are LaTeX without dollars.

    With `prose`, the answer is looked for in a sentence, as in "the answer is 4". `bad_gold`: gold has no expression
    to compare with, and it is not the same string either.
    """
    expected = parse(f"${gold}$", _LATEX, parsing_timeout=None)
    found = parse(answer, parsing_timeout=None) if prose else parse(f"${answer}$", _LATEX, parsing_timeout=None)
    if prose and not found:
        return "no_answer"
    if verify(expected, found, timeout_seconds=None):
        return "correct"
    return "bad_gold" if all(isinstance(reading, str) for reading in expected) else "wrong"


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
        judge(gold, answer, prose=False)
    judge("4", "The answer is 5.", prose=True)
    gc.freeze()  # a collection in a worker would otherwise copy every page of the nursery
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    control.settimeout(5)
    control.sendall(bytes(WORD))
    _nurse(control, memory)


if __name__ == "__main__":
    main()
