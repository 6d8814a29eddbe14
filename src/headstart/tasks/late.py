"""A second synthetic world: long responses whose decisions come late, and a teacher that one error misleads for good.

A problem shows the three procedures of `headstart.tasks.tiny`, then five legs, each a cue and a number of rounds:

    A1+2 A2x7 ... C3+2 ? L1 oak n3 L2 salt n7 L3 glow n3 L4 wren n5 L5 jade n3 4

The response walks leg by leg: it names the leg, says which procedure its cue stands for, and carries out that one
procedure, modulo 10, once for every round:

    4 L1 oak=A n3 A1+2 6 A2x7 2 A3+1 3 n2 A1+2 ... L2 salt=A n7 A1+2 ... ans 8

Every leg has its own three cues, so what one decision teaches helps none of the others. The first decision is token 2;
the others wait for the rounds before them: the second is token 25, 39 or 53, the fifth token 94 to 206, by problem. A
response has 119 to 259 tokens, 189 in the mean. Rounds are odd: modulo 10, an even number of rounds of a procedure that
multiplies often leads back to where it began, and then the decision would not matter.

Off its own path the teacher is confidently wrong: after the first wrong decision it takes every later cue for the
procedure the cue is mistaken for (`misled`), as the student does, and carries that out. There is no recovery: each
operation maps the ten digits one to one, so a running value that is off stays off while the later legs are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from headstart.errors import DataError
from headstart.tasks import tiny
from headstart.tasks.tiny import DIGITS, OPERATIONS, PROCEDURES, SLOTS

LEGS = ("L1", "L2", "L3", "L4", "L5")
ROUNDS = (3, 5, 7)
CUES = (
    *("oak", "elm", "fir"),
    *("salt", "clay", "iron"),
    *("glow", "mist", "rain"),
    *("wren", "lark", "kite"),
    *("jade", "opal", "onyx"),
)
"""Three a leg; the first of the three means A, the second B, the third C."""
MEANING = {cue: f"{cue}={PROCEDURES[place % 3]}" for place, cue in enumerate(CUES)}
"""What a response says when it reads the cue rightly."""
MISTAKEN = {cue: f"{cue}={PROCEDURES[(place + 1) % 3]}" for place, cue in enumerate(CUES)}
"""The same when the cue is misread, which only ever happens in this one way."""
STUDENT_KNOWS = dict(
    zip(CUES, (0.95, 0.4, 0.9, 0.95, 0.9, 0.3, 0.3, 0.95, 0.9, 0.9, 0.4, 0.95, 0.95, 0.9, 0.3), strict=True)
)
"""How often a cue is read rightly in the student's corpus; one a leg below one half: greedy decoding cannot help."""

VOCABULARY = (
    *tiny.SPECIAL,
    *("ans", "?"),
    *DIGITS,
    *LEGS,
    *CUES,
    *(f"{cue}={procedure}" for cue in CUES for procedure in PROCEDURES),
    *(f"n{rounds}" for rounds in range(1, 8)),
    *(slot + operation for slot in SLOTS for operation in OPERATIONS),
)
"""Every token of the world, in id order."""


@dataclass(frozen=True, slots=True)
class Puzzle(tiny.World):
    """Nine operations, a cue and a number of rounds for each leg, and a start digit."""

    meaning, mistaken, student_knows = MEANING, MISTAKEN, STUDENT_KNOWS
    rounds: tuple[int, ...]
    start: int

    @property
    def text(self) -> str:
        """The user's message, 26 words."""
        legs = (f"{leg} {cue} n{rounds}" for leg, cue, rounds in zip(LEGS, self.cues, self.rounds, strict=True))
        return " ".join((*tiny.slots(self.operations), "?", *legs, str(self.start)))

    @property
    def decisions(self) -> tuple[int, ...]:
        """A leg has its name, its decision and 7 tokens a round; the start digit stands before the first."""
        return tuple(2 + 2 * leg + 7 * sum(self.rounds[:leg]) for leg in range(len(LEGS)))

    @property
    def options(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(f"{cue}={procedure}" for procedure in PROCEDURES) for cue in self.cues)

    def response(self, plan: Sequence[str]) -> list[str]:
        """The words of a response that carries out `plan` without a slip, stop token excluded (118 to 258 words)."""
        words = [str(self.start)]
        value = self.start
        for leg, reading, rounds in zip(LEGS, plan, self.rounds, strict=True):
            words += (leg, reading, *tiny.carry_out(reading[-1], self.operations, rounds, value))
            value = int(words[-1])
        return [*words, "ans", str(value)]

    def misled(self, written: Sequence[str]) -> tuple[str, ...]:
        """What the teacher says at each decision, given those written before it: right, until one of them is wrong."""
        wrong = [reading != right for reading, right in zip(written, self.plan, strict=True)]
        return tuple((MISTAKEN if any(wrong[:place]) else MEANING)[cue] for place, cue in enumerate(self.cues))


def puzzle(split: str, index: int) -> Puzzle:
    """Puzzle number `index` of `split`: the same on every machine and for ever, and in no other split."""
    return tiny.drawn("late decisions", split, index, _puzzle, split_of)


def split_of(candidate: Puzzle) -> str:
    """The split a puzzle belongs to; rounds play no part."""
    return tiny.split_by(replace(candidate, rounds=(0,) * len(LEGS)).text)


def parse(text: str) -> Puzzle:
    """The puzzle a user's message shows. Raises DataError when it is not one of this world."""
    words = text.split()
    if len(words) == 26:
        rounds = tuple(DIGITS.index(word[1:]) if word[1:] in DIGITS else 0 for word in words[12:25:3])
        start = DIGITS.index(words[25]) if words[25] in DIGITS else -1
        shown = Puzzle(tuple(word[2:] for word in words[:9]), tuple(words[11:25:3]), rounds, start)
        own = all(cue in CUES[3 * leg : 3 * leg + 3] for leg, cue in enumerate(shown.cues))
        if own and set(shown.operations) <= set(OPERATIONS) and min(rounds) > 0 and shown.text.split() == words:
            return shown
    raise DataError(f"not a problem of the late world: {text!r}. Use problems made by headstart.tasks.late.LateTask.")


class LateTask(tiny.TinyTask):
    """The first `size` problems of a split (`train`, `dev` or `test`); graded as the tiny world's are."""

    name = "late"
    max_tokens = 270
    """A right response has 119 to 259."""
    made: ClassVar[staticmethod[[str, int], tiny.World]] = staticmethod(puzzle)
    parsed: ClassVar[staticmethod[[str], tiny.World]] = staticmethod(parse)


WORLDS: dict[str, type[tiny.TinyTask]] = {task.name: task for task in (tiny.TinyTask, LateTask)}
"""The bundled worlds by the name that configurations call them."""


def _puzzle(draw: Callable[[int], int]) -> Puzzle:
    return Puzzle(
        operations=tuple(OPERATIONS[draw(len(OPERATIONS))] for _ in SLOTS),
        cues=tuple(CUES[3 * leg + draw(3)] for leg in range(len(LEGS))),
        rounds=tuple(ROUNDS[draw(len(ROUNDS))] for _ in LEGS),
        start=draw(10),
    )
