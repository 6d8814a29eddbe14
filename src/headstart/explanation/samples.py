"""Sample rollouts for a reader: every token with its divergence and what the teacher would rather have said there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from headstart.diagnosis.positions import TokenReadings
from headstart.explanation.models import Models, Reading
from headstart.models.collate import token_texts
from headstart.records import Rollout

PROBLEMS = 4
"""Problems shown: the first ones, so that nobody chose them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout, token by token. `prompt` is the student's view; `correct` is None where no task grades.

    Per token: its text (joined they read like the response), its divergence in nats, its rank under the teacher (1 is
    the favourite), and the teacher's favourites there, best first, as (text, probability).
    """

    problem_id: str
    prompt: str
    correct: bool | None
    stopped: bool
    tokens: tuple[str, ...]
    divergence: tuple[float, ...]
    rank: tuple[int, ...]
    alternatives: tuple[tuple[tuple[str, float], ...], ...]


@dataclass(frozen=True, slots=True)
class Samples(Reading):
    """The first sample of the same problems, from the student before and after training."""

    before: tuple[Sample, ...]
    after: tuple[Sample, ...]


def explain_samples(models: Models, problems: int = PROBLEMS) -> Samples:
    """The first sample of the first `problems` problems, before and after, from what other readings sampled."""
    graded = models.task is not None

    def of(source: Literal["before", "after"]) -> tuple[Sample, ...]:
        rows = [p * models.samples for p in range(min(problems, len(models.problems)))]
        rollouts = [models.responses(source)[row] for row in rows]
        right = [v.correct for v in models.verdicts(rollouts)] if graded else [None] * len(rows)
        read = models.read(source, source)
        each = zip(rows, rollouts, right, strict=True)
        return tuple(sample(models.pair.tokenizer, r, read.of_rows([row]), correct) for row, r, correct in each)

    before, after = of("before"), of("after")
    words = f"{len(before)} problems, before and after training, token by token"
    if graded:
        words += f"; right: {sum(bool(s.correct) for s in before)} before, {sum(bool(s.correct) for s in after)} after"
    return Samples(f"{words}.", before, after)


def sample(tokenizer: Any, rollout: Rollout, read: TokenReadings, correct: bool | None) -> Sample:
    """A rollout as a reader sees it; `read` holds its tokens only, in order.

    Tokens that a teacher with another tokenizer does not score have divergence 0, rank 0 and no alternatives.
    """
    ids, prompt = rollout.completion_ids, rollout.prompt.token_ids
    index = {int(n): k for k, n in enumerate(read.position)}

    def text(last: Sequence[int], token: int) -> str:
        return token_texts(tokenizer, (*last, token), prompt)[-1]

    def alternatives(n: int) -> tuple[tuple[str, float], ...]:
        if n not in index:
            return ()
        both = zip(read.teacher_ids[index[n]], read.teacher_probs[index[n]], strict=True)
        return tuple((text(ids[max(n - 1, 0) : n], int(token)), round(float(p), 4)) for token, p in both if token >= 0)

    return Sample(
        problem_id=rollout.prompt.problem_id,
        prompt=str(tokenizer.decode(list(prompt))),
        correct=correct,
        stopped=rollout.stopped,
        tokens=tuple(token_texts(tokenizer, ids, prompt)),
        divergence=tuple(round(float(read.divergence[index[n]]), 4) if n in index else 0.0 for n in range(len(ids))),
        rank=tuple(int(read.teacher_rank[index[n]]) if n in index else 0 for n in range(len(ids))),
        alternatives=tuple(map(alternatives, range(len(ids)))),
    )
