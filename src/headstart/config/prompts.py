"""The part of the schema that says which problems are asked, and how models are shown them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from headstart.config.evaluation import BENCHMARKS, WORLDS
from headstart.config.section import Section


class ViewConfig(Section):
    """How a model is shown a problem. Fields left at null follow the student's view."""

    system: str | None = None
    """System prompt put in front of chat messages."""
    template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template, such as {enable_thinking: false}."""
    context_column: str | None = None
    """Column with text that only the teacher sees, such as a reference solution, a hint or documents; of a benchmark or
    a bundled world `completion`, its reference solution, and of the world tiny also `plan`, the part that decides."""
    context_place: Literal["prompt", "assistant"] = "prompt"
    """Where it stands: in the last user turn, or at the start of the assistant's."""
    context_template: str | None = Field(None, examples=["{prompt}\n\nA hint: {context}"])
    """Text with {context} in it, and in the user turn {prompt}; null is one that calls it a reference."""

    @property
    def template(self) -> str:
        """What the context is put into."""
        return self.context_template or CONTEXT_TEMPLATES[self.context_place]


CONTEXT_TEMPLATES = {
    "prompt": (
        "{prompt}\n\nHere is a reference solution:\n\n{context}\n\nWith this in mind, answer in your own words, "
        "and do not mention it."
    ),
    "assistant": "A reference solution:\n\n{context}\n\nMy own answer:\n\n",
}
"""After OPSD's prompt (arXiv 2601.18734), where the teacher is the student with the solution before its eyes."""


class SourceConfig(Section):
    """Where problems come from, and which of a row's columns are what."""

    source: str = Field(examples=["openai/gsm8k"])
    """A .jsonl, .json or .parquet file (also .gz), a bundled world (tiny, late), a hub dataset (openai/gsm8k), or a
    benchmark (gsm8k, math500, mbpp) whose training split is then asked in the form in which its test is."""
    data: str | None = None
    """File or hub dataset that holds the benchmark named in source."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset, of a bundled world or of a benchmark."""
    where: dict[str, Any] = {}
    """Only rows with these values, by column: {level: [1, 2], subject: algebra}."""
    column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages."""
    tools_column: str | None = None
    """Column with the functions the model may call: JSON schemas, given to the chat template."""
    answer_column: str | None = None
    """Column with the reference answer, if there is one."""
    completion_column: str | None = None
    """Column with a response to train on where rollout.mix has a share `given`: text, or an assistant message; of the
    prompt's own column, the assistant turn after the prompt. Benchmarks and worlds bring their own."""
    image_column: str | None = None
    """Column with the images of a prompt: a path (seen from the source's folder), bytes, or a list of them. They stand
    in front of the user's first text, or where messages have image parts."""
    limit: PositiveInt | None = None
    """Problems used, from the start; null uses all."""
    teacher: str | None = None
    """The one of `teachers` that scores all its rows."""
    teacher_column: str | None = None
    """Column with the name of the teacher that scores a row, one of `teachers`."""

    @property
    def grades_itself(self) -> bool:
        """Whether it is a world or a benchmark, which judge responses themselves."""
        return self.source in (*WORLDS, *BENCHMARKS)

    @property
    def labelled(self) -> bool:
        """Whether responses can be judged."""
        return self.grades_itself or self.answer_column is not None


class MixedSource(SourceConfig):
    weight: PositiveFloat
    """Its prompts for each prompt of prompts.source: 0.5 is one for every two. It begins again where it ends."""


class PromptsConfig(SourceConfig):
    mix: Annotated[tuple[MixedSource, ...], Field(examples=[[{"source": "more.jsonl", "weight": 0.5}]])] = ()
    """Further sources, such as [{source: more.jsonl, weight: 0.5}]: a pass has all prompts of source once, and of each
    of these as many as its weight says, evenly spread."""
    chat: bool = True
    """Render with the chat template (a string becomes one user message); false uses the text as it is."""
    system: str | None = None
    """System prompt put in front of chat messages."""
    template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, such as {enable_thinking: false}."""
    teacher_view: ViewConfig = ViewConfig()
    """The teacher's own view of the same problem, where it differs from the student's."""
    images: Literal["files", "urls"] | None = None
    """Images that prompts may hold, in image_column or as parts of messages: files (paths and bytes); urls (also
    addresses, which are fetched); null is files with an image_column, else none. With images both models are loaded
    with what sees them, and with their processors."""
    max_tokens: PositiveInt = 1024
    """Longest prompt, in student tokens after the template, those of images included."""
    overlong: Literal["drop", "refuse"] = "drop"
    """What happens to longer prompts; either way they are counted and reported."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All that prompts come from; a problem's `meta["mix"]` is the place here (0 where it has none)."""
        return (self, *self.mix)

    @property
    def sees(self) -> bool:
        """Whether prompts may hold images."""
        return self.images is not None or any(source.image_column for source in self.sources)


def source_problems(prompts: PromptsConfig) -> Iterator[str]:
    """Settings that a benchmark or a bundled world has no use for, or that need a benchmark."""
    for place, s in enumerate(prompts.sources):
        path = f"prompts.mix.{place - 1}" if place else "prompts"
        if s.data is not None and s.source not in BENCHMARKS:
            yield f"{path}.data: is for a benchmark in source ({', '.join(BENCHMARKS)}), found {s.source!r}; remove it"
        unused = {"column": s.column != "prompt", "subset": s.subset, "where": s.where and s.source in WORLDS}
        columns = ("tools_column", "answer_column", "completion_column", "image_column")
        unused |= {key: getattr(s, key) for key in columns}
        hub = "; a hub dataset goes by owner/name" if s.source in BENCHMARKS else ""
        for key in (key for key, found in unused.items() if found and s.grades_itself):
            yield f"{path}.{key}: found {getattr(s, key)!r}, but {s.source} brings its own; remove it{hub}"
        column, brought = prompts.teacher_view.context_column, ("completion", *(["plan"] * (s.source == "tiny")))
        if s.grades_itself and column is not None and column not in brought:
            yield (
                f"prompts.teacher_view.context_column: found {column!r}, but {s.source} has nothing to show but "
                f"{' and '.join(brought)}"
            )
        if s.source in BENCHMARKS and (prompts.system or prompts.teacher_view.system):
            yield (
                f"prompts.system: {s.source} is asked as its test is, which has its own system turn or none; remove "
                "prompts.system and prompts.teacher_view.system"
            )


def context_problems(view: ViewConfig) -> Iterator[str]:
    """What is wrong with how the teacher is shown more than the student."""
    if view.context_column is None:
        if view.context_template is not None or view.context_place != "prompt":
            yield "prompts.teacher_view.context_column: found null beside a place or template for it; name the column"
        return
    wanted = ("{prompt}", "{context}") if view.context_place == "prompt" else ("{context}",)
    for name in (name for name in wanted if name not in view.template):
        yield f"prompts.teacher_view.context_template: {name} is missing in {view.template!r}; put it where it belongs"
