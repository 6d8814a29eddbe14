"""A teacher's engine whose completions come back in the student's tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from headstart.models.alignment import Aligner, Side
from headstart.models.token_bytes import TokenBytes
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout.translated import TranslatingEngine
from headstart.testing import ScriptedEngine, byte_tokenizer

SAID = " w1 w2"


def sides() -> tuple[Side, Side]:
    """The student's tokens are bytes, and the teacher's too, in another order."""
    student = TokenBytes.of(byte_tokenizer())
    kept = student.bytes_V
    order = [*range(6), *range(len(kept) - 1, 5, -1)]
    teacher = replace(student, bytes_V=tuple(kept[i] for i in order), backend=Reversed(student.backend, len(kept)))
    return Side(student, (1,), len(kept)), Side(teacher, (1,), len(kept))


class Reversed:
    def __init__(self, backend: Any, size: int) -> None:
        self.backend, self.size = backend, size

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return SimpleNamespace(ids=[i if i < 6 else self.size + 5 - i for i in ids])


@pytest.mark.parametrize(("limit", "context", "asked"), [(8, None, 16), (8, 12, 10), (8, 4, 8), (3, None, 6)])
def test_lengths_are_the_students(limit: int, context: int | None, asked: int) -> None:
    student, teacher = sides()
    ids = teacher.tokens.encode(SAID)
    assert ids is not None
    assert ids != student.tokens.encode(SAID)
    engine = ScriptedEngine({"p": [(*ids, 1)]})
    engine.model = SimpleNamespace(max_positions=context)  # type: ignore[attr-defined]
    translating = TranslatingEngine(cast(Any, engine), Aligner(student, teacher, "coarse"))
    (rollout,) = translating.generate(
        [Prompt(0, "p", (2, 3), (2, 3))], samples=1, max_tokens=limit, sampling=Sampling(), key=(0, "x", 0)
    )
    assert engine.calls[0][2] == (asked,)
    whole = (*(student.tokens.encode(SAID) or ()), 1)
    assert rollout.completion_ids == whole[:limit]
    assert rollout.stopped == (limit >= len(whole))


def test_a_student_without_a_stop_token_never_stops() -> None:
    student, teacher = sides()
    ids = teacher.tokens.encode(SAID) or ()
    engine = ScriptedEngine({"p": [(*ids, 1)]})
    engine.model = SimpleNamespace(max_positions=None)  # type: ignore[attr-defined]
    translating = TranslatingEngine(cast(Any, engine), Aligner(replace(student, stop_ids=()), teacher, "coarse"))
    (rollout,) = translating.generate(
        [Prompt(0, "p", (2,), (2,))], samples=1, max_tokens=9, sampling=Sampling(), key=(0, "x", 0)
    )
    assert rollout == Rollout(rollout.prompt, 0, student.tokens.encode(SAID) or (), False)
