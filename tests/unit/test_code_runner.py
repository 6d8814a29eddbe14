"""The sandbox for untrusted programs: nothing wrong passes, nothing gets out, and the next program runs as before."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import SandboxError
from headstart.tasks.grading import code
from headstart.tasks.grading.code import CodeRunner, Outcome
from headstart.tasks.grading.inside.confine import FORBIDDEN, MACHINES, OWNERS, system_call_filter
from headstart.tasks.grading.inside.values import decode, encode
from hostile_programs import CHEATS, ESCAPES, FLOODS, RIGHT, TESTS, TIMEOUTS, WRONG

SANDBOXES = ("bwrap", "unshare")
LIMIT = 1.0  # CPU seconds for hostile programs


@functools.cache
def runner(mode: Any) -> CodeRunner:
    try:
        return CodeRunner(mode)
    except SandboxError as error:
        pytest.skip(f"{mode} does not work on this machine: {error}")


def run(mode: str, program: str, tests: str = TESTS, timeout: float = LIMIT, **options: Any) -> Outcome:
    return runner(mode).run(program, tests, "f", timeout, **options)


def judges_alive(owner: int = 0) -> list[int]:
    """Sandbox processes that `owner` (this process by default) started, or whose owner is gone."""
    owners = (owner or os.getpid(), 1)
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            if is_sandbox(pid):
                while is_sandbox(pid):
                    pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                found += [int(folder.name)] if pid in owners else []
    return found


def is_sandbox(pid: int) -> bool:
    return b"marshal.loads" in Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for_end() -> None:
    deadline = time.monotonic() + 5
    while judges_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert judges_alive() == []


def assert_unharmed(mode: str) -> None:
    """No process is left and the next program passes as if nothing had happened."""
    wait_for_end()
    assert run(mode, RIGHT).status == "passed"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Things outside that a program must not reach, and a check that it did not."""
    secret, target = tmp_path / "secret.txt", tmp_path / "written.txt"
    secret.write_text("secret")
    monkeypatch.setenv("HEADSTART_TEST_TOKEN", "hf_not_a_real_token")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield {
            "secret": str(secret),
            "target": str(target),
            "secret_value": "hf_not_a_real_token",
            "port": server.getsockname()[1],
        }
        assert not target.exists()
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("mode", [*SANDBOXES, "unsafe"])
def test_right_and_wrong(mode: str) -> None:
    assert run(mode, RIGHT).status == "passed"
    wrong = run(mode, WRONG)
    assert (wrong.status, wrong.detail[:14]) == ("failed", "AssertionError")
    raised = run(mode, "def f(x):\n    return {}['missing']")
    assert (raised.status, raised.detail) == ("failed", "KeyError: \"'missing'\"")


@pytest.mark.parametrize("name", CHEATS)
def test_cheats(name: str) -> None:
    outcome = run("bwrap", CHEATS[name])
    assert outcome.status in ("failed", "timeout"), outcome
    assert_unharmed("bwrap")


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("mode", SANDBOXES)
def test_escapes(mode: str, name: str, outside: dict[str, Any]) -> None:
    outcome = run(mode, ESCAPES[name].format(**outside))
    assert outcome.status == "failed", outcome
    assert_unharmed(mode)


# What the two sandboxes have in common is tested in one of them: the file system and the processes differ.
UNSHARE_FLOODS = ("fork bomb", "fifty daemons", "40 GB in pieces", "writes 10 GB in many files", "sleeps in a call")


@pytest.mark.parametrize(
    ("mode", "name"), [("bwrap", name) for name in FLOODS] + [("unshare", name) for name in UNSHARE_FLOODS]
)
def test_floods(mode: str, name: str) -> None:
    outcome = run(mode, FLOODS[name], timeout=0.4)
    assert outcome.status == "timeout" if name in TIMEOUTS else outcome.status in ("failed", "timeout"), outcome
    assert_unharmed(mode)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a system-call filter")
@pytest.mark.parametrize(
    "name",
    [
        "connects to a port",
        "forks",
        "starts a program",
        "kills its parent",
        "traces its parent",
        "new session",
        "sends its parent a signal through a pipe (F_SETOWN)",
    ],
)
def test_what_unsafe_still_blocks(name: str, outside: dict[str, Any]) -> None:
    assert run("unsafe", ESCAPES[name].format(**outside)).status == "failed"
    assert_unharmed("unsafe")


@pytest.mark.parametrize("name", [*CHEATS, "prints without end", "writes 10 GB", "40 GB at once", "sleeps in a call"])
def test_unsafe_is_not_fooled(name: str) -> None:
    outcome = run("unsafe", {**CHEATS, **FLOODS}[name], timeout=0.4)
    assert outcome.status in ("failed", "timeout"), outcome


def test_the_programs_process_knows_no_test() -> None:
    """What is in reach of the program holds neither the nonce nor the tests."""
    program = (
        "import gc, sys\n"
        "def f(x):\n"
        "    words = ' '.join(repr(thing) for thing in gc.get_objects() if type(thing) in (dict, list, tuple))\n"
        "    for module in list(sys.modules.values()):\n"
        "        words += ' '.join(str(thing) for thing in vars(module).values())\n"
        # Put together here, or the words would be found in this program itself.
        "    return ''.join(['pine', 'apple']) in words or ''.join([\"'non\", \"ce': '\"]) in words\n"
    )
    tests = "marker = 'pineapple'\nassert f(1) is False"
    assert run("unsafe", program, tests, timeout=10).status == "passed"


def test_environment_and_folder_are_empty() -> None:
    program = "import os\ndef f(x):\n    return dict(os.environ), os.listdir('.'), os.path.exists('/proc')"
    for mode in SANDBOXES:
        assert run(mode, program, "assert f(0) == ({}, [], False), f(0)").status == "passed"


def test_values_that_are_not_plain() -> None:
    """Objects of the program can be passed around and asked for attributes and truth, but are equal to nothing."""
    program = (
        "import re\nclass Node:\n    def __init__(self, value): self.value, self.next = value, None\n"
        "    def __eq__(self, other): return True\n"
        "def f(node):\n    return node.value if isinstance(node, Node) else re.match(node, 'abc')"
    )
    tests = (
        "node = Node(3)\nnode.next = Node(4)\nassert f(node) == 3 and f(node.next) == 4\n"
        "assert f('ab') and not f('x')\nassert f('x') is None\nassert node != 3 and not (node == 3) and node != Node(3)"
    )
    mode = "unsafe"
    outcome = run(mode, program, tests, also=("Node",))
    assert outcome.status == "passed", outcome


def test_exceptions_travel() -> None:
    program = "class Own(Exception): pass\ndef f(x):\n    raise [ValueError('v'), Own('o'), StopIteration()][x]"
    tests = (
        "for number, kind in ((0, ValueError), (2, StopIteration)):\n"
        "    try:\n        f(number)\n    except kind:\n        continue\n    raise RuntimeError('not raised')\n"
        "f(1)"
    )
    outcome = run("unsafe", program, tests)
    assert (outcome.status, outcome.detail) == ("failed", "ProgramError: Own: o")


def test_a_test_that_catches_everything_proves_nothing() -> None:
    tests = "try:\n    f(1)\nexcept BaseException:\n    pass"
    assert run("unsafe", "import os\ndef f(x):\n    os._exit(0)", tests).status == "failed"


def test_broken_tests_are_not_the_programs_fault() -> None:
    outcome = run("unsafe", RIGHT, "assert f(3 ==")
    assert (outcome.status, outcome.detail[:11]) == ("error", "SyntaxError")


def test_from_threads_at_once() -> None:
    """Each program gets its own verdict, also from threads other than the main one."""
    mode = runner("auto").mode
    programs = [RIGHT if number % 3 else WRONG for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda program: run(mode, program, timeout=10), programs))
    assert [outcome.status for outcome in outcomes] == ["passed" if number % 3 else "failed" for number in range(12)]


def test_same_verdict_every_time() -> None:
    """The order of sets of strings is fixed."""
    program = "def f(x):\n    return ''.join({'alpha', 'beta', 'gamma', 'delta'})"
    tests = "raise ValueError(f(0))"
    assert len({run("unsafe", program, tests).detail for _ in range(4)}) == 1


def test_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a sandbox the runner says what is missing, and takes `unsafe` only when told to."""
    monkeypatch.setattr("headstart.tasks.grading.sandbox.shutil.which", lambda name: None)
    code._reason_against.cache_clear()
    try:
        with pytest.raises(SandboxError, match=r"bwrap is not installed.*unshare is not installed.*Install bubblewrap"):
            CodeRunner()
        with pytest.raises(SandboxError, match=r"bwrap is not installed"):
            CodeRunner("bwrap")
        assert CodeRunner("unsafe").run(RIGHT, TESTS, "f").status == "passed"
    finally:
        code._reason_against.cache_clear()


def test_falls_back_to_unshare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bubblewrap that is there but does not work (as in many containers) is passed over."""
    runner("unshare")
    real = code.sandbox.command
    monkeypatch.setattr(code.sandbox, "missing", lambda mode: None)
    monkeypatch.setattr(
        code.sandbox, "command", lambda mode, *rest: ["/bin/false"] if mode == "bwrap" else real(mode, *rest)
    )
    code._reason_against.cache_clear()
    try:
        assert CodeRunner().mode == "unshare"
        with pytest.raises(SandboxError, match="the sandbox ended silently"):
            CodeRunner("bwrap")
    finally:
        code._reason_against.cache_clear()


def test_a_forged_verdict_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict without the nonce counts for nothing."""
    line = json.dumps({"nonce": "0" * 32, "status": "passed", "detail": "", "cpu": 0.0})
    monkeypatch.setattr(code.sandbox, "command", lambda *rest: ["/bin/echo", line])
    outcome = code._run("unsafe", RIGHT, TESTS, ("f",), 1.0)
    assert (outcome.status, outcome.detail) == ("error", "no verdict: the verdict is not the judge's")


def test_a_dying_caller_takes_the_program_along() -> None:
    """Killing the caller leaves no endless program behind."""
    mode = runner("auto").mode
    script = (
        f"from headstart.tasks.grading.code import CodeRunner\nCodeRunner({mode!r}).run('while True: pass', '', 'f', 2)"
    )
    caller = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not judges_alive(caller.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert judges_alive(caller.pid)
    caller.kill()
    caller.wait()
    wait_for_end()


def filtered(machine: str, number: int, argument: int = 0, architecture: int | None = None, second: int = 0) -> int:
    """What the system-call filter answers: its program, interpreted as the kernel does."""
    steps = list(struct.iter_unpack("HBBI", system_call_filter(machine)))
    memory = {0: number, 4: MACHINES[machine][1] if architecture is None else architecture, 16: argument, 24: second}
    place = value = 0
    while True:
        code_, yes, no, operand = steps[place]
        place += 1
        match code_:
            case 0x20:
                value = memory[operand]
            case 0x15:
                place += yes if value == operand else no
            case 0x35:
                place += yes if value >= operand else no
            case 0x45:
                place += yes if value & operand else no
            case 0x06:
                return int(operand)


@pytest.mark.parametrize("machine", MACHINES)
def test_system_call_filter(machine: str) -> None:
    column, _, clone, limits, _ = MACHINES[machine]
    allow, deny = 0x7FFF0000, 0x00050001
    for name, numbers in FORBIDDEN.items():
        if numbers[column] is not None:
            assert filtered(machine, numbers[column]) == deny, name
    reading = (0, 63)[column]
    assert filtered(machine, reading) == allow
    assert filtered(machine, clone, 0x3D0F00) == allow  # a thread
    assert filtered(machine, clone, 0x1200011) == deny  # a process
    assert filtered(machine, 435) == 0x00050000 | 38  # clone3: "not implemented", so that the C library uses clone
    assert (filtered(machine, limits, 0), filtered(machine, limits, 7)) == (allow, deny)
    for numbers, refused in OWNERS.values():
        assert {filtered(machine, numbers[column], second=value) for value in refused} == {deny}
        assert filtered(machine, numbers[column], second=4) == allow  # F_SETFL, and no request of ioctl
    assert filtered(machine, 0x40000000 + reading) == deny
    assert filtered(machine, reading, architecture=0x40000003) == 0x80000000  # 32-bit calls end the program


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(st.integers() | st.text(), max_size=4)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def refuse(value: object) -> Any:
    raise AssertionError(f"{value!r} is plain")


@settings(max_examples=200, deadline=None)
@given(plain)
def test_plain_values_arrive_unchanged(value: object) -> None:
    arrived = decode(json.loads(json.dumps(encode(value, refuse))), refuse)
    assert arrived == value
    assert repr(type(arrived)) == repr(type(value))


@pytest.mark.parametrize(
    "data", [{}, ["z", 1], ["d", [[["l", []], 1]]], ["h", "x"], ["c", [1]], ["n", "open"], [], ["r", [1, 2, 0]]]
)
def test_bad_data_raises_plainly(data: object) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        decode(data, lambda index: index)


def test_subclasses_lose_their_tricks() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    arrived = decode(json.loads(json.dumps(encode([Liar(3)], refuse))), refuse)
    assert type(arrived[0]) is int
    assert arrived != [4]
