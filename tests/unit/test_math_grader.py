"""The math grader: what it accepts, what it refuses, and that no text and no signal gets the better of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import HeadstartError
from headstart.tasks.grading.math import MathGrader, shared_grader
from headstart.tasks.grading.math_pool import Request, WorkerPool
from real_tokenizers import real_data

HANG = r"\boxed{9999999!}"
PATHOLOGICAL = {
    "tower": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "factorial": HANG,
    "factorial of a factorial": r"\boxed{(10!)!}",
    "binomial": r"\boxed{\binom{1000000}{500000}}",
    "a million terms": r"\boxed{\sum_{k=1}^{1000000} \frac{1}{k^2+1}}",
    "product": r"\boxed{\prod_{k=1}^{1000000} (1+\frac{1}{k})}",
    "integral": r"\boxed{\int_0^{1} \frac{\sin(x^{x})^{17}}{e^{x^3}+\ln(x+2)} dx}",
    "limit": r"\boxed{\lim_{x \to 0} \frac{\sin(\tan(x)) - \tan(\sin(x))}{x^{77}}}",
    "expansion": r"\boxed{(a+b+c+d+f+g)^{60} - (a+b+c+d+f+h)^{60}}",
    "nested roots": "\\boxed{" + r"\sqrt{2+" * 150 + "2" + "}" * 150 + "}",
    "deep braces": "\\boxed{" + "{" * 900 + "5" + "}" * 900 + "}",
    "a million braces": "\\boxed{" * 140_000,
    "a million boxes": "\\boxed{5}" * 110_000,
    "a long sum": "\\boxed{" + "+".join(["x^{3}"] * 300) + "}",
    "a long sentence": "The answer is " + "$1$, and " * 25 + "(((((" * 8,
    "memory": r"\boxed{2^{10^{10}}}",
    "a huge matrix": r"\boxed{\begin{pmatrix}" + "&".join(["x^{99!}"] * 90) + r"\end{pmatrix}^{-999}}",
    "not text": "\\boxed{\ud800\x00\u202e4\\}",
}
linux = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes under /proc")


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader(workers=2, deadline=20) as grader:
        yield grader


def status(grader: MathGrader, gold: str, response: str) -> str:
    verdict = grader.grade(gold, response)
    assert verdict.correct == (verdict.status == "correct")
    return verdict.status


# --- what an answer is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "response", "expected"),
    [
        ("3", r"\boxed{3\sqrt{13}}", "wrong"),
        ("1,234", r"\boxed{1, 234}", "wrong"),
        ("18", r"\boxed{\text{nothing}}", "wrong"),
        ("18", "the answer is 81", "wrong"),
        ("4", "\\boxed{" + "4" * 3000 + "}", "wrong"),
        ("4", r"\boxed{4", "no_answer"),
        ("4", r"4 \boxed{ }", "no_answer"),
        ("4", "", "no_answer"),
        ("4", "I cannot say, it is 3 or 4", "no_answer"),
        ("4", "2+2=4\n4+4", "no_answer"),
        ("4", "the answer is unknown", "no_answer"),
        ("", r"\boxed{4}", "bad_gold"),
        ("$$", r"\boxed{4}", "bad_gold"),
        ("}{", r"\boxed{4}", "bad_gold"),
        ("1+" * 2000 + "1", r"\boxed{4}", "bad_gold"),
    ],
)
def test_other_verdicts(grader: MathGrader, gold: str, response: str, expected: str) -> None:
    assert status(grader, gold, response) == expected


def test_first_last_and_open_box_are_three_readings(grader: MathGrader) -> None:
    both = grader.grade("0.5", r"\boxed{7}, or rather \boxed{\frac12} and \boxed{3")
    assert both.status == "no_answer"
    assert both.details == {"last_box": True, "first_box": False, "open_box": True}
    first = grader.grade("0.5", r"\boxed{\frac12}, or rather \boxed{7}")
    assert first.status == "wrong"
    assert first.details == {"last_box": False, "first_box": True, "open_box": False}
    unboxed = grader.grade("18", "The answer is 18.")
    assert unboxed.correct
    assert unboxed.details == {"last_box": False, "first_box": False, "open_box": False}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so the answer is $18$.\nBye", "18"),
        ("**Final Answer:** 18 apples", "18"),
        ("Answer: 18", "18"),
        ("thus\n#### 18 dollars", "18"),
        ("18", "18"),
        (r"\boxed{18.}", "18"),
        ("I cannot say, it is 17 or 18", None),
    ],
)
def test_every_answer_that_is_read_can_be_voted_for(grader: MathGrader, response: str, answer: str | None) -> None:
    verdict = grader.grade("18", response)
    assert (verdict.correct, verdict.answer) == (answer is not None, answer)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("\\boxed{}$#answer is:0123456789+-^_/()[]% \n\ud800é"), max_size=60))
def test_any_text_gets_a_verdict(grader: MathGrader, text: str) -> None:
    verdict = grader.grade("1234567", text)
    assert verdict.status in {"correct", "wrong", "no_answer", "timeout"}
    assert set(verdict.details) == {"last_box", "first_box", "open_box"}


# --- benchmarks -------------------------------------------------------------------------------------------------------


def math500() -> list[dict[str, str]]:
    return [json.loads(line) for line in real_data("math/math500.jsonl").read_text().splitlines()]


def test_all_reference_solutions_of_math_500_are_accepted(grader: MathGrader) -> None:
    rows = math500()
    assert sum(status(grader, row["answer"], row["solution"]) == "correct" for row in rows) == 500


def test_the_way_without_a_worker_agrees_with_math_verify() -> None:
    """Equal strings and integers are decided without a worker: here the worker decides the same pairs."""
    integers = ["7", "-7", "+7", "07", "1,234", "1{,}234", r"1,\!234", "1234", "1235", r"\$1,234", "0", "-0"]
    pairs = [(row["answer"], row["answer"]) for row in math500()]
    pairs += [(gold, answer) for gold in integers for answer in integers]
    pool, slow = WorkerPool(1, 2**30), []
    for gold, answer in pairs:
        slow += pool.ask([Request(gold, answer)], 20)
    pool.close()
    without = MathGrader()
    without.close()  # from here on it raises where it needs a worker
    assert [status(without, gold, rf"\boxed{{{answer}}}") for gold, answer in pairs] == slow
    assert slow[:500] == ["correct"] * 500


def test_wrong_pairs_are_refused(grader: MathGrader) -> None:
    """The solution of one MATH-500 problem is not the answer of another: 1,400 pairs, at most one accepted."""
    rows, draw = math500(), random.Random(3)
    pairs = [(a["answer"], b["solution"]) for a, b in (draw.sample(rows, 2) for _ in range(1600))]
    answers = {row["solution"]: row["answer"] for row in rows}
    wrong = [(gold, solution) for gold, solution in pairs if gold != answers[solution]][:1400]
    found = [status(grader, gold, solution) for gold, solution in wrong]
    assert len(found) == 1400
    assert set(found) <= {"correct", "wrong"}
    assert found.count("correct") <= 1


# --- deadline, threads, processes -------------------------------------------------------------------------------------


def test_pathological_answers_end_within_the_deadline() -> None:
    deadline, slack = 1.5, 4.0  # the slack is for a loaded machine; each of these runs for minutes or for ever

    def timed(response: str) -> tuple[str, float]:
        start = time.monotonic()
        return grader.grade("4", response).status, time.monotonic() - start

    with MathGrader(workers=6, deadline=deadline) as grader, ThreadPoolExecutor(6) as threads:
        assert all(
            threads.map(lambda n: grader.grade(f"{n}.5", rf"\boxed{{\frac{{{2 * n + 1}}}{{2}}}}").correct, range(6))
        )
        found = dict(zip(PATHOLOGICAL, threads.map(timed, PATHOLOGICAL.values()), strict=True))
        assert {name: took for name, (_, took) in found.items() if took > deadline + slack} == {}
        assert {name: what for name, (what, _) in found.items() if what == "correct"} == {}
        assert found["factorial"][0] == "timeout"
        assert status(grader, "0.5", r"\boxed{\frac12}") == "correct"


def test_a_hanging_first_box_does_not_hide_the_last() -> None:
    with MathGrader(workers=1, deadline=1) as grader:
        verdict = grader.grade("0.5", HANG + r" no, \boxed{\frac12}")
    assert verdict.status == "correct"
    assert verdict.details == {"last_box": True, "first_box": False, "open_box": False}


def test_many_threads_share_few_workers(grader: MathGrader) -> None:
    def mine(number: int) -> bool:
        assert threading.current_thread() is not threading.main_thread()
        return (
            grader.grade(f"{number}", rf"\boxed{{\frac{{{2 * number}}}{{2}}}}").correct
            and not grader.grade(f"{number}", rf"\boxed{{\frac{{{2 * number + 1}}}{{2}}}}").correct
        )

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(mine, range(1, 60)))


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, without those that are dead already."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def workers(pid: int) -> list[int]:
    """The worker processes of an owner; each has one fork that compares."""
    return [child for child in children(pid) if b"math_worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def eventually(check: object, seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


@linux
def test_dead_workers_and_their_dead_forks_are_replaced() -> None:
    before = set(workers(os.getpid()))

    def own() -> set[int]:
        return set(workers(os.getpid())) - before

    with MathGrader(workers=1, deadline=20) as grader, ThreadPoolExecutor(1) as thread:
        assert status(grader, "0.5", r"\boxed{\frac12}") == "correct"
        (worker,) = own()
        assert "torch" not in Path(f"/proc/{worker}/maps").read_text()
        (idle,) = children(worker)
        os.kill(idle, signal.SIGKILL)
        assert eventually(lambda: len(children(worker)) == 1 and children(worker) != [idle])
        assert status(grader, "0.5", r"\boxed{\frac12}") == "correct"
        (fork,) = children(worker)
        busy = thread.submit(grader.grade, "4", HANG)
        assert eventually(lambda: "R" in Path(f"/proc/{fork}/stat").read_text().rpartition(")")[2].split()[0])
        os.kill(fork, signal.SIGKILL)
        assert busy.result().status == "error"
        assert status(grader, "0.5", r"\boxed{\frac12}") == "correct"
        (fork,) = children(worker)
        os.kill(worker, signal.SIGKILL)
        assert eventually(lambda: not Path(f"/proc/{fork}").exists())
        assert status(grader, "0.5", r"\boxed{\frac12}") == "correct"
        assert len(own() - {worker}) == 1
    assert set(workers(os.getpid())) == before
    with pytest.raises(HeadstartError, match="closed"):
        grader.grade("0.5", r"\boxed{\frac12}")


OWNER = f"""
import threading
from headstart.tasks.grading.math import MathGrader
grader = MathGrader(workers=2, deadline=600)
print(grader.grade("0.5", r"\\boxed{{\\frac12}}").status, flush=True)
threading.Thread(target=grader.grade, args=("4", r"{HANG}"), daemon=True).start()
input()
"""


@linux
@pytest.mark.parametrize("end", ["kill", "exit"])
def test_no_orphans(end: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdin is not None
    assert owner.stdout is not None
    assert owner.stdout.readline().strip() == "correct"
    (worker,) = workers(owner.pid)
    forks = children(worker)
    assert forks
    if end == "kill":
        owner.kill()
        owner.communicate()
    else:
        owner.communicate("\n")
        assert owner.returncode == 0
    for pid in (worker, *forks):
        assert eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists()), f"process {pid} outlives its owner"


def test_the_version_names_what_decides() -> None:
    assert shared_grader() is shared_grader()
    assert "math-verify 0.9" in shared_grader().version
    assert "sympy" in shared_grader().version
