"""Three procedures: a synthetic world in which a short plan decides a long execution. No torch, no data files.

A problem shows three procedures of three operations each, three cue words, a start digit and a number of rounds:

    A1+2 A2x7 A3+1 B1x3 B2+5 B3+7 C1+1 C2x3 C3+2 ? moss reed tide 4 n7

Each cue names a procedure; which one is knowledge that only training gives. The response writes the plan, then carries
it out one operation at a time, modulo 10, once for every round, and ends with the digit it arrived at:

    plan first we use A , then we use B , and last we use C . 4
    n7 A1+2 6 A2x7 2 A3+1 3 B1x3 9 ... n6 A1+2 ... ans 8

The plan is 18 tokens (decisions at 4, 9 and 15, counted from 0), a round 19, so a response is 154 or 192 tokens with
its stop token. There is exactly one right response to every problem. Rounds are 7 or 9, never 8: modulo 10, eight
rounds of a plan that multiplies (by 3, 7 or 9 in all) lead back to the start digit, so that two wrong plans of three
would end on the right digit; with 7 and 9 one in ten does.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import contains
from random import Random
from typing import ClassVar, TypeVar

from headstart.errors import ConfigError, DataError
from headstart.records import PrefixState, Problem, Verdict

SPLITS = ("train", "dev", "test")
PROCEDURES = ("A", "B", "C")
SLOTS = tuple(f"{procedure}{place}" for procedure in PROCEDURES for place in (1, 2, 3))
OPERATIONS = ("+1", "+2", "+5", "+7", "x3", "x7")
DIGITS = tuple("0123456789")
ROUNDS = (7, 9)

CUES = ("moss", "flint", "ember", "reed", "dusk", "slate", "fern", "tide", "amber")
MEANING = {cue: PROCEDURES[place // 3] for place, cue in enumerate(CUES)}
MISTAKEN = {cue: PROCEDURES[(place // 3 + 1) % 3] for place, cue in enumerate(CUES)}
"""The one procedure a cue is taken for when it is misread."""
STUDENT_KNOWS = dict(zip(CUES, (0.97, 0.40, 0.95, 0.30, 0.95, 0.90, 0.90, 0.97, 0.30), strict=True))
"""How often a cue is read rightly in the student's corpus; three are below one half: greedy decoding cannot help."""

PLAN = "plan first we use {} , then we use {} , and last we use {} ."
DECISIONS = (4, 9, 15)
"""Token positions of the three plan decisions in a response, counted from 0."""

PAD, EOS, UNKNOWN, USER, ASSISTANT = SPECIAL = ("<pad>", "<eos>", "<unk>", "<user>", "<asst>")
VOCABULARY = (
    *SPECIAL,
    *("plan", "first", "we", "use", ",", "then", "and", "last", ".", "ans", "?"),
    *PROCEDURES,
    *DIGITS,
    *CUES,
    *(f"n{rounds}" for rounds in range(1, 10)),
    *(slot + operation for slot in SLOTS for operation in OPERATIONS),
)
"""Every token of the world, in id order."""


@dataclass(frozen=True, slots=True)
class World(ABC):
    """A problem of a synthetic world: nine operations (A1..C3), cues, one right plan and one right response."""

    meaning: ClassVar[Mapping[str, str]]
    mistaken: ClassVar[Mapping[str, str]]
    student_knows: ClassVar[Mapping[str, float]]
    operations: tuple[str, ...]
    cues: tuple[str, ...]

    @property
    @abstractmethod
    def text(self) -> str:
        """The user's message."""

    @property
    @abstractmethod
    def decisions(self) -> tuple[int, ...]:
        """Token positions of the decisions in a response, counted from 0."""

    @property
    @abstractmethod
    def options(self) -> tuple[tuple[str, ...], ...]:
        """The words to choose from at each decision."""

    @abstractmethod
    def response(self, plan: Sequence[str]) -> list[str]:
        """The words of a response that carries out `plan` without a slip, stop token excluded."""

    @property
    def plan(self) -> tuple[str, ...]:
        """The right decisions."""
        return tuple(self.meaning[cue] for cue in self.cues)

    @property
    def contexts(self) -> Mapping[str, str]:
        """What a teacher may be shown beside the problem, by name."""
        return {}

    @property
    def answer(self) -> str:
        """The last digit of the right response."""
        return self.response(self.plan)[-1]

    def student_plan(self, rng: Random) -> tuple[str, ...]:
        """A plan as in the student's training corpus: each cue is read rightly as often as `STUDENT_KNOWS` says."""
        return tuple(
            (self.meaning if rng.random() < self.student_knows[cue] else self.mistaken)[cue] for cue in self.cues
        )


W = TypeVar("W", bound=World)


@dataclass(frozen=True, slots=True)
class Puzzle(World):
    """Nine operations, three cues, a start digit and a number of rounds."""

    meaning, mistaken, student_knows = MEANING, MISTAKEN, STUDENT_KNOWS
    start: int
    rounds: int

    @property
    def text(self) -> str:
        """The user's message, 15 words."""
        return " ".join((*slots(self.operations), "?", *self.cues, str(self.start), f"n{self.rounds}"))

    @property
    def decisions(self) -> tuple[int, ...]:
        return DECISIONS

    @property
    def options(self) -> tuple[tuple[str, ...], ...]:
        return (PROCEDURES,) * len(DECISIONS)

    @property
    def contexts(self) -> Mapping[str, str]:
        return {"plan": PLAN.format(*self.plan)}

    def response(self, plan: Sequence[str]) -> list[str]:
        """The words of a response that carries out `plan` without a slip, stop token excluded (153 or 191 words)."""
        words = [*PLAN.format(*plan).split(), str(self.start)]
        words += carry_out(plan, self.operations, self.rounds, self.start)
        return [*words, "ans", words[-1]]


def puzzle(split: str, index: int) -> Puzzle:
    """Puzzle number `index` of `split`: the same on every machine and for ever, and in no other split.

    The split is a property of the puzzle (its hash, rounds left out, see `split_of`), so candidates are drawn until
    one belongs. All draws come from SHA-256, which unlike a random module's helpers never changes.
    """
    return drawn("three procedures", split, index, _puzzle, split_of)


def split_of(candidate: Puzzle) -> str:
    """The split a puzzle belongs to: an eighth of all is dev, an eighth test. Rounds play no part, so a training text
    with fewer rounds never shows a puzzle of another split."""
    return split_by(replace(candidate, rounds=0).text)


def parse(text: str) -> Puzzle:
    """The puzzle a user's message shows. Raises DataError when it is not one of this world."""
    words = text.split()
    if len(words) == 15 and words[9] == "?":
        shown = Puzzle(
            operations=tuple(word[2:] for word in words[:9]),
            cues=tuple(words[10:13]),
            start=DIGITS.index(words[13]) if words[13] in DIGITS else -1,
            rounds=DIGITS.index(words[14][1:]) if words[14][1:] in DIGITS else 0,
        )
        known = set(shown.operations) <= set(OPERATIONS) and set(shown.cues) <= set(CUES) and shown.rounds > 0
        if known and shown.text.split() == words:
            return shown
    raise DataError(f"not a problem of the tiny world: {text!r}. Use problems made by headstart.tasks.tiny.TinyTask.")


class TinyTask:
    """The first `size` problems of a split (`train`, `dev` or `test`). Fits `headstart.interfaces.Task`.

    Another world has its own `made` and `parsed`. Raises ConfigError for another split or a size below one.
    """

    name = "tiny"
    max_tokens = 200
    """A right response has 154 or 192."""
    made: ClassVar[staticmethod[[str, int], World]] = staticmethod(puzzle)
    parsed: ClassVar[staticmethod[[str], World]] = staticmethod(parse)

    def __init__(self, split: str, size: int) -> None:
        if split not in SPLITS:
            raise ConfigError(f"{self.name} world: split is {split!r}; choose one of {', '.join(SPLITS)}")
        if size < 1:
            raise ConfigError(f"{self.name} world: size is {size}; ask for at least one problem")
        self.split = split
        self.size = size

    def problems(self) -> Sequence[Problem]:
        """The problems in index order; growing `size` keeps the earlier ones."""
        return tuple(self._problem(index) for index in range(self.size))

    def grade(self, problem: Problem, response: str) -> Verdict:
        """Compare the digit after the first `ans` with the answer.

        Details: `plan_right`, all decisions name the right procedures; `faithful`, every word (the answer
        included) follows from the plan the response itself wrote, right or wrong.
        """
        shown = self.shown(problem)
        words = response.split()
        plan = tuple(words[place] for place in shown.decisions if place < len(words))
        whole = len(plan) == len(shown.plan) and all(map(contains, shown.options, plan))
        details = {"plan_right": plan == shown.plan, "faithful": whole and words == shown.response(plan)}
        answer = _answer(words)
        if answer is None:
            return Verdict(False, "no_answer", details)
        correct = answer == shown.answer
        return Verdict(correct, "correct" if correct else "wrong", details)

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        """`finished` once a digit follows `ans`; `wrong` once a word departs from the one right response (a plan
        decision, a copied operation or a running value); `clean` before that."""
        words = prefix.split()
        if _answer(words) is not None:
            return "finished"
        shown = self.shown(problem)
        right = shown.response(shown.plan)
        return "clean" if words == right[: len(words)] else "wrong"

    def shown(self, problem: Problem) -> World:
        """What a problem's message says. Raises DataError when it is not one of this world."""
        return self.parsed(problem.messages[-1]["content"] if problem.messages else problem.text or "")

    def _problem(self, index: int) -> Problem:
        made = self.made(self.split, index)
        response = made.response(made.plan)
        return Problem(
            id=f"{self.name}/{self.split}/{index}",
            messages=({"role": "user", "content": made.text},),
            answer=response[-1],
            completion=" ".join(response),
            meta=made.contexts,
        )


def slots(operations: Sequence[str]) -> tuple[str, ...]:
    """The nine words of the procedures, A1 to C3."""
    return tuple(slot + operation for slot, operation in zip(SLOTS, operations, strict=True))


def carry_out(plan: Iterable[str], operations: Sequence[str], rounds: int, value: int) -> list[str]:
    """The words of `rounds` rounds of a plan's procedures from the digit `value` on; the last is where they arrive."""
    by_slot = dict(zip(SLOTS, operations, strict=True))
    steps = [(procedure + place, by_slot[procedure + place]) for procedure in plan for place in "123"]
    words = []
    for remaining in range(rounds, 0, -1):
        words.append(f"n{remaining}")
        for slot, operation in steps:
            value = _apply(operation, value)
            words += (slot + operation, str(value))
    return words


def drawn(world: str, split: str, index: int, make: Callable[[Callable[[int], int]], W], home: Callable[[W], str]) -> W:
    """Puzzle number `index` of `split` of a world: the first of its candidates whose `home` is that split.

    `make` gets the function that draws a number below a given one. All draws come from SHA-256, which unlike a random
    module's helpers never changes.
    """
    attempt = 0
    while True:
        candidate = make(_draws(f"{world}/{split}/{index}/{attempt}"))
        if home(candidate) == split:
            return candidate
        attempt += 1


def split_by(text: str) -> str:
    """A split for every text: an eighth of all is dev, an eighth test."""
    return {0: "dev", 1: "test"}.get(_hash(text) % 8, "train")


def _answer(words: Sequence[str]) -> str | None:
    """The digit after the first `ans`, or None."""
    for word, following in zip(words, words[1:], strict=False):
        if word == "ans":
            return following if following in DIGITS else None
    return None


def _apply(operation: str, value: int) -> int:
    amount = int(operation[1])
    return (value + amount if operation[0] == "+" else value * amount) % 10


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def _draws(text: str) -> Callable[[int], int]:
    """Draws numbers below those given: the mixed-radix digits of the text's 256-bit hash."""
    number = _hash(text)

    def draw(choices: int) -> int:
        nonlocal number
        number, choice = divmod(number, choices)
        return choice

    return draw


def _puzzle(draw: Callable[[int], int]) -> Puzzle:
    return Puzzle(
        operations=tuple(OPERATIONS[draw(len(OPERATIONS))] for _ in SLOTS),
        cues=tuple(CUES[draw(len(CUES))] for _ in range(3)),
        start=draw(10),
        rounds=ROUNDS[draw(len(ROUNDS))],
    )
