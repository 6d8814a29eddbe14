"""Is there anything to learn, and in the form that will be asked? Two models, and training and test, compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.assemble.pair import Pair
from headstart.assemble.tasks import Questions
from headstart.checks.findings import Finding
from headstart.config.evaluation import Benchmark
from headstart.models.lora import unwrap
from headstart.ranks.sharding import local_tensor
from headstart.records import Problem, Prompt

LOOKED_AT = 1024
"""Values of a weight that are compared, spread over all of it: a merged adapter or a fine-tuning changes nearly all."""
WORDS = 4
"""Words at the start or end of all prompts that make an instruction; fewer may be how such questions begin."""
RARE = 0.1
"""Share of prompts below which what all prompts of the other side have is missing."""
SHOWN = 200
"""Characters of a prompt that are shown."""


def identical(pair: Pair, prompts: Sequence[Prompt]) -> Finding | None:
    """Whether both models have the same weights, adapters in training aside; None where they differ."""
    if pair.endpoint is not None:
        return None
    ours, theirs = (
        [local_tensor(p.detach()) for name, p in unwrap(model.model).named_parameters() if ".lora_" not in name]
        for model in pair.models
    )
    if len(ours) != len(theirs) or not all(map(_same, ours, theirs)):
        return None
    text = "student and teacher have the same weights"
    if any(p.token_ids != p.teacher_token_ids for p in prompts):
        return Finding("two models", "note", f"{text}: what there is to learn is the teacher's own view of the prompts")
    text += " and read the same prompts: there is nothing to learn, the divergence is 0 at every token"
    remedy = "choose another teacher, or give it a view of its own (prompts.teacher_view)"
    return Finding("two models", "warning", text, remedy)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal in the coarser of their two types, as far as is looked."""
    if a.shape != b.shape:
        return False
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    step = max(1, a.numel() // LOOKED_AT)
    return torch.equal(*(x.reshape(-1)[::step].to("cpu", dtype) for x in (a, b)))


@dataclass(frozen=True)
class _Form:
    """What surrounds the questions of one source: what all of them begin and end with, and their system turns."""

    chat: frozenset[bool]
    systems: frozenset[str]
    texts: Sequence[str]

    @classmethod
    def of(cls, problems: Sequence[Problem], system: str | None) -> _Form:
        """`system` is that of problems which bring none of their own."""
        turns = [problem.messages or () for problem in problems]
        own = [next((turn["content"] for turn in ts if turn["role"] == "system"), system or "") for ts in turns]
        texts = [
            problem.text or "\n".join(turn["content"] for turn in ts if turn["role"] != "system")
            for problem, ts in zip(problems, turns, strict=True)
        ]
        return cls(frozenset(map(bool, turns)), frozenset(own), texts)

    def instructions(self) -> dict[str, str]:
        """What all texts begin and end with, in whole words, where it is long enough to be an instruction."""
        if len(set(self.texts)) < 2:
            return {}
        start = re.sub(r"\S+\Z", "", _common(self.texts)).strip()
        end = re.sub(r"\A\S+", "", _common([text[::-1] for text in self.texts])[::-1]).strip()
        return {place: text for place, text in (("before", start), ("after", end)) if len(text.split()) >= WORDS}

    def lacks(self, instruction: str) -> bool:
        return sum(instruction in text for text in self.texts) < RARE * len(self.texts)


def _common(texts: Sequence[str]) -> str:
    """What all of them begin with: what the first and the last in order do."""
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def prompt_form(pair: Pair, problems: Sequence[Problem], prompts: Sequence[Prompt], asked: Questions) -> Finding | None:
    """Whether the test asks in the form that is trained: chat turns, system turn, instructions around the question."""
    config = pair.config
    assert config.evaluation is not None
    own = isinstance(config.evaluation.task, Benchmark)
    used = [problems[p.index] for p in prompts if p.index < len(problems)]
    if not used:
        return None
    forms = {
        "training": _Form.of(used, config.prompts.system),
        "the evaluation": _Form.of(asked.problems, None if own else config.prompts.system),
    }
    differences = _differences(forms)
    figures: dict[str, Any] = {
        name: _shown(pair.tokenizer.decode(prompt.token_ids))
        for name, prompt in (("training", prompts[0]), ("evaluation", asked.prompts[0]))
    }
    if not differences:
        return Finding("prompt form", "ok", "training and evaluation ask in the same form", None, figures)
    shown = ". ".join(f"{name.capitalize()} prompt: {text!r}" for name, text in figures.items())
    text = f"training asks in another form than the evaluation: {'; '.join(differences)}. {shown}"
    remedy = "train as it will be asked: set prompts.system, or put the instruction into the rows of prompts.source"
    return Finding("prompt form", "warning", text, remedy, figures | {"differences": differences})


def _differences(forms: dict[str, _Form]) -> list[str]:
    (here, training), (there, evaluation) = forms.items()
    found = []
    if training.chat.isdisjoint(evaluation.chat):
        found.append("one is chat turns, the other plain text")
    if training.systems.isdisjoint(evaluation.systems):
        ours, theirs = (_turn(form) for form in (training, evaluation))
        found.append(f"{here} has {ours}, {there} {theirs}")
    for name, form, other_name, other in ((there, evaluation, here, training), (here, training, there, evaluation)):
        for place, instruction in form.instructions().items():
            if other.lacks(instruction):
                found.append(f"{name} says {_shown(instruction)!r} {place} every question, {other_name} does not")
    return found


def _turn(form: _Form) -> str:
    first = next(iter(form.systems))
    if len(form.systems) > 1:
        return f"{len(form.systems)} system turns"
    return f"the system turn {_shown(first)!r}" if first else "no system turn"


def _shown(text: str) -> str:
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} ... {text[-half:]}"
