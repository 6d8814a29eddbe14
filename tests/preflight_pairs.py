"""Pairs built to trigger one finding each: small random models with freely chosen tokenizers and templates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.assemble.pair import Pair, open_pair
from headstart.checks.findings import Finding, Preflight
from headstart.config.schema import Config
from headstart.models.templates import PromptSet, build_prompts
from headstart.records import Prompt, Rollout
from headstart.tasks.prompts import load_problems
from headstart.testing import CHAT, random_model, word_tokenizer, write_checkpoint
from support import make_config, write_prompts

THINKING = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %} w1 w1 w2 w2"
    "{% endif %}{% endif %}"
)
"""A template that knows a thinking mode."""
TURNS = CHAT.replace("<end>", "<turn>")
"""A template that ends a turn with a token of its own."""


@dataclass(frozen=True)
class Side:
    """One model of a pair: its template, added tokens, head rows (default: the tokenizer's), stop id in its config."""

    template: str = CHAT
    special: tuple[str, ...] = ()
    rows: int | None = None
    eos: int = 1
    seed: int = 1

    def write(self, folder: Path) -> None:
        tokenizer = word_tokenizer()
        if self.special:
            tokenizer.add_special_tokens({"additional_special_tokens": list(self.special)})
        tokenizer.chat_template = self.template
        model = random_model("llama", self.rows or len(tokenizer), seed=self.seed, eos_id=self.eos)
        write_checkpoint(folder, model, tokenizer)


def write_sides(folder: Path, student: Side, teacher: Side, *overrides: str) -> Config:
    """A configuration over a pair made of two sides."""
    student.write(folder / "student")
    teacher.write(folder / "teacher")
    write_prompts(folder)
    return make_config(folder, *overrides)


def loaded(config: Config) -> tuple[Pair, PromptSet]:
    pair = open_pair(config)
    prompts = build_prompts(load_problems(config.prompts), pair.tokenizer, pair.teacher_tokenizer, config.prompts)
    return pair, prompts


def speak(pair: Pair, prompts: PromptSet, tokens: int = 24, count: int = 6, who: Any = "student") -> list[Rollout]:
    return pair.sample(prompts.prompts[:count], who=who, max_tokens=tokens, purpose="test")


def prompt(*ids: int, index: int = 0) -> Prompt:
    return Prompt(index, f"p{index}", ids, ids)


def of(result: Preflight, check: str) -> list[Finding]:
    return [finding for finding in result.findings if finding.check == check]
