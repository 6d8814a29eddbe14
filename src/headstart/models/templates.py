"""How a model is shown a problem: chat templates, system prompts, and the two views of every prompt."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import jinja2

from headstart.config.schema import PromptsConfig
from headstart.errors import DataError, TemplateError
from headstart.records import Message, Problem, Prompt

PROBE = "Headstart7"
"""Content that is looked for in a rendered template."""
_RESERVED = ("messages", "add_generation_prompt", "continue_final_message", "tokenize", "tools")
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, KeyError)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts that are used, how many over-long ones were dropped, and the longest used one (student tokens)."""

    prompts: tuple[Prompt, ...]
    dropped: int
    longest: int


def render(
    problem: Problem, tokenizer: Any, *, chat: bool, system: str | None, template_kwargs: Mapping[str, Any]
) -> list[int]:
    """Token ids of the model's context, ready for the assistant's completion.

    Messages go through the tokenizer's chat template (generation prompt on, no second BOS); text is encoded with the
    tokenizer's usual special tokens, a trailing EOS taken off. Raises TemplateError when there is no template, when it
    refuses the messages, or when a template argument is unknown to it.
    """
    return _View(tokenizer, chat, system, template_kwargs).ids(problem)


def shown_turns(problem: Problem, tokenizer: Any) -> tuple[Message, ...]:
    """A problem's messages as the chat template is given them: a system turn inside the first user turn where the
    template has no system role.
    """
    return _View(tokenizer, True, None, {})._messages(problem)


def build_prompts(
    problems: Sequence[Problem], student_tokenizer: Any, teacher_tokenizer: Any, config: PromptsConfig
) -> PromptSet:
    """Both models' views of every problem; `Prompt.index` is the problem's place in `problems`.

    Over-long prompts (student tokens) are left out or refused, as `config.overlong` says. Raises DataError when they
    are refused or none is left, TemplateError as `render`.
    """
    own = config.teacher_view
    student = _View(student_tokenizer, config.chat, config.system, config.template_kwargs)
    teacher = _View(
        teacher_tokenizer,
        config.chat,
        config.system if own.system is None else own.system,
        config.template_kwargs if own.template_kwargs is None else own.template_kwargs,
        section="prompts.teacher_view",
    )
    same = teacher_tokenizer is student_tokenizer and student.settings == teacher.settings
    prompts, overlong = [], []
    for index, problem in enumerate(problems):
        ids = tuple(student.ids(problem))
        if len(ids) > config.max_tokens:
            overlong.append(len(ids))
            continue
        prompts.append(Prompt(index, problem.id, ids, ids if same else tuple(teacher.ids(problem))))
    if overlong and (config.overlong == "refuse" or not prompts):
        raise DataError(
            f"{len(overlong)} of {len(problems)} prompts are longer than prompts.max_tokens = {config.max_tokens} "
            f"(the longest has {max(overlong)} tokens); raise max_tokens"
            + (" or set prompts.overlong to drop" if config.overlong == "refuse" else "; none is left")
        )
    if not prompts:
        raise DataError("there are no prompts; check prompts.source")
    return PromptSet(tuple(prompts), len(overlong), max(len(prompt.token_ids) for prompt in prompts))


@dataclass(frozen=True)
class _View:
    """One model's way of being shown problems."""

    tokenizer: Any
    chat: bool
    system: str | None
    template_kwargs: Mapping[str, Any]
    section: str = field(default="prompts", kw_only=True)

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.chat, self.system, dict(self.template_kwargs)

    @property
    def reader(self) -> str:
        return "student" if self.section == "prompts" else "teacher"

    def ids(self, problem: Problem) -> list[int]:
        if problem.messages is None:
            ids = self._plain(problem)
        elif not self.chat:
            raise TemplateError(
                f"problem {problem.id!r} holds chat messages, but prompts.chat is false; set it to true"
            )
        else:
            ids = self._encode(self._rendered(problem), special=False)
        if not ids:
            raise DataError(f"problem {problem.id!r} has no tokens; remove it from the source")
        return ids

    def _plain(self, problem: Problem) -> list[int]:
        if self.system or self.template_kwargs:
            raise TemplateError(
                f"problem {problem.id!r} is plain text, which has no system turn and no template: remove "
                f"{self.section}.system and {self.section}.template_kwargs, or set prompts.chat to true"
            )
        text = problem.text or ""
        ids = self._encode(text, special=True)
        eos = self.tokenizer.eos_token_id
        # Some tokenizers close a text with EOS: a completion after it would be one after the end.
        if eos is not None and ids[-1:] == [eos] and self._encode(text, special=False)[-1:] != [eos]:
            return ids[:-1]
        return ids

    def _encode(self, text: str, *, special: bool) -> list[int]:
        # A rendered template already holds BOS where the model wants one (Gemma, Llama): special tokens off.
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _rendered(self, problem: Problem) -> str:
        try:
            return self._apply(self._messages(problem), problem.meta.get("tools") or None)
        except _REFUSALS as error:
            raise TemplateError(
                f"the {self.reader}'s chat template refuses problem {problem.id!r}: {error}. Check the order "
                f"and the roles of its messages and {self.section}.template_kwargs"
            ) from error

    def _apply(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> str:
        if tools and not self._takes_tools:
            raise TemplateError(
                f"the {self.reader}'s chat template has no place for tools; describe them in the prompt text instead, "
                "or choose a model whose template takes tools"
            )
        rendered = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=tools,
            tokenize=False,
            add_generation_prompt=True,
            **self._arguments,
        )
        return cast(str, rendered)

    def _messages(self, problem: Problem) -> tuple[Message, ...]:
        """The problem's turns with the system prompt (if not empty) in front, or inside the first user turn."""
        messages = problem.messages or ()
        if self.system:
            if any(message["role"] == "system" for message in messages):
                warnings.warn(
                    f"some problems bring a system turn of their own: it is kept and {self.section}.system is not "
                    "added to them; remove one of the two",
                    stacklevel=2,
                )
            else:
                messages = ({"role": "system", "content": self.system}, *messages)
        if messages and messages[0]["role"] == "system" and not self._takes_system:
            warnings.warn(
                f"the {self.reader}'s chat template has no system role: the system prompt is put in front of the first "
                "user message; set no system prompt to avoid this",
                stacklevel=2,
            )
            return _merge_system(messages)
        return messages

    @cached_property
    def _takes_tools(self) -> bool:
        return takes_tools(self.tokenizer)

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template prints a system turn (Gemma 2 raises; others leave it out without a word)."""
        user: Message = {"role": "user", "content": "x"}
        try:
            return PROBE in self._apply(({"role": "system", "content": PROBE}, user))
        except _REFUSALS:
            return False

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        """The template's arguments; TemplateError for a missing template and for arguments it does not know."""
        template = chat_template(self.tokenizer)
        if template is None:
            raise TemplateError(
                f"the {self.reader}'s tokenizer has no chat template; set prompts.chat=false to use the prompts as "
                "plain text, or choose a chat model"
            )
        known = _template_names(template)
        for key in self.template_kwargs:
            if key in _RESERVED:
                raise TemplateError(f"{self.section}.template_kwargs: {key!r} is set by Headstart; remove it")
            if key not in known:  # jinja would ignore it without a word
                raise TemplateError(_unknown_key(key, known, self.section))
        return dict(self.template_kwargs)


def chat_template(tokenizer: Any) -> str | None:
    """The template that plain conversations are rendered with, or None."""
    try:
        return cast("str | None", tokenizer.get_chat_template())
    except ValueError:  # none at all, or several without a default
        return None


def takes_tools(tokenizer: Any) -> bool:
    """Whether the chat template has a place for function schemas."""
    return "tools" in _template_names(chat_template(tokenizer) or "")


def _template_names(template: str) -> set[str]:
    """Names in a template's code, without attributes; printed text and string literals do not count."""
    tokens = [(kind, value) for _, kind, value in jinja2.Environment().lex(template) if kind != "whitespace"]
    return {value for (_, before), (kind, value) in pairwise(tokens) if kind == "name" and before != "."}


def _unknown_key(key: str, known: set[str], section: str) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    remedy = (
        "remove it" if section == "prompts" else f"set {section}.template_kwargs to what this model's template takes"
    )
    return f"{section}.template_kwargs: this chat template does not use {key!r}{hint} ({remedy}, {{}} for nothing)"


def _merge_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    system, *rest = messages
    for place, message in enumerate(rest):
        if message["role"] == "user":
            merged = cast(Message, {**message, "content": f"{system['content']}\n\n{message['content']}"})
            return (*rest[:place], merged, *rest[place + 1 :])
    raise TemplateError("a system turn without a user turn cannot be shown to a template that has no system role")
