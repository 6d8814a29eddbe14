"""Sample rollouts for a reader: every token with its divergence and what the teacher would rather have said there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from headstart.diagnose.cast import Cast
from headstart.diagnose.positions import TokenReadings
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
class Samples:
    """The first sample of the same problems, from the student before and after training."""

    sentence: str
    before: tuple[Sample, ...]
    after: tuple[Sample, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of `explain/samples.json`."""
        return {"format": 1, **asdict(self)}


def explain_samples(cast: Cast, problems: int = PROBLEMS) -> Samples:
    """The first sample of the first `problems` problems, before and after. Reads what the other readings sampled."""

    def of(voice: Literal["before", "after"]) -> tuple[Sample, ...]:
        said = cast.said(voice)
        places = [p * cast.samples for p in range(min(problems, len(cast.problems)))]
        verdicts = [v.correct for v in cast.verdicts([said[i] for i in places])] if cast.task is not None else None
        read = cast.read(voice, voice)
        return tuple(
            sample(cast.pair.tokenizer, said[place], read.of_rows([place]), verdicts[i] if verdicts else None)
            for i, place in enumerate(places)
        )

    before, after = of("before"), of("after")
    words = f"{len(before)} problems, before and after training, token by token"
    if cast.task is not None:
        words += f"; right: {sum(bool(s.correct) for s in before)} before, {sum(bool(s.correct) for s in after)} after"
    return Samples(f"{words}.", before, after)


def sample(tokenizer: Any, rollout: Rollout, read: TokenReadings, correct: bool | None) -> Sample:
    """A rollout as a reader sees it; `read` holds its tokens only, in order."""
    ids, prompt = rollout.completion_ids, rollout.prompt.token_ids
    before: tuple[int | None, ...] = (None, *ids[:-1])
    alternatives = tuple(
        tuple(
            (_text(tokenizer, prompt, last, int(token)), round(float(p), 4))
            for token, p in zip(tokens, probs, strict=True)
        )
        for last, tokens, probs in zip(before, read.teacher_ids, read.teacher_probs, strict=True)
    )
    return Sample(
        problem_id=rollout.prompt.problem_id,
        prompt=str(tokenizer.decode(list(prompt))),
        correct=correct,
        stopped=rollout.stopped,
        tokens=tuple(token_texts(tokenizer, ids, prompt)),
        divergence=tuple(round(float(d), 4) for d in read.divergence),
        rank=tuple(int(r) for r in read.teacher_rank),
        alternatives=alternatives,
    )


def _text(tokenizer: Any, prompt: Sequence[int], last: int | None, token: int) -> str:
    """How `token` reads after `last`, or as the first token after the prompt."""
    return token_texts(tokenizer, (token,) if last is None else (last, token), prompt)[-1]
