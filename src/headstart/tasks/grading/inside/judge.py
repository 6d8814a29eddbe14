"""The judge: holds the tests and compares the values that the program's process answers with."""

from __future__ import annotations

import dis
import json
import os
import select
import signal
import struct
import sys
import time

from headstart.tasks.grading.inside.values import ProgramError, decode, encode, exception, frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

PATIENCE = 3  # wall-clock seconds for every CPU second allowed
FRAME_LIMIT = 32 * 2**20  # bytes of one answer: far more than any benchmark needs, far less than the judge's memory


class Gone(BaseException):
    """The program's process ended or ran out of time: (status, detail). No `except Exception` of a test hides it."""


class Remote:
    """A name of the program, or an object it made. Calls, attributes and truth travel; it is equal to nothing else."""

    def __init__(self, link: Link, target: str | int) -> None:
        vars(self).update(_link=link, _target=target)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._link.request(self._target, "call", arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.request(self._target, "get", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.request(self._target, "set", (name, value))

    def __bool__(self) -> bool:
        return self._link.request(self._target, "truth", ()) is True


class Link:
    """The judge's end of the two pipes: waits for the program no longer than its time limit, in all calls together."""

    def __init__(self, pid: int, ask: int, tell: int, seconds: float) -> None:
        self.pid, self.ask, self.tell, self.seconds = pid, ask, tell, seconds
        self.waited = self.decoded = 0.0
        self.raised: Exception | None = None
        self.gone: Gone | None = None
        self.reaped = False
        self._received = bytearray()
        os.set_blocking(ask, False)
        signal.signal(signal.SIGPROF, self._decoded_too_long)

    def greeting(self) -> Any:
        """True once the process has given up its privileges; before that no line of the program runs."""
        try:
            return self._exchange(b"", time.monotonic()).get("confined")
        except Gone as gone:
            return gone.args[1]

    def request(self, target: str | int, act: str, arguments: Any, keywords: Mapping[str, Any] | None = None) -> Any:
        def refer(value: Any) -> int:
            if isinstance(value, Remote) and isinstance(vars(value)["_target"], int):
                return int(vars(value)["_target"])
            raise TypeError(f"the tests pass a {type(value).__name__}, which cannot be sent to the program")

        message = {
            "target": target,
            "act": act,
            "arguments": [encode(item, refer) for item in arguments],
            "keywords": {name: encode(item, refer) for name, item in (keywords or {}).items()},
        }
        return self.result(json.dumps(message).encode(), watched=act == "call")

    def result(self, request: bytes | None = None, *, watched: bool = False) -> Any:
        """The value of the next answer (after sending `request`), or the program's exception, raised here."""
        if self.gone is not None:
            raise self.gone
        start = time.monotonic()
        try:
            self.check_seen()
            reply = self._exchange(frame(request) if request is not None else b"", start)
            value = self._decode(reply)
        except Gone as gone:
            self.gone = gone
            raise
        finally:
            self.waited += time.monotonic() - start
        if "error" in reply:
            try:
                raise value
            except Exception:  # caught here once, so that it has a traceback wherever it goes
                self.raised = value if watched else None
                raise
        return value

    def check_seen(self) -> None:
        """Raise Gone where an exception of the program ended an iteration in the tests that they do not notice: after
        a StopIteration, `for y in map(f, values)` just ends. What they notice has one of their frames on top.
        """
        error, self.raised = self.raised, None
        if error is None or error.__traceback__ is None:  # the tests may take the traceback off
            return
        place = error.__traceback__.tb_lasti
        top = error.__traceback__.tb_frame.f_code
        # From Python 3.12 on, frames that only let it pass are there, too.
        handled = any(entry.start <= place < entry.end for entry in dis.Bytecode(top).exception_entries)  # type: ignore[attr-defined]
        if top.co_filename == JUDGE or top.co_name == "__getitem__" or not handled:
            self.gone = Gone("failed", f"an iteration of the tests ended with the program's {describe(error)}")
            raise self.gone

    def _decode(self, reply: Mapping[str, Any]) -> Any:
        """The value or exception in an answer, in the CPU time that the program has: it can make decoding slow."""
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, max(self.seconds - self.decoded, 1e-3))
        try:
            if "error" in reply:
                return exception(*reply["error"])
            return decode(reply.get("value"), lambda index: Remote(self, index))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.decoded += time.process_time() - start

    def _decoded_too_long(self, *_: Any) -> None:
        raise Gone("timeout", f"more than {self.seconds:g} s to read the program's answers")

    def _exchange(self, request: bytes, start: float) -> dict[str, Any]:
        out = memoryview(request)
        while (data := self._take_frame()) is None:
            self._check_time(start)
            readable, writable, _ = select.select([self.tell], [self.ask] if out else [], [], 0.05)
            if writable:
                out = out[self._send(out) :]
            if readable:
                part = os.read(self.tell, 2**20)
                if not part:
                    raise self.ended()
                self._received += part
        reply = json.loads(data)
        if not isinstance(reply, dict):
            raise ValueError("the program's answer is not an object")
        return reply

    def _take_frame(self) -> bytes | None:
        if len(self._received) < 8:
            return None
        size = 8 + struct.unpack(">Q", self._received[:8])[0]
        if size > FRAME_LIMIT:
            raise Gone("failed", f"the program returned more than {FRAME_LIMIT} bytes")
        if len(self._received) < size:
            return None
        data = bytes(self._received[8:size])
        del self._received[:size]
        return data

    def _send(self, out: memoryview) -> int:
        try:
            return os.write(self.ask, out)
        except BrokenPipeError:
            raise self.ended() from None

    def _check_time(self, start: float) -> None:
        # CPU time decides, so that a busy machine changes no verdict; wall-clock time stops a program that sleeps.
        waited = self.waited + time.monotonic() - start
        if cpu_seconds(self.pid) >= self.seconds or waited >= PATIENCE * self.seconds:
            raise Gone("timeout", f"more than {self.seconds:g} s")

    def ended(self) -> Gone:
        """How the program's process ended; called after its pipe was closed."""
        os.kill(self.pid, signal.SIGKILL)  # it may have closed its pipe and live on
        _, status, usage = os.wait4(self.pid, 0)
        self.reaped = True
        if usage.ru_utime + usage.ru_stime >= self.seconds:
            return Gone("timeout", f"more than {self.seconds:g} s")
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            reason = "wrote too much" if number == signal.SIGXFSZ else f"killed by {signal.Signals(number).name}"
            return Gone("failed", f"the program ended before the tests did: {reason}")
        return Gone("failed", f"the program ended before the tests did: exit code {os.WEXITSTATUS(status)}")


JUDGE = Link.result.__code__.co_filename


def describe(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"[:500]
    return f"ProgramError: {text}" if isinstance(error, ProgramError) and type(error) is not ProgramError else text


def cpu_seconds(pid: int) -> float:
    if sys.platform != "linux":
        return 0.0
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the process's CPU clock, see clock_getcpuclockid(3)
    except OSError:
        return 0.0


def judge(link: Link, job: Mapping[str, Any]) -> tuple[str, str]:
    """Status and detail of the program under the tests."""
    try:
        link.result()
    except Exception as error:
        return "failed", describe(error)
    code = compile(job["tests"], "tests", "exec")
    namespace: dict[str, Any] = {"__name__": "tests"}
    namespace.update({name: Remote(link, name) for name in job["names"]})
    try:
        exec(code, namespace)
        link.check_seen()
    except Exception as error:
        return "failed", describe(error)
    if link.gone is not None:  # a test that catches everything
        raise link.gone
    return "passed", ""


def examine(link: Link, job: Mapping[str, Any]) -> tuple[str, str, float]:
    """Judge the program and end its process, whatever happens."""
    try:
        greeting = link.greeting()
        status, detail = judge(link, job) if greeting is True else ("error", f"not confined: {greeting}")
    except Gone as gone:
        status, detail = gone.args
    except BaseException as error:
        status, detail = "error", f"{type(error).__name__}: {error}"[:500]
    cpu = 0.0 if link.reaped else cpu_seconds(link.pid)
    if not link.reaped:
        os.kill(link.pid, signal.SIGKILL)
    return status, detail, cpu
