"""The part of the schema that says what is measured: tasks, evaluation, diagnosis. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from headstart.config.section import Count, Section

WORLDS = ("tiny", "late")
"""The bundled worlds: tasks, sources of prompts, and models as in tiny:student."""
BENCHMARKS = ("gsm8k", "math500", "mbpp", "aime", "humaneval", "humaneval_plus", "mbpp_plus")
"""Benchmarks that may be named as a source of prompts; those without a training split say where to find prompts."""


class TinyTask(Section):
    type: Literal["tiny", "late"] = "tiny"
    split: Literal["train", "dev", "test"] = "dev"
    """Choose settings on dev, report on test; train holds the prompts of training."""


class JsonlTask(Section):
    type: Literal["jsonl"] = "jsonl"
    path: Path = Field(examples=["problems.jsonl"])
    """JSONL, JSON or Parquet file with a prompt and an answer per row."""
    column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages."""
    answer_column: str = "answer"
    """Column with the reference answer."""
    image_column: str | None = None
    """Column with the images of a prompt, as prompts.image_column."""
    grader: Literal["exact", "number", "boxed", "math"] = "exact"
    """exact compares the stripped response; number the last number in it; boxed the last \\boxed{...}; math compares
    as the mathematics benchmarks do."""


class CustomTask(Section):
    type: Literal["custom"] = "custom"
    path: str = Field(examples=["my_package.tasks:MyTask"])
    """Your class, as package.module:Name; it must fit headstart.interfaces.Task."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of its constructor."""


class MathBenchmark(Section):
    type: Literal["gsm8k", "math500", "aime"] = "gsm8k"
    data: str | None = None
    """File or hub dataset with the problems; null says which to pass."""


class CodeBenchmark(Section):
    type: Literal["humaneval", "humaneval_plus", "mbpp_plus"] = "humaneval"
    data: str | None = None
    """File or hub dataset with the problems; null says which to pass."""
    sandbox: Literal["auto", "bwrap", "unshare", "unsafe"] = "auto"
    """Where programs run: bubblewrap, else unshare (auto); unsafe, never unasked, leaves all the user's files open."""


class MbppBenchmark(Section):
    type: Literal["mbpp"] = "mbpp"
    data: str | None = None
    """File or hub dataset with the problems; null says which to pass."""
    split: Literal["test", "train", "validation", "prompt", "all"] | None = None
    """Test holds the ids 11-510, train 601-974; null is test, but all of the sanitized file."""
    sandbox: Literal["auto", "bwrap", "unshare", "unsafe"] = "auto"
    """Where programs run: bubblewrap, else unshare (auto); unsafe, never unasked, leaves all the user's files open."""


class BfclTask(Section):
    type: Literal["bfcl"] = "bfcl"
    data: str | None = None
    """Folder or hub dataset with the questions and possible answers; null says which to pass."""
    categories: tuple[Literal["simple", "multiple", "parallel", "parallel_multiple", "irrelevance"], ...] = (
        "simple",
        "multiple",
    )
    """Which parts of the benchmark; for responses made elsewhere all that the data holds, unless given."""
    style: Literal["auto", "template", "prompt"] = "auto"
    """Functions through the chat template, or described in a system prompt; auto is template where it takes tools."""


Benchmark = MathBenchmark | CodeBenchmark | MbppBenchmark | BfclTask
"""Tasks that bring their own instructions."""
TaskConfig = Annotated[TinyTask | JsonlTask | Benchmark | CustomTask, Field(discriminator="type")]


class EvaluationConfig(Section):
    task: TaskConfig = Field(examples=[{"type": "tiny"}])
    """What is measured."""
    every: PositiveInt | None = None
    """Steps between evaluations; null evaluates only before the first and after the last step."""
    limit: PositiveInt | None = 200
    """Problems used, from the start of the task; null uses all."""
    samples: PositiveInt | None = None
    """Samples per problem; null is the task's own number."""
    temperature: Annotated[float, Field(ge=0.0)] | None = None
    """Sampling temperature, 0 is greedy; null is the task's own."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Nucleus; null is the task's own."""
    top_k: Count | None = None
    """Most probable tokens kept, 0 for all; null is the task's own."""
    max_tokens: PositiveInt | None = None
    """Generation length, always independent of the training horizon; null is the task's own."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """A response ends in front of the first of these; null is the task's own (those of base models in code tasks)."""
    batch_size: PositiveInt | None = None
    """Responses decoded at once; null is as many as fit into the free memory, 256 at most. Changes no response."""
    seed: int = 0
    """Seed of every random draw of evaluations; the same at every step, so that steps compare in pairs."""


class PilotConfig(Section):
    horizons: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Horizons tried, most promising first; null takes those of the recommendation, else horizon.tokens, half and
    twice it."""
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    """Learning rates tried, most promising first; null takes the run's, a third and three times it."""
    budget: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Largest cost, as a share of the time of training.steps full-rollout steps."""


class DiagnosisConfig(Section):
    task: TaskConfig | None = None
    """Problems to probe, of a development split, not of the test; null uses the training prompts."""
    grader: Literal["exact", "number", "boxed"] = "boxed"
    """How the answers of training prompts are read: compared with prompts.answer_column, or with one another."""
    problems: PositiveInt = 64
    """Problems probed, from the start."""
    grid: tuple[Count, ...] | None = None
    """Prefix lengths, in completion tokens; null doubles from 4 up to the median response, eight at most."""
    max_tokens: PositiveInt | None = None
    """Longest response; null is that of diagnosis.task, else horizon.max_tokens, evaluation.max_tokens or the paper's
    3,584, as far as both models' contexts allow."""
    votes: Annotated[int, Field(ge=2)] = 4
    """Without reference answers: teacher responses whose majority answer is used."""
    batch_size: PositiveInt = 64
    """Responses decoded at once."""
    seed: int = 0
    """Seed of every random draw of the diagnosis."""
    pilot: PilotConfig = PilotConfig()
    """What `headstart diagnose --pilot` tries."""
