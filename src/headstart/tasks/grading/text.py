r"""Graders of plain text: exact, last number, last box. Pure, linear in the text's length, and they never raise.

Status is `correct`, `wrong` or `no_answer`. They compute nothing: `0.5` and `\frac{1}{2}` differ for them. Answers are
read as in `answers` and written as in `notation`.
"""

from __future__ import annotations

import re
from decimal import Decimal

from headstart.records import Verdict
from headstart.tasks.grading.answers import gold_answer, read
from headstart.tasks.grading.notation import LONGEST, canonical, last_number, plain, without_unit
from headstart.tasks.grading.thinking import answer_part

_NOT_ONE = re.compile(r"[<>;]|, |,(?![0-9]{3})|\\(?:[lg]eq?|[lg]t|neq?|pm)(?![A-Za-z])")  # a bound, or several values


def grade_exact(response: str, gold: str) -> Verdict:
    """Compare the response without thinking blocks with the gold answer, both stripped."""
    answer = answer_part(response).strip()
    return _verdict(answer == gold.strip(), answer) if answer else Verdict(correct=False, status="no_answer")


def grade_number(response: str, gold: str) -> Verdict:
    """Compare the number of the response's answer, else its last number, with the gold number, as decimals.

    `18.0` is `18`; currencies, units and separators of thousands are dropped. Gold may end in GSM8K's `#### 42`.
    """
    stated, expected = read(response).answer, gold_number(gold)
    answer = _last_number(answer_part(response)) if stated is None else _only_number(stated)
    if answer is None:
        return Verdict(correct=False, status="no_answer")
    return _verdict(answer == expected, canonical(f"{answer:f}"))


def grade_boxed(response: str, gold: str) -> Verdict:
    r"""Compare the last complete `\boxed{...}` with the gold answer, in one notation (`notation.canonical`).

    Gold may be bare, boxed itself, or end in `#### 42`. Details: `first_box` says whether the *first* complete box is
    right, `open_box` whether a box was opened and never closed. When that was the last one, the response was cut and
    has no answer.
    """
    reading, expected = read(response), canonical(gold_answer(gold))
    first = bool(reading.boxes) and canonical(reading.boxes[0]) == expected
    details = {"first_box": first, "open_box": reading.open_box}
    if not reading.boxes or not reading.answer:
        return Verdict(correct=False, status="no_answer", details=details)
    answer = canonical(reading.answer)
    return _verdict(answer == expected, answer, details)


def gold_number(gold: str) -> Decimal | None:
    """The last number of a gold answer (of its last box, or what follows its last `####`), None without one."""
    return last_number(without_unit(gold_answer(gold)))


def _last_number(text: str) -> Decimal | None:
    end = max(text.rfind(digit) for digit in "0123456789") + 1
    return last_number(plain(text[max(0, end - LONGEST) : end]))


def _only_number(answer: str) -> Decimal | None:
    return None if _NOT_ONE.search(answer) else last_number(without_unit(answer))


def _verdict(correct: bool, answer: str, details: dict[str, bool] | None = None) -> Verdict:
    return Verdict(correct, "correct" if correct else "wrong", details or {}, answer)
