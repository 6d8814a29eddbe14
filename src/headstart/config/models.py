"""The part of the schema that names models: a student, and a teacher on this machine or at a URL. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveFloat, Tag

from headstart.config.horizon import needs_probes
from headstart.config.section import Section

if TYPE_CHECKING:
    from headstart.config.schema import Config

IN_MEMORY = "in memory"
"""Stands for the path of a model, or the source of prompts, that was passed in from Python."""


class ModelConfig(Section):
    path: str = Field(examples=["Qwen/Qwen3-1.7B"])
    """Folder with a Hugging Face checkpoint, or a hub name such as Qwen/Qwen3-1.7B."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' type; auto is bfloat16 on a GPU and float32 on a CPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; auto lets transformers choose."""
    adapter: str | None = None
    """A peft adapter to load and merge before anything else."""
    chat_template: str | None = None
    """A .jinja file, or the folder or hub name of the model whose chat template is taken; null is its own. A student's
    may be `teacher`: the teacher's. It is written with the final model."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint. Off unless you trust its author."""


class TeacherModel(ModelConfig):
    # Left out where a configuration is written: a teacher without a type is a model on this machine.
    type: Literal["local"] = Field("local", exclude=True)


class ServedTeacher(Section):
    type: Literal["server"] = "server"
    urls: Annotated[tuple[str, ...], Field(min_length=1, examples=[["http://localhost:8000"]])]
    """Servers of this one teacher, asked in turn: vLLM, or any completions endpoint that returns log-probabilities of
    prompts. An API key comes from the environment variable HEADSTART_API_KEY."""
    model: str | None = None
    """Name that it is served under; null where a server has only one."""
    tokenizer: str | None = None
    """Folder or hub name of the teacher's tokenizer; null where it is the student's."""
    trust_remote_code: bool = False
    """Run code that comes with the tokenizer. Off unless you trust its author."""
    timeout: PositiveFloat = 120.0
    """Seconds that one request may take."""
    deadline: PositiveFloat = 600.0
    """Seconds after which a request that keeps failing ends the run, with a checkpoint."""

    @property
    def path(self) -> str:
        """What this teacher is called where a model on this machine goes by its path."""
        return f"{self.model or self.tokenizer or 'a model'} at {self.urls[0]}"

    revision: ClassVar[None] = None
    adapter: ClassVar[None] = None

    @property
    def tokenizer_source(self) -> ModelConfig | None:
        """Where its tokenizer is; None where that is the student's."""
        if self.tokenizer is None:
            return None
        return ModelConfig(path=self.tokenizer, trust_remote_code=self.trust_remote_code)


def teacher_kind(value: Any) -> str:
    """The `type` of a teacher's section; a model on this machine where there is none."""
    return value.get("type", "local") if isinstance(value, dict) else getattr(value, "type", "local")


def _teacher_model(value: Any) -> Any:
    return value.model_dump() if type(value) is ModelConfig else value


TeacherConfig = Annotated[
    Annotated[TeacherModel, BeforeValidator(_teacher_model), Tag("local")] | Annotated[ServedTeacher, Tag("server")],
    Discriminator(teacher_kind),
]


def tail_problems(config: Config) -> Iterator[str]:
    """Where an unbiased tail (`divergence.support.tail`) would be biased."""
    divergence, rollout, rule = config.divergence, config.rollout, config.selection
    if getattr(divergence.support, "tail", "bucket") != "unbiased":
        return
    bucket = "or use tail bucket, which depends on no sampled token"
    if divergence.type != "reverse_kl":
        yield f"divergence.support.tail: unbiased is for reverse_kl only (found {divergence.type}); use tail bucket"
    if (rollout.temperature, rollout.top_p, rollout.top_k) != (1.0, 1.0, 0):
        yield (
            "divergence.support.tail: unbiased is exact in the mean only for tokens drawn from the student's own "
            f"distribution (found rollout.temperature {rollout.temperature:g}, top_p {rollout.top_p:g}, top_k "
            f"{rollout.top_k}); set temperature 1, top_p 1, top_k 0, {bucket}"
        )
    if rule.type == "top" and "divergence" in rule.by:
        yield (
            "selection.by: divergence depends on the sampled token where divergence.support.tail is unbiased, and a "
            f"choice by it is biased; select by student_entropy, {bucket}"
        )
    if divergence.alignment is not None:
        yield (
            f"divergence.support.tail: unbiased needs one vocabulary (found alignment {divergence.alignment}): sampled "
            "tokens are no draws from the events compared; use tail bucket"
        )


def served_problems(config: Config) -> Iterator[str]:
    """What needs more of a teacher at a URL than log-probabilities of candidates."""
    d, h, here = config.divergence, config.horizon, "or load the teacher here (teacher.path)"
    kind = f"found {d.type} with support {d.support.type}"
    if d.type != "reverse_kl" or d.support.type == "full":
        yield (
            f"divergence: {kind}, but a teacher at a URL scores candidate tokens only; use reverse_kl with support "
            f"{{type: top_k, k: 64}}, {here}"
        )
    if d.alignment not in (None, "strict") or (d.alignment and d.support.type == "sampled"):
        yield (
            f"divergence.alignment: found {d.alignment} with support {d.support.type}; with another tokenizer a "
            f"teacher at a URL needs alignment strict and support {{type: top_k}}, {here}"
        )
    if config.selection.type == "top" and "teacher_entropy" in config.selection.by:
        yield f"selection.by: teacher_entropy is not known of a teacher at a URL; use another signal, {here}"
    if h.type == "overlap" or needs_probes(h) or (h.type == "diagnosed" and h.folder is None):
        fixed = "use horizon {type: fixed}"
        yield f"horizon.type: {h.type} reads more of the teacher than a URL gives; {fixed}, {here}"
    if config.probes.every:
        yield f"probes.every: found {config.probes.every}; probes need the teacher's own continuations: set 0, {here}"
