"""Completions of one tokenizer in the tokens of another, aligned on bytes, and the events that both can express.

A row of the student can be compared with a row of the teacher where both predict what follows the same bytes. What they
predict is compared over common events: byte strings that are a token on both sides, STOP, special tokens that both
have, and REST.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from headstart.config.schema import Alignment
from headstart.errors import VocabularyError
from headstart.losses.events import Events
from headstart.models.token_bytes import TokenBytes
from headstart.records import Aligned, Rollout

CONTROLS = ("chunk", "sorted")
"""Alignments that compare no distributions over events."""
_Event = bytes | tuple[str, str]
_STOP: _Event = ("stop", "")
_MARK = b"\xff"
_INNER_BYTES = frozenset(bytes([b]) for b in range(0x80, 0xC0))
"""Bytes of UTF-8 that no character starts with."""


def shared_starts(a: Sequence[bytes], b: Sequence[bytes]) -> list[tuple[int, int]]:
    """Pairs (i, j) where token i of `a` and token j of `b` start at the same byte, and at last the pair of the ends if
    both texts have the same length. Of tokens without bytes at one place only the first is paired.

    Example: "ab", "c" against "a", "bc" gives (0, 0) and (2, 2).
    """
    place: dict[int, int] = {}
    for j, start in enumerate(accumulate(map(len, b), initial=0)):
        place.setdefault(start, j)
    pairs, last = [], -1
    for i, start in enumerate(accumulate(map(len, a), initial=0)):
        if start in place and start != last:
            pairs.append((i, place[start]))
        last = start
    return pairs


@dataclass(frozen=True, eq=False)
class Side:
    """One model of the pair: the bytes of its tokens, the ids that end its completions, and how many ids its head has
    after the cut."""

    tokens: TokenBytes
    stop_ids: tuple[int, ...]
    size: int

    @cached_property
    def events(self) -> list[_Event | None]:
        """What each id says: its bytes, the special token's text, or STOP; None for holes."""
        events: list[_Event | None] = [self.tokens.at(i) or None for i in range(self.size)]
        for i, text in self.tokens.special.items():
            if i < self.size:
                events[i] = ("special", text)
        for i in self.stop_ids:
            events[i] = _STOP
        return events


@dataclass(frozen=True, eq=False)
class Aligner:
    """Student and teacher with different tokenizers.

    `kind` says which rows are scored and how ids become events: `other` scores all shared starts, `coarse` those where
    both tokens are of one event, `strict` those that also end together, `byte` adds to coarse the rows inside a
    teacher's token. `chunk` scores all rows of the spans between shared starts, `sorted` row i beside row i.
    """

    student: Side
    teacher: Side
    kind: Alignment

    @cached_property
    def events(self) -> tuple[Events | None, Events | None]:
        """The student's and the teacher's events; None where a side's ids are the events."""
        return (None, None) if self.kind in CONTROLS else common_events(self.student, self.teacher, self.kind)

    @cached_property
    def _written_events(self) -> tuple[list[int], list[int]]:
        """The event of every id of both sides. The same bytes were written, so both tokens at a row must be of one
        event. Where they are not, the teacher splits here a token that it has elsewhere: its distribution is over other
        pieces than the events assume, and two models that agree would diverge without end."""
        own, other = (
            list(range(side.size)) if events is None else events.event_V.tolist()
            for side, events in zip((self.student, self.teacher), self.events, strict=True)
        )
        return own, other

    @cached_property
    def marks(self) -> dict[int, int]:
        """The teacher's id of each token of the student that is no text and that both have: STOP, special tokens."""
        ours, theirs = (
            {i: event for i, event in enumerate(side.events) if isinstance(event, tuple)}
            for side in (self.student, self.teacher)
        )
        number = {event: i for i, event in reversed(theirs.items())}
        return {i: number[event] for i, event in ours.items() if event in number}

    def align(self, rollout: Rollout) -> Rollout:
        """`rollout` with the teacher's own tokens of its completion, and which rows they score.

        What follows the last whole character is left unscored. A completion whose bytes the teacher's tokenizer does
        not give back (it normalises) has no scored rows.
        """
        if rollout.aligned is not None:
            return rollout
        rewritten = self._rewritten(rollout.completion_ids)
        if rewritten is None:
            return replace(rollout, aligned=Aligned((0,), (), (), dropped=True))
        pieces, theirs, ids = rewritten
        pairs = shared_starts(pieces, theirs)
        aligned = Aligned(ids or (0,), (), ())
        if self.kind == "chunk":
            own, other = map(_all, pairs[-1])
            return replace(rollout, aligned=replace(aligned, rows=own, teacher_rows=other, spans=tuple(pairs)))
        if self.kind == "sorted":
            own = _all(min(len(ids), len(pieces)))
            return replace(rollout, aligned=replace(aligned, rows=own, teacher_rows=own))
        scored = [(i, j, b"") for i, j in pairs if i < len(pieces) and j < len(ids)]
        if self.kind == "strict":
            ends = set(pairs)
            scored = [row for row in scored if (row[0] + 1, row[1] + 1) in ends]
        elif self.kind != "other":
            own_events, other_events = self._written_events
            scored = [r for r in scored if own_events[rollout.completion_ids[r[0]]] == other_events[ids[r[1]]]]
        if self.kind == "byte":
            within = _inside(pieces, theirs, {i for i, _, _ in scored})
            scored = sorted([*scored, *(row for row in within if len(self.remainders(row[2])[0]))])
        own, other, emitted = zip(*scored, strict=True) if scored else ((), (), ())
        aligned = replace(aligned, rows=own, teacher_rows=other, inside=emitted if self.kind == "byte" else ())
        return replace(rollout, aligned=aligned)

    def begin(self, rollout: Rollout, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The first `length` tokens of `rollout` as the teacher's tokens of the whole completion, up to the last that
        ends within their bytes and between characters; and before them, the student's tokens of just these bytes."""
        own, rewritten = rollout.completion_ids[:length], self._rewritten(rollout.completion_ids)
        if rewritten is None:
            return own, self.teacher.tokens.nearest(valid_text(self.student.tokens.join(own)))
        pieces, theirs, ids = rewritten
        written = b"".join(pieces)
        starts = list(accumulate(map(len, pieces), initial=0))
        count, kept = 0, 0
        for j, end in enumerate(accumulate(map(len, theirs))):
            if end <= starts[length] and written[end : end + 1] not in _INNER_BYTES:
                count, kept = j + 1, end
        if kept < starts[length]:
            whole = bisect_right(starts, kept) - 1
            rest = self.student.tokens.encode(valid_text(written[starts[whole] : kept]))
            own = rollout.completion_ids[:whole] + (rest or ())
        return own, ids[:count]

    def _rewritten(self, own: tuple[int, ...]) -> tuple[list[bytes], list[bytes], tuple[int, ...]] | None:
        """The bytes of the student's tokens, those of the teacher's tokens of the same text up to its last whole
        character, and these tokens; None where their bytes are not the text's.

        A mark that both have stands for one byte and stays where it is; one of the student's alone is nothing.
        """
        pieces = [_MARK if i in self.marks else self.student.tokens.at(i) or b"" for i in own]
        segments, marks = [b""], [-1]
        for i, piece in zip(own, pieces, strict=True):
            if i in self.marks:
                segments.append(b"")
                marks.append(self.marks[i])
            else:
                segments[-1] += piece
        theirs: list[bytes] = []
        ids: tuple[int, ...] = ()
        for mark, written in zip(marks, segments, strict=True):
            if mark >= 0:
                theirs.append(_MARK)
                ids = (*ids, mark)
            text = valid_text(written)
            more = self.teacher.tokens.encode(text)
            if more is None:
                return None
            ids += more
            theirs += [self.teacher.tokens.at(i) or b"" for i in more]
            if len(text.encode()) < len(written):
                break
        return pieces, theirs, ids

    def translate(self, ids: tuple[int, ...], stopped: bool) -> tuple[int, ...]:
        """The student's tokens of what the teacher wrote, a stop token included."""
        text = valid_text(self.teacher.tokens.join(ids[:-1] if stopped else ids))
        own = self.student.tokens.encode(text)
        if own is None:  # a tokenizer that normalises: the text as it would read it
            own = self.student.tokens.nearest(text)
        return (*own, *self.student.stop_ids[:1]) if stopped else own

    @lru_cache(maxsize=4096)  # noqa: B019 (an aligner lives as long as its run)
    def remainders(self, emitted: bytes) -> tuple[Tensor, Tensor]:
        """The teacher's ids that extend `emitted`, and the event of what each still says; int64."""
        spelled, ids, number = self._sorted
        first, last = bisect_right(spelled, emitted), bisect_left(spelled, emitted + b"\xff" * 64)
        events = [_longest(b[len(emitted) :], number) for b in spelled[first:last]]
        kept = [(i, event) for i, event in zip(ids[first:last], events, strict=True) if event is not None]
        return torch.tensor([i for i, _ in kept]), torch.tensor([event for _, event in kept])

    @cached_property
    def _sorted(self) -> tuple[list[bytes], list[int], dict[_Event, int]]:
        """The teacher's tokens in order of their bytes, their ids, and the numbers of the common events."""
        spelled = sorted((event, i) for i, event in enumerate(self.teacher.events) if isinstance(event, bytes))
        return [e for e, _ in spelled], [i for _, i in spelled], _shared(self.student, self.teacher)


def _all(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def _inside(pieces: Sequence[bytes], theirs: Sequence[bytes], paired: set[int]) -> Iterator[tuple[int, int, bytes]]:
    """The student's tokens that start and end inside a token of the teacher: (i, j, bytes of token j before i).

    Runs of white space are left out: they are written one way or another without meaning, and training on them byte by
    byte has been seen to break code (arXiv 2607.22334).
    """
    ends = list(accumulate(map(len, theirs)))
    start = 0
    for i, piece in enumerate(pieces):
        j = bisect_right(ends, start)
        within = i not in paired and j < len(theirs) and start + len(piece) <= ends[j]
        if within and piece.strip() and (before := theirs[j][: start - (ends[j] - len(theirs[j]))]):
            yield i, j, before
        start += len(piece)


def valid_text(written: bytes) -> str:
    """The text of the bytes up to the first that is no part of a whole character."""
    try:
        return written.decode()
    except UnicodeDecodeError as error:
        return written[: error.start].decode()


def _shared(student: Side, teacher: Side) -> dict[_Event, int]:
    """The events that both sides have ids for, numbered in the order of the student's ids."""
    theirs = set(teacher.events)
    number: dict[_Event, int] = {}
    for event in student.events:
        if event is not None and event in theirs:
            number.setdefault(event, len(number))
    return number


def _longest(written: bytes, number: Mapping[_Event, int]) -> int | None:
    """The event of the longest prefix of `written` that is one."""
    return next((number[written[:k]] for k in range(len(written), 0, -1) if written[:k] in number), None)


def common_events(student: Side, teacher: Side, kind: Alignment) -> tuple[Events | None, Events | None]:
    """The events of both sides' ids.

    `coarse`: each token counts for the longest shared token that is a prefix of its bytes, so that both distributions
    are sums over one partition of what can follow. `strict`, `other`: for itself where it is shared. What is left is
    REST; `strict` renormalises without it. Events are in the order of the student's ids, so that a teacher whose ids
    are permuted gives the very numbers of one with the student's tokenizer.

    Raises VocabularyError when the two have no byte strings in common.
    """
    number = _shared(student, teacher)
    if not any(isinstance(event, bytes) for event in number):
        raise VocabularyError("student and teacher have not a single token in common; choose another teacher")
    rest, prefixes, sides = len(number), kind not in ("strict", "other"), []
    for side in (student, teacher):
        event_V = np.full(side.size, rest, dtype=np.int64)
        for i, event in enumerate(side.events):
            if event in number:
                event_V[i] = number[event]
            elif prefixes and isinstance(event, bytes):
                longest = _longest(event, number)
                event_V[i] = rest if longest is None else longest
        sides.append(event_V)
    has_rest = [bool((event_V == rest).any()) for event_V in sides]
    if not (all(has_rest) or (kind == "strict" and any(has_rest))):
        # What only one side has cannot be compared with anything.
        sides = [np.where(event_V == rest, -1, event_V) for event_V in sides]
        made = [Events.of(torch.from_numpy(event_V), rest) for event_V in sides]
    else:
        made = [
            Events.of(torch.from_numpy(event_V), rest + 1, rest, renormalised=kind == "strict") for event_V in sides
        ]
    one, other = (None if events.identity else events for events in made)
    return one, other
