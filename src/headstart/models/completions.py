"""Responses that come with the prompts, as the student would have to write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from headstart.config.schema import PromptsConfig
from headstart.errors import DataError
from headstart.models.templates import View
from headstart.progress import doing
from headstart.records import Message, Problem, Prompt


@dataclass(frozen=True, slots=True)
class Completions:
    """Given responses in the student's tokens, each with its stop token. `apart` of them were encoded without their
    prompt, because the tokens of both together do not begin with those of the prompt."""

    ids: tuple[tuple[int, ...], ...]
    apart: int


@doing("encoding the given responses")
def build_completions(
    problems: Sequence[Problem], prompts: Sequence[Prompt], tokenizer: Any, config: PromptsConfig, stops: Sequence[int]
) -> Completions:
    """`Problem.completion` of every prompt's problem as the student would have to write it after its prompt.

    The chat template writes the whole conversation and what follows the prompt's own tokens counts, up to the first of
    `stops`: a tokenizer may encode the beginning of a text differently, and a template may put something before it. A
    response without any gets the stop that the others end with. Raises DataError where a prompt has no response.
    """
    view = replace(View.of_student(tokenizer, config), opens=False)
    require_completions(problems)
    own = [problems[prompt.index] for prompt in prompts]
    whole = [reading.ids for reading in view.readings([_answered(problem) for problem in own])]
    found: list[tuple[int, ...]] = []
    apart, closing = 0, tokenizer.eos_token_id if tokenizer.eos_token_id in stops else min(stops)
    for problem, prompt, ids in zip(own, prompts, whole, strict=True):
        start = len(prompt.token_ids)
        follows = tuple(ids[:start]) == prompt.token_ids
        apart += not follows
        rest = ids[start:] if follows else view.encode(problem.completion or "")
        end = next((place for place, token in enumerate(rest) if token in stops), None)
        closing = closing if end is None else rest[end]
        found.append((*rest[:end], closing))
    return Completions(tuple(found), apart)


def require_completions(problems: Sequence[Problem]) -> None:
    """Raise DataError where a problem has no given response."""
    if missing := [problem.id for problem in problems if problem.completion is None]:
        raise DataError(
            f"{len(missing):,} of {len(problems):,} prompts have no given response (the first is {missing[0]!r}); name "
            "its column in prompts.completion_column, remove these rows, or set rollout.mix.given to 0"
        )


def _answered(problem: Problem) -> Problem:
    if problem.messages is None:
        return replace(problem, text=f"{problem.text}{problem.completion}")
    turn: Message = {"role": "assistant", "content": problem.completion or ""}
    return replace(problem, messages=(*problem.messages, turn))
