"""How a model is shown a problem: chat templates, system prompts, and the two views of every prompt."""

from __future__ import annotations

import difflib
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jinja2

from headstart.config.schema import PromptsConfig, ViewConfig
from headstart.errors import DataError, TemplateError
from headstart.models.contexts import context_of, filled, informed, require_contexts
from headstart.models.images import Reader, Shown, reader_of
from headstart.progress import doing
from headstart.records import Message, Problem, Prompt

PROBE = "Headstart7"
"""Content that is looked for in a rendered template."""
_RESERVED = ("messages", "add_generation_prompt", "continue_final_message", "tokenize", "tools")
CLOCK = datetime(2026, 1, 1)
"""The time for templates that ask for it, in every run: a resumed run and a later evaluation show the same prompts."""
SECONDS, MEMORY = 3, 1 << 30
"""Processor time per conversation, and bytes beyond what the process holds, that rendering may take."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A problem as one model reads it: token ids, and the images that stand among them."""

    ids: tuple[int, ...]
    images: Shown | None = None


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts that are used, how many over-long ones were dropped, and the longest used one (student tokens)."""

    prompts: tuple[Prompt, ...]
    dropped: int
    longest: int


@doing("encoding the prompts")
def build_prompts(
    problems: Sequence[Problem], student_tokenizer: Any, teacher_tokenizer: Any, config: PromptsConfig
) -> PromptSet:
    """Both models' views of every problem; `Prompt.index` is the problem's place in `problems`.

    Over-long prompts (student tokens) are left out or refused, as `config.overlong` says. Raises DataError when they
    are refused or none is left, TemplateError as `View.readings`.
    """
    student, teacher = View.of_student(student_tokenizer, config), View.of_teacher(teacher_tokenizer, config)
    same = teacher_tokenizer is student_tokenizer and student.settings == teacher.settings
    read = student.readings(problems)
    used = [index for index, reading in enumerate(read) if len(reading.ids) <= config.max_tokens]
    overlong = [len(reading.ids) for reading in read if len(reading.ids) > config.max_tokens]
    theirs = [read[index] for index in used] if same else teacher.readings([problems[index] for index in used])
    prompts = [
        Prompt(index, problems[index].id, read[index].ids, other.ids, read[index].images, other.images)
        for index, other in zip(used, theirs, strict=True)
    ]
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
class View:
    """One model's way of being shown problems."""

    tokenizer: Any
    chat: bool = True
    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    section: str = field(default="prompts", kw_only=True)
    opens: bool = field(default=True, kw_only=True)
    """Whether the text ends where the assistant begins."""
    context: ViewConfig | None = field(default=None, kw_only=True)
    """Whose context is shown with a problem."""

    @classmethod
    def of_student(cls, tokenizer: Any, prompts: PromptsConfig) -> View:
        """The student's view."""
        return cls(tokenizer, prompts.chat, prompts.system, prompts.template_kwargs)

    @classmethod
    def of_teacher(cls, tokenizer: Any, prompts: PromptsConfig) -> View:
        """The teacher's view: the student's settings where it has none of its own."""
        own = prompts.teacher_view
        system = prompts.system if own.system is None else own.system
        kwargs = prompts.template_kwargs if own.template_kwargs is None else own.template_kwargs
        section, context = "prompts.teacher_view", own if own.context_column else None
        return cls(tokenizer, prompts.chat, system, kwargs, section=section, context=context)

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.chat, self.system, dict(self.template_kwargs), self.context

    @property
    def reader(self) -> str:
        return "student" if self.section == "prompts" else "teacher"

    def ids(self, problem: Problem) -> tuple[int, ...]:
        """Token ids of one problem."""
        return self.readings([problem])[0].ids

    def readings(self, problems: Sequence[Problem]) -> list[Reading]:
        """Problems as the model reads them, ready for the assistant's completion.

        Messages go through the tokenizer's chat template (generation prompt on, no second BOS); text is encoded with
        the tokenizer's usual special tokens, a trailing EOS taken off. Raises TemplateError when there is no template,
        when it refuses the messages or an argument, or where there are images and the tokenizer belongs to no
        processor; DataError for an image that cannot be read.
        """
        chats = [problem for problem in problems if problem.messages is not None]
        if chats and not self.chat:
            raise TemplateError(
                f"problem {chats[0].id!r} holds chat messages, but prompts.chat is false; set it to true"
            )
        if self.context is not None:
            require_contexts(problems, self.context)
            problems = [informed(problem, self.context) for problem in problems]
            chats = [problem for problem in problems if problem.messages is not None]
        pictured = next((problem for problem in chats if problem.images), None)
        if pictured is not None and reader_of(self.tokenizer) is None:
            raise TemplateError(
                f"problem {pictured.id!r} has an image, but the {self.reader} was loaded without a processor: set "
                "prompts.images=files; from Python give Pair the processor in the tokenizer's place"
            )
        texts = iter(self._rendered(chats) if chats else ())
        return [self._read(p, None if p.messages is None else next(texts)) for p in problems]

    def _read(self, problem: Problem, rendered: str | None) -> Reading:
        if rendered is not None:
            rendered += self._assistant_start(problem)
        if rendered is not None and problem.images:
            return Reading(*cast(Reader, reader_of(self.tokenizer)).read(rendered, problem.images, problem.id))
        # A rendered template already holds BOS where the model wants one (Gemma, Llama): special tokens off.
        ids = self._plain(problem) if rendered is None else self.encode(rendered)
        if not ids:
            raise DataError(f"problem {problem.id!r} has no tokens; remove it from the source")
        if (reader := reader_of(self.tokenizer)) is not None and (stray := reader.placeholders.intersection(ids)):
            raise DataError(
                f"problem {problem.id!r} holds the {self.reader}'s placeholder of an image "
                f"({self.tokenizer.decode([min(stray)])!r}) and no image; remove it, or name prompts.image_column"
            )
        return Reading(tuple(ids))

    def _plain(self, problem: Problem) -> list[int]:
        if self.system or self.template_kwargs:
            raise TemplateError(
                f"problem {problem.id!r} is plain text, which has no system turn and no template: remove "
                f"{self.section}.system and {self.section}.template_kwargs, or set prompts.chat to true"
            )
        text = (problem.text or "") + self._assistant_start(problem)
        ids, own = self.encode(text, special=True), self.encode(text)
        # Some tokenizers close a text with EOS: a completion after it would be one after the end.
        if ids[-1:] == [self.tokenizer.eos_token_id] and ids[:-1][len(ids) - 1 - len(own) :] == own:
            ids = ids[:-1]
        # A text that was rendered with a template already brings its own BOS.
        return own if own[:1] == [self.tokenizer.bos_token_id] and ids[1:] == own else ids

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text as it is."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _rendered(self, problems: Sequence[Problem]) -> list[str]:
        conversations = [(self._messages(problem), problem.meta.get("tools") or None) for problem in problems]
        if not takes_tools(self.tokenizer) and any(tools for _, tools in conversations):
            raise TemplateError(
                f"the {self.reader}'s chat template has no place for tools; describe them in the prompt text instead, "
                "or choose a model whose template takes tools"
            )
        texts = apply_template(self.tokenizer, conversations, **self._arguments, add_generation_prompt=self.opens)
        for problem, text in zip(problems, texts, strict=True):
            if isinstance(text, TemplateError):
                raise TemplateError(
                    f"the {self.reader}'s chat template refuses problem {problem.id!r}: {text}. Check the order "
                    f"and the roles of its messages, {self.section}.template_kwargs and the template itself"
                )
        return cast(list[str], texts)

    def _messages(self, problem: Problem) -> tuple[Message, ...]:
        """The problem's turns with the system prompt (if not empty) in front, or inside the first user turn."""
        messages = _with_images(problem) if problem.images else problem.messages or ()
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

    def _assistant_start(self, problem: Problem) -> str:
        """The start of the assistant's turn, where the context stands there."""
        if self.context is None or self.context.context_place != "assistant":
            return ""
        return filled(self.context.template, context=context_of(problem, self.context) or "")

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template prints a system turn (Gemma 2 raises; others leave it out without a word)."""
        turns = ({"role": "system", "content": PROBE}, {"role": "user", "content": "x"})
        return PROBE in str(apply_template(self.tokenizer, [(turns, None)], **self._arguments)[0])

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        """The template's arguments; TemplateError for a missing template and for arguments it does not know."""
        template = chat_template(self.tokenizer)
        if template is None:
            others = ", or to teacher for the teacher's" if self.reader == "student" else ""
            raise TemplateError(
                f"the {self.reader}'s tokenizer has no chat template; set prompts.chat=false to use the prompts as "
                f"plain text, or {self.reader}.chat_template to a .jinja file{others}"
            )
        known = _template_names(template)
        for key in self.template_kwargs:
            if key in _RESERVED:
                raise TemplateError(f"{self.section}.template_kwargs: {key!r} is set by Headstart; remove it")
            if key not in known:  # jinja would ignore it without a word
                raise TemplateError(_unknown_key(key, known, self.section))
        return dict(self.template_kwargs)


def apply_template(
    tokenizer: Any,
    conversations: Sequence[tuple[Sequence[Any], list[dict[str, Any]] | None]],
    **arguments: Any,
) -> list[str | TemplateError]:
    """Every conversation (messages, function schemas) as text; a TemplateError, not raised, where the template fails.

    Templates come with checkpoints, and may never end or fill the memory: they run in a forked child with limits.
    Raises TemplateError when the child does not survive them.
    """
    if reader_of(tokenizer) is not None:  # templates of models that see may know parts alone
        conversations = [([_in_parts(message) for message in messages], tools) for messages, tools in conversations]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    arguments = {"add_generation_prompt": True, **arguments, "tokenize": False}
    child = context.Process(target=_render, args=(sender, tokenizer, conversations, arguments), daemon=True)
    child.start()
    sender.close()
    texts: list[str | TemplateError] = []
    try:
        while len(texts) < len(conversations) and receiver.poll(60 * SECONDS):
            texts.append(receiver.recv())
    except EOFError:  # the child is dead
        pass
    finally:
        child.kill()
        child.join()
    if len(texts) < len(conversations):
        raise TemplateError(
            f"the chat template crashes, or does not end within {SECONDS} s, on a conversation that begins "
            f"{str(conversations[len(texts)][0][0])[:80]!r}; correct chat_template in the checkpoint's folder, or set "
            "prompts.chat=false and give prompts that are rendered already"
        )
    return texts


def _render(sender: Connection, tokenizer: Any, conversations: Sequence[Any], arguments: dict[str, Any]) -> None:
    """The child: sets its limits and the clock that transformers gives to templates, and sends text by text."""
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = SimpleNamespace(now=lambda: CLOCK)
    with suppress(OSError):  # no /proc
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, held + MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    for messages, tools in conversations:
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS)
        try:
            text = tokenizer.apply_chat_template([dict(message) for message in messages], tools=tools, **arguments)
        except Exception as error:  # whatever a template's operators and filters raise
            text = TemplateError(" ".join(str(error).split()) or type(error).__name__)
            if any("tool_calls" in message for message in messages):
                # Some templates (DeepSeek's) join the arguments of a call to text: they want them as JSON text.
                with suppress(Exception):
                    texted = [_with_text_arguments(message) for message in messages]
                    text = tokenizer.apply_chat_template(texted, tools=tools, **arguments)
        sender.send(text)


def _with_text_arguments(value: Any) -> Any:
    """A message whose tool calls have their `arguments` as JSON text in place of objects."""
    if isinstance(value, list | tuple):
        return [_with_text_arguments(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: json.dumps(item, ensure_ascii=False)
        if key == "arguments" and isinstance(item, dict)
        else _with_text_arguments(item)
        if key in ("tool_calls", "function")
        else item
        for key, item in value.items()
    }


def _limit(kind: int, amount: int) -> None:
    with suppress(ValueError):  # a stricter limit is set already
        resource.setrlimit(kind, (amount, resource.getrlimit(kind)[1]))


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
    try:
        tokens = [(kind, value) for _, kind, value in jinja2.Environment().lex(template) if kind != "whitespace"]
    except jinja2.TemplateError as error:
        raise TemplateError(
            f"the chat template cannot be read: {error.message}; correct it in the checkpoint's folder"
        ) from error
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
            front, asked = f"{system['content']}\n\n", cast(Any, message["content"])
            content = front + asked if isinstance(asked, str) else [{"type": "text", "text": front}, *asked]
            merged = cast(Message, {**message, "content": content})
            return (*rest[:place], merged, *rest[place + 1 :])
    raise TemplateError("a system turn without a user turn cannot be shown to a template that has no system role")


def _with_images(problem: Problem) -> tuple[Message, ...]:
    """The problem's turns; those with images are parts, text cut where an image stands."""
    messages = list(problem.messages or ())
    for turn in {picture.turn for picture in problem.images}:
        text, parts, start = messages[turn]["content"], list[dict[str, str]](), 0
        for picture in problem.images:
            if picture.turn == turn:
                parts += [_text(text[start : picture.place]), {"type": "image"}]
                start = picture.place
        parts = [part for part in (*parts, _text(text[start:])) if part.get("text", True)]
        messages[turn] = cast(Message, {**messages[turn], "content": parts})
    return tuple(messages)


def _in_parts(message: Any) -> Any:
    content = message["content"]
    return {**message, "content": [_text(content)]} if isinstance(content, str) else message


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
