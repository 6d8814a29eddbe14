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
UNSHARE_FLOODS = (
    "fork bomb",
    "fifty daemons",
    "40 GB in pieces",
    "writes 10 GB in many files",
    "makes a million empty files",
    "sleeps in a call",
)


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
        "lowers the priority of its judge",
        "lowers the priority of the group of its judge",
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


@pytest.mark.parametrize(
    ("make", "test"),
    [
        ("fractions.Fraction(x, 4)", "assert f(2) == fractions.Fraction(1, 2) and f(1) != fractions.Fraction(1, 2)"),
        ("{'a': [fractions.Fraction(x)]}", "assert f(2) == {'a': [2]}"),
        ("x + 1", "assert f(fractions.Fraction(1, 3)) == fractions.Fraction(4, 3)"),
        ("decimal.Decimal(x) / 8", "assert f(1) == decimal.Decimal('0.125')"),
        ("x * 2", "assert f(decimal.Decimal('1.5')) == 3"),
        ("complex(x, 2)", "assert f(1) == 1 + 2j"),
        ("datetime.date(2020, 1, x)", "assert f(3) == datetime.date(2020, 1, 3)"),
        ("datetime.datetime(2020, 1, x, 3, 4, 5, 6)", "assert f(3) == datetime.datetime(2020, 1, 3, 3, 4, 5, 6)"),
        ("x + datetime.timedelta(days=1)", "assert f(datetime.date(2020, 1, 31)) == datetime.date(2020, 2, 1)"),
        ("datetime.time(x, 2)", "assert f(1) == datetime.time(1, 2)"),
        ("collections.Counter(x)", "assert f('aab') == {'a': 2, 'b': 1} and f('aab').most_common(1) == [('a', 2)]"),
        ("collections.OrderedDict([(1, x), (3, 4)])", "assert f(2) != collections.OrderedDict([(3, 4), (1, 2)])"),
        ("collections.defaultdict(list, a=[x])", "assert f(1) == {'a': [1]}"),
        ("collections.deque([x], 3)", "assert f(1) == collections.deque([1]) and f(1).maxlen == 3"),
        ("len(x)", "assert f(collections.deque([1, 2])) == 2"),
        ("collections.namedtuple('P', 'a b')(x, 2)", "assert f(1) == (1, 2)"),
        ("range(x)", "assert f(3) == range(3)"),
        ("{frozenset([x])}", "assert f(3) == {frozenset([3])}"),
        ("ValueError(x)", "assert isinstance(f('a'), ValueError) and str(f('a')) == 'a'"),
        ("isinstance(x, ValueError)", "assert f(ValueError('a'))"),
    ],
)
def test_values_of_the_standard_library(make: str, test: str) -> None:
    imports = "import collections, datetime, decimal, fractions\n"
    outcome = run("unsafe", f"{imports}def f(x):\n    return {make}", imports + test)
    assert outcome.status == "passed", outcome


def test_what_only_looks_like_a_value_is_equal_to_nothing() -> None:
    liar = "class F(Fraction):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    for name in ("F", "Fraction"):  # a subclass, and one that takes the name
        program = f"from fractions import Fraction\n{liar}F.__qualname__ = {name!r}\ndef f(x):\n    return F(1, 3)"
        assert (
            run("unsafe", program, "from fractions import Fraction\nassert f(0) == Fraction(1, 2)").status == "failed"
        )
    zone = "import datetime\ndef f(x):\n    return datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)"
    assert run("unsafe", zone, "import datetime\nassert f(0) == datetime.datetime(2020, 1, 1)").status == "failed"


@pytest.mark.parametrize(
    ("bases", "caught"),
    [
        ("ValueError", "ValueError"),
        ("KeyError", "LookupError"),
        ("FileNotFoundError", "OSError"),
        ("NotImplementedError", "RuntimeError"),
        ("UnicodeDecodeError", "ValueError"),
        ("StopIteration", "StopIteration"),
        ("KeyError, ValueError", "ValueError"),
    ],
)
def test_exceptions_keep_their_bases(bases: str, caught: str) -> None:
    arguments = "'utf-8', b'', 0, 1, 'm'" if "Decode" in bases else "'m'"
    program = f"class Own({bases}): pass\nclass Own2(Own): pass\ndef f(x):\n    raise Own2({arguments})"
    tests = "try:\n    f(0)\nexcept {} as error:\n    assert 'm' in str(error)\nelse:\n    raise RuntimeError"
    assert run("unsafe", program, tests.format(caught)).status == "passed"
    outcome = run("unsafe", program, tests.format("ZeroDivisionError"))
    assert (outcome.status, outcome.detail[:18]) == ("failed", "ProgramError: Own2")


UNSEEN = [
    "for y in map(f, [1, 2]):\n    assert y == 3",
    "assert list(map(f, [1])) == []",
    "assert sum(map(f, [1])) == 0",
    "assert not any(map(f, [1]))",
    "assert next(map(f, [1]), None) is None",
    "for y in iter(lambda: f(1), 0):\n    assert y",
    "def values():\n    yield from map(f, [1])\nassert list(values()) == []",
    "class Values:\n    def __getitem__(self, place): return f(place)\nassert list(Values()) == []",
    "list(map(f, [1]))\ntry:\n    f(2)\nexcept StopIteration:\n    pass",
]


@pytest.mark.parametrize("kind", ["StopIteration", "IndexError", "GeneratorExit", "StopAsyncIteration", "Own"])
@pytest.mark.parametrize("tests", UNSEEN)
def test_no_exception_ends_a_test_as_passed(tests: str, kind: str) -> None:
    outcome = run("unsafe", f"class Own(StopIteration): pass\ndef f(x):\n    raise {kind}", tests)
    assert outcome.status == "failed", outcome


def test_an_exception_that_a_test_handles_is_no_failure() -> None:
    tests = (
        "import contextlib, unittest\nwith contextlib.suppress(StopIteration):\n    f(1)\n    assert False\n"
        "unittest.TestCase().assertRaises(StopIteration, f, 1)\nassert list(map(str, [1])) == ['1']"
    )
    assert run("unsafe", "def f(x):\n    raise StopIteration", tests).status == "passed"


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("['s', [i * M for i in range(1, 300_000)]]", "timeout"),
        ("['f', [i * M for i in range(1, 300_000)]]", "timeout"),
        ("['d', [[i * M, 0] for i in range(1, 300_000)]]", "timeout"),
        ("['p', ['collections', 'Counter', ['l', [['d', [[i * M, 0] for i in range(1, 300_000)]]]]]]", "timeout"),
        ("['p', ['collections', 'Counter', ['l', [['l', [i * M for i in range(1, 300_000)]]]]]]", "failed"),
        ("['p', ['fractions', 'Fraction', ['l', [['x', hex(3 << 2**25)], ['x', hex(5 << 2**25)]]]]]", "failed"),
        ("['p', ['os', 'system', ['l', ['true']]]]", "failed"),
        ("['e', ['x', 'y', ['missing']]]", "failed"),
    ],
)
def test_answers_that_take_long_to_read_are_under_the_time_limit(answer: str, status: str) -> None:
    """M is the modulus of Python's hashes of numbers: its multiples all have the hash 0."""
    program = (
        "import sys\nM = 2**61 - 1\ndef f(x):\n    pass\n"
        f"sys.modules['headstart.tasks.grading.inside.program'].encode = lambda *a: {answer}\n"
    )
    outcome = run("unsafe", program, "f(1)")
    assert outcome.status == status, outcome
    assert outcome.seconds < 12


def test_a_missing_package_is_named() -> None:
    outcome = run("unsafe", "import numpy as np\ndef f(x):\n    return int(np.sum([x, 1]))")
    assert outcome.detail == "ModuleNotFoundError: No module named 'numpy'"


def test_unsafe_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where folders lie too deep in one another for Python's own way to remove them."""
    monkeypatch.setattr(code.tempfile, "tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(2000):\n    os.mkdir('folder')\n    os.chdir('folder')\n" + RIGHT
    assert run("unsafe", deep).status == "passed"
    assert list(tmp_path.iterdir()) == []


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
