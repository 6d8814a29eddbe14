r"""Is a response's final answer mathematically equal to the reference? math-verify, where it can do no harm.

How the answer is found, the first rule that applies:

1. the last complete `\boxed{...}` (an empty one is no answer);
2. a box that was opened and never closed is a truncated response: no answer, whatever else it says;
3. the rest of the line after the last `####`;
4. what follows the last "answer is", "answer:" or the like, within 200 characters;
5. the whole response, if it is one line without words.

Anything else is no answer: the last number of an unfinished calculation is not taken for one.

Gold may be bare, in dollars, boxed, or end in `#### 42`. Both sides are normalised lightly: white space collapsed,
dollar signs and one full stop at the end dropped. Then, without math-verify: equal strings are correct, and two
integers (thousands commas allowed) are compared as integers. Everything else goes to a worker process. On all 5,000
MATH test answers against themselves both ways agree.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, Self

from headstart.errors import ConfigError
from headstart.records import Verdict
from headstart.tasks.grading.math_pool import Request, WorkerPool
from headstart.tasks.grading.text import find_boxes

LONGEST = 2000
"""Longest answer (characters) that is compared at all; the longest of the MATH test set has 81."""

_DOLLAR = re.compile(r"(?<!\\)\$")
_FULL_STOP = re.compile(r"(?<!\.)\.$")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")  # three letters or more that are not a LaTeX command
_ANSWER = re.compile(r"\banswer\b[^.\n]{0,60}?(?:\bis\b|[:=])", re.IGNORECASE)
_INTEGER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})")


class _Answer(NamedTuple):
    text: str
    prose: bool = False  # a sentence that math-verify has to search
    said: str = ""  # of a sentence, what follows "the answer is"


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
            raise ConfigError("math answers are graded with math-verify: pip install math-verify==0.9.0") from error
        self.deadline = deadline
        self._pool = WorkerPool(workers, int(memory * 2**30))

    def grade(self, gold: str, response: str) -> Verdict:
        """Judge one response; hostile text costs at most the deadline.

        Status: `correct`, `wrong`, `no_answer`, `bad_gold` (gold is empty, longer than LONGEST, or holds nothing to
        compare with), `timeout`, or `error` (the worker died, for instance at its memory limit). Details, all false
        where there is no such thing: `last_box` and `first_box`, the last and the first complete box are right;
        `open_box`, a box was opened and never closed.
        """
        boxes = find_boxes(response)
        expected = _gold(gold)
        answer = _find_answer(response, boxes.complete, boxes.open)
        if not 0 < len(expected) <= LONGEST:
            return _verdict("bad_gold", open_box=boxes.open)
        if not answer.text:
            return _verdict("no_answer", open_box=boxes.open)
        candidates = [answer, *(_Answer(_clean(box)) for box in boxes.complete[:1])]
        statuses = self._compare(expected, candidates)
        return _verdict(
            statuses[0],
            answer.said or answer.text,
            last_box=bool(boxes.complete) and statuses[0] == "correct",
            first_box=bool(boxes.complete) and statuses[-1] == "correct",
            open_box=boxes.open,
        )

    def close(self) -> None:
        """End the processes. The grader cannot be used afterwards."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compare(self, gold: str, answers: list[_Answer]) -> list[str]:
        """One status per answer. After a timeout or an error the remaining ones count as wrong."""
        known = {answer: _without_worker(gold, answer) for answer in answers}
        open_questions = [answer for answer, status in known.items() if status is None]
        if open_questions:
            requests = [Request(gold, answer.text, answer.prose) for answer in open_questions]
            known |= dict(zip(open_questions, self._pool.ask(requests, self.deadline), strict=False))
        return [known[answer] or "wrong" for answer in answers]


@functools.cache
def shared_grader() -> MathGrader:
    """The grader that all math tasks of this process share, so that its processes are started once."""
    return MathGrader()


def _without_worker(gold: str, answer: _Answer) -> str | None:
    if answer.prose:
        return None
    if gold == answer.text:
        return "correct"
    if not 0 < len(answer.text) <= LONGEST:
        return "wrong"
    left, right = _integer(gold), _integer(answer.text)
    if left is None or right is None:
        return None
    return "correct" if left == right else "wrong"


def _find_answer(response: str, boxes: tuple[str, ...], open_box: bool) -> _Answer:
    if boxes:
        return _Answer(_clean(boxes[-1]))
    if open_box:
        return _Answer("")
    _, mark, rest = response.rpartition("####")
    if mark:
        return _line(rest.strip().partition("\n")[0][:LONGEST])
    if found := deque(_ANSWER.finditer(response), maxlen=1):
        sentence = response[found[0].start() : found[0].end() + 200]
        said = sentence[len(found[0][0]) :].lstrip(" \t:=*").partition("\n")[0]
        return _Answer(sentence, prose=True, said=_clean(said))
    line = response.strip()
    return _Answer("") if "\n" in line or len(line) > LONGEST or _WORD.search(line) else _line(line)


def _line(text: str) -> _Answer:
    return _Answer(text, prose=True) if _WORD.search(text) else _Answer(_clean(text))


def _gold(gold: str) -> str:
    boxes = find_boxes(gold).complete
    return _clean(boxes[-1] if boxes else gold.rpartition("####")[2])


def _clean(text: str) -> str:
    # A backslash at the end (of "\ ") would escape the dollar that closes the formula.
    text = _DOLLAR.sub("", " ".join(text.split())).rstrip("\\ ")
    return _FULL_STOP.sub("", text).strip()


def _integer(text: str) -> int | None:
    for written, plain in (("\\!", ""), ("{,}", ","), ("\\$", "")):
        text = text.replace(written, plain)
    return int(text.replace(",", "")) if _INTEGER.fullmatch(text) else None


def _verdict(
    status: str, answer: str | None = None, *, last_box: bool = False, first_box: bool = False, open_box: bool
) -> Verdict:
    details = {"last_box": last_box, "first_box": first_box, "open_box": open_box}
    return Verdict(status == "correct", status, details, answer)
