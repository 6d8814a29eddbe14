"""Is there anything to learn, and in the form that will be asked? Two models, and training and test, compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.assemble.pair import Pair
from headstart.assemble.tasks import Questions
from headstart.checks.findings import Finding
from headstart.config.evaluation import Benchmark
from headstart.models.lora import unwrap
from headstart.ranks.sharding import local_tensor
from headstart.records import Problem, Prompt
from headstart.tasks.overlap import shared

LOOKED_AT = 1024
"""Values of a weight that are compared, spread over all of it: a merged adapter or fine-tuning changes nearly all."""
WORDS = 4
"""Words at the start or end of all prompts that make an instruction; fewer may be how such questions begin."""
RARE = 0.1
"""Share of prompts with an instruction below which it is missing."""
SHOWN = 100
"""Characters of the beginning and of the end of a text that are shown."""


def identical(pair: Pair, prompts: Sequence[Prompt]) -> Finding | None:
    """Whether both models have the same weights, adapters in training aside; None where they differ."""
    sides = [[p for n, p in unwrap(m.model).named_parameters() if ".lora_" not in n] for m in pair.models]
    if pair.config.divergence.type == "sft":  # what there is to learn is the text
        return None
    if len(sides) < 2 or len(sides[0]) != len(sides[1]) or not all(map(_same, *sides)):
        return None
    text = "student and teacher have the same weights"
    if any(p.token_ids != p.teacher_token_ids for p in prompts):
        return Finding("two models", "note", f"{text}: what there is to learn is the teacher's own view of the prompts")
    text += " and read the same prompts: there is nothing to learn, the divergence is 0 at every token"
    remedy = "choose another teacher, or give it a view of its own (prompts.teacher_view)"
    return Finding("two models", "warning", text, remedy)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal in the coarser of their two types, as far as is looked."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    looked = (local_tensor(x.detach()).reshape(-1)[:: max(1, a.numel() // LOOKED_AT)].to("cpu", dtype) for x in (a, b))
    return a.shape == b.shape and torch.equal(*looked)


def prompt_form(pair: Pair, problems: Sequence[Problem], prompts: Sequence[Prompt], asked: Questions) -> Finding | None:
    """Whether the test asks in the form that is trained: chat turns, system turn, instructions around the question."""
    config, used = pair.config, [problems[p.index] for p in prompts if problems]
    if config.evaluation is None or not used:
        return None
    system = config.prompts.system
    own = isinstance(config.evaluation.task, Benchmark)
    training, test = _Form.of(used, system), _Form.of(asked.problems, None if own else system)
    differences = list(_differences(training, test))
    both = (("training", prompts[0]), ("evaluation", asked.prompts[0]))
    figures = {name: _shown(pair.tokenizer.decode(prompt.token_ids)) for name, prompt in both}
    if not differences:
        return Finding("prompt form", "ok", "training and evaluation ask in the same form", None, figures)
    shown = "; ".join(f"a prompt of the {name}: {text!r}" for name, text in figures.items())
    text = f"the evaluation asks in another form than is trained: {'; '.join(differences)} ({shown})"
    remedy = "train as it will be asked: set prompts.system, or put the instruction into the rows of prompts.source"
    return Finding("prompt form", "warning", text, remedy, figures)


@dataclass(frozen=True)
class _Form:
    """Are they chat turns, which system turns have they, and what do they ask?"""

    chat: frozenset[bool]
    systems: frozenset[str]
    texts: Sequence[str]

    @classmethod
    def of(cls, problems: Sequence[Problem], system: str | None) -> _Form:
        """`system` is that of problems which bring none of their own."""
        turns = [problem.messages or () for problem in problems]
        systems = (next((t["content"] for t in ts if t["role"] == "system"), system or "") for ts in turns)
        asked = ("\n".join(t["content"] for t in ts if t["role"] != "system") for ts in turns)
        texts = [problem.text or text for problem, text in zip(problems, asked, strict=True)]
        return cls(frozenset(map(bool, turns)), frozenset(systems), texts)

    def lacks(self, other: _Form) -> Iterator[str]:
        """What all texts of `other` begin or end with, in whole words, and hardly any of these holds."""
        if len(set(other.texts)) > 1:
            one, backwards = other.texts[0], [text[::-1] for text in other.texts]
            start = re.sub(r"\S+\Z", "", one[: shared(other.texts)]).strip()
            end = re.sub(r"\A\S+", "", one[len(one) - shared(backwards) :]).strip()
            for text in (start, end):
                if len(text.split()) >= WORDS and sum(text in own for own in self.texts) < RARE * len(self.texts):
                    yield _shown(text)


def _differences(training: _Form, test: _Form) -> Iterator[str]:
    if training.chat.isdisjoint(test.chat):
        yield "one is chat turns, the other plain text"
    if training.systems.isdisjoint(test.systems):
        ours, theirs = (repr(_shown(text)) if (text := min(form.systems)) else "none" for form in (training, test))
        yield f"its system turn is {theirs}, in training {ours}"
    yield from (f"every question has {text!r} around it, hardly any in training" for text in training.lacks(test))
    yield from (f"every prompt of the training has {text!r}, hardly any question" for text in test.lacks(training))


def _shown(text: str) -> str:
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} ... {text[-SHOWN:]}"
