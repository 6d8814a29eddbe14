"""What the checks look at: a pair, its prompts, its test, and a few short responses of both models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from headstart.assemble.pair import Pair, Speaker, given_completions
from headstart.assemble.tasks import Questions, load_questions
from headstart.models.completions import Completions
from headstart.models.templates import PromptSet
from headstart.records import Problem, Rollout

RESPONSES = 8
"""Prompts that responses are sampled for, spread over all of them; one from each model."""
TOKENS = 1280
"""Tokens that each model may write in all, divided evenly among its responses: 160 for each of 8. About 20 s
on one core for a model of 135 M."""
SCORED = 32
"""Tokens of a response that are scored where its end does not matter; fewer at a shorter horizon."""


@dataclass
class Subject:
    """Responses are sampled, and the test is read, when the first check asks for them."""

    pair: Pair
    problems: Sequence[Problem]
    prompts: PromptSet
    asked: Questions | None = None
    """The test, where it is read already."""
    given: Completions | None = None
    """The responses that come with the prompts, where they are encoded already."""
    say: Callable[[str], None] = lambda text: None
    """What is being done inside a check, for who watches."""

    @cached_property
    def questions(self) -> Questions | None:
        if self.asked is not None or self.pair.config.evaluation is None:
            return self.asked
        return load_questions(self.pair.config, self.pair.tokenizer)

    @cached_property
    def completions(self) -> Completions | None:
        return self.given or given_completions(self.pair, self.problems, self.prompts.prompts)

    @cached_property
    def student_responses(self) -> list[Rollout]:
        return self._responses("student")

    @cached_property
    def teacher_responses(self) -> list[Rollout]:
        return self._responses("teacher")

    def openings(self, count: int = RESPONSES) -> list[Rollout]:
        """The beginnings of some of the student's responses."""
        tokens = min(SCORED, self.pair.config.horizon.longest or SCORED)
        return [replace(r, completion_ids=r.completion_ids[:tokens]) for r in self.student_responses[:count]]

    def _responses(self, who: Speaker) -> list[Rollout]:
        model = self.pair.student if who == "student" else self.pair.teacher
        everything = self.prompts.prompts
        count = min(RESPONSES, len(everything))
        chosen = [everything[index * len(everything) // count] for index in range(count)]
        longest = max(len(p.token_ids if who == "student" else p.teacher_token_ids) for p in chosen)
        tokens = max(1, min(TOKENS // count, (model.max_positions or TOKENS + longest) - longest))
        self.say(f"sampling {count} responses of at most {tokens} tokens from the {who}")
        seed = self.pair.config.training.seed
        sampled = self.pair.sample(chosen, who=who, max_tokens=tokens, purpose=f"preflight-{who}", seed=seed)
        self.say("")
        return sampled
