"""The Protocols that rooms meet through. A plug-in is any object that fits one of them. No torch at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from headstart.records import (
    EvalReport,
    PrefixState,
    Problem,
    Prompt,
    Rollout,
    Sampling,
    StepReport,
    Verdict,
)

if TYPE_CHECKING:
    from torch import Tensor


class Task(Protocol):
    """Problems and how to grade them."""

    name: str

    def problems(self) -> Sequence[Problem]:
        """All problems, in a fixed order. Raises DataError when the source is missing or malformed."""
        ...

    def grade(self, problem: Problem, response: str) -> Verdict:
        """Judge one response (decoded text, stop token removed). Never raises on hostile text."""
        ...

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        """What can be said of a truncated response; `unknown` where the task cannot tell."""
        ...


class RolloutEngine(Protocol):
    """Who speaks: samples completions from one model."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int,
        sampling: Sampling,
        key: tuple[int, str, int],
        batch_size: int | None = None,
        finished: Callable[[Rollout], None] = ...,
    ) -> list[Rollout]:
        """`samples` rollouts for every prompt, prompt-major, each at most `max_tokens` (the horizon) long.

        `key` is (seed, purpose, step). With the prompt's index, the sample index and the position it decides every
        draw, so neither the order nor the grouping of the prompts changes a rollout. `batch_size` bounds how many
        rollouts are decoded at once (all by default). `finished` hears every rollout as soon as it ends.
        """
        ...


class LogitSource(Protocol):
    """Logits of M completion tokens, made on demand so that `[M, V]` never has to exist at once."""

    def logits(self, rows: slice) -> Tensor:
        """Raw logits (temperature 1) cut to the shared vocabulary, `[rows, V]`, float32."""
        ...


class Teacher(Protocol):
    """Who judges: scores every position of the student's rollouts."""

    def score(self, rollouts: Sequence[Rollout]) -> LogitSource:
        """Logits at every completion token of `rollouts`, in row order, from the teacher's view of the prompts."""
        ...


class HorizonPolicy(Protocol):
    """Decides how many completion tokens are sampled at all. The decision bounds generation itself."""

    def tokens(self, step: int) -> int:
        """The horizon N (tokens) for step `step`, which counts from 0."""
        ...

    def observe(self, report: StepReport) -> None:
        """Hear what the step measured; the only arrow from measurement back to the horizon."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state, restored by `load_state_dict` on resume."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Evaluator(Protocol):
    """Measures the student on a task, with a generation length that is independent of the training horizon."""

    def evaluate(self, step: int) -> EvalReport: ...


class Tracker(Protocol):
    """Hears what happens in a run: console, JSONL, TensorBoard, W&B."""

    def step(self, report: StepReport) -> None: ...

    def evaluation(self, report: EvalReport) -> None: ...

    def message(self, text: str) -> None:
        """A line for the reader, such as a warning or a path just written."""
        ...

    def close(self) -> None: ...
