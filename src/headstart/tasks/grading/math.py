r"""Is a response's final answer mathematically equal to the reference? math-verify, where it can do no harm.

`answers` says where the answer stands, `notation` how it is written. Gold may be bare, in dollars, boxed, or end in
`#### 42`. Equal texts are correct without math-verify, and two integers are compared as integers. Everything else goes
to a worker process. On all 5,000 MATH test answers against themselves both ways agree.
"""

from __future__ import annotations

import functools
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Self

from headstart.errors import ConfigError, install_command
from headstart.records import Verdict
from headstart.tasks.grading.answers import gold_answer, read
from headstart.tasks.grading.math_pool import Request, WorkerPool
from headstart.tasks.grading.notation import LONGEST, canonical, whole_number, without_unit

_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")  # of a word or a variable, not of a LaTeX command


class MathGrader:
    """Grades answers with math-verify in at most `workers` processes, each answer within `deadline` seconds.

    Thread-safe, and usable from any thread. Processes start with the first answer that needs one (about a second)
    and end with `close`, with the `with` block, or with this process. `memory` is the address space of a worker in
    GiB. Raises ConfigError when math-verify is not installed.
    """

    def __init__(self, *, workers: int = 2, deadline: float = 5.0, memory: float = 1.0) -> None:
        try:
            versions = (f"{name} {version(name)}" for name in ("math-verify", "latex2sympy2-extended", "sympy"))
            self.version = ", ".join(versions)
        except PackageNotFoundError as error:
            why = "math answers are graded with math-verify"
            raise ConfigError(why, install_command("math-verify==0.9.0")) from error
        self.deadline = deadline
        self._pool = WorkerPool(workers, int(memory * 2**30))

    def grade(self, gold: str, response: str) -> Verdict:
        """Judge one response; hostile text costs at most the deadline.

        Status: `correct`, `wrong`, `no_answer`, `bad_gold` (gold is empty, longer than LONGEST, or holds nothing to
        compare with), `timeout`, or `error` (the worker died, for instance at its memory limit). Details, all false
        where there is no such thing: `last_box` and `first_box`, the last and the first complete box are right;
        `open_box`, a box was opened and never closed.
        """
        reading, expected = read(response), gold_answer(gold)
        if not 0 < len(expected) <= LONGEST:
            return _verdict("bad_gold", open_box=reading.open_box)
        ends = reading.boxes or ("", "")
        answers = [reading.answer or "", ends[-1], ends[0]]
        if not _LETTER.search(expected):
            answers = [without_unit(answer) for answer in answers]
        status, last, first = self._compare(expected, answers)
        return _verdict(
            status if answers[0] else "no_answer",
            canonical(answers[0]) or None,
            last_box=last == "correct",
            first_box=first == "correct",
            open_box=reading.open_box,
        )

    def close(self) -> None:
        """End the processes. The grader cannot be used afterwards."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compare(self, gold: str, answers: list[str]) -> list[str]:
        """One status per answer. After a timeout or an error the remaining ones count as wrong."""
        known = {answer: _without_worker(gold, answer) for answer in answers}
        open_questions = [answer for answer, status in known.items() if status is None]
        if open_questions:
            requests = [Request(gold, answer) for answer in open_questions]
            known |= dict(zip(open_questions, self._pool.ask(requests, self.deadline), strict=False))
        return [known[answer] or "wrong" for answer in answers]


@functools.cache
def shared_grader() -> MathGrader:
    """The grader that all math tasks of this process share, so that its processes are started once."""
    return MathGrader()


def _without_worker(gold: str, answer: str) -> str | None:
    if gold == answer or canonical(gold) == canonical(answer):
        return "correct"
    if not 0 < len(answer) <= LONGEST:
        return "wrong"
    numbers = whole_number(gold), whole_number(answer)
    return "wrong" if all(number is not None and number == number.to_integral() for number in numbers) else None


def _verdict(
    status: str, answer: str | None = None, *, last_box: bool = False, first_box: bool = False, open_box: bool
) -> Verdict:
    details = {"last_box": last_box, "first_box": first_box, "open_box": open_box}
    return Verdict(status == "correct", status, details, answer)
