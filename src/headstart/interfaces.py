"""The Protocols that rooms meet through. A plug-in is any object that fits one of them. No torch at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict

from headstart.records import (
    Continuations,
    EvalReport,
    LongReadings,
    PrefixState,
    Problem,
    Prompt,
    Rollout,
    SampleRollout,
    Sampling,
    StepReport,
    StepTokens,
    Verdict,
)

if TYPE_CHECKING:
    from torch import Tensor

    from headstart.models.causal import CausalModel


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


class Draws(TypedDict):
    """What `RolloutEngine.generate` is asked beside the prompts, for an engine that hands it to another."""

    samples: int
    max_tokens: int | Sequence[int]
    sampling: Sampling
    key: tuple[int, str, int]
    batch_size: NotRequired[int | None]
    finished: NotRequired[Callable[[Rollout], None]]
    candidates: NotRequired[int]
    prefill: NotRequired[Any]


class RolloutEngine(Protocol):
    """Samples completions from one model. One that inherits from this needs `generate` alone."""

    def sync(self, step: int) -> None:
        """Called on every rank before sampling with the weights after `step` optimizer steps: an engine that holds a
        copy of them elsewhere replaces it."""
        return

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int | Sequence[int],
        sampling: Sampling,
        key: tuple[int, str, int],
        batch_size: int | None = None,
        finished: Callable[[Rollout], None] = ...,
        candidates: int = 0,
        prefill: Any = None,
    ) -> list[Rollout]:
        """`samples` rollouts for every prompt, prompt-major, each at most `max_tokens` (the horizon) long:
        one number for all, or one for each prompt.

        `key` is (seed, purpose, step). With the prompt's index, the sample index and the position it decides every
        draw, so neither the order nor the grouping of the prompts changes a rollout. `batch_size` bounds how many
        rollouts are decoded at once (all by default). `finished` is called with every rollout as soon as it ends.
        With `candidates` each rollout has that many `candidate_ids` per token, from the raw distribution. `prefill` is
        what `prefill` returned for these prompts, if that is not None.
        A step calls it on every rank, also where `prompts` is empty: a divided model takes all ranks.
        """
        ...

    def prefill(self, prompts: Sequence[Prompt]) -> Any:
        """A prefill of `prompts` that sampling and the training that follows can both start from; None where there is
        none to share."""
        return None

    def alone(self) -> AbstractContextManager[None]:
        """While entered, calls on this rank need not be those of other ranks. Entering and leaving are collective."""
        return nullcontext()

    def fitting(self, prompts: Sequence[Prompt], max_tokens: int) -> int | None:
        """The `batch_size` that fits into memory for these prompts; None where the engine decides on its own."""
        return None


class LogitSource(Protocol):
    """Logits of M completion tokens, made on demand so that `[M, V]` never has to exist at once."""

    def logits(self, rows: slice | Tensor) -> Tensor:
        """Raw logits (temperature 1) cut to the shared vocabulary, `[rows, V]`, float32."""
        ...


class Teacher(Protocol):
    """Scores every position of the student's rollouts. One that inherits from this needs `score` alone."""

    @property
    def model(self) -> CausalModel | None:
        """The model whose passes take memory beside the student's; None where the teacher runs elsewhere."""
        return None

    @property
    def models(self) -> tuple[CausalModel, ...]:
        """The same where there may be several."""
        return () if self.model is None else (self.model,)

    @property
    def visits(self) -> bool:
        """Whether `models` are loaded one after the other, each for its part of a step."""
        return False

    @property
    def candidates(self) -> int:
        """How many `candidate_ids` per token its scores need; 0 where it scores the whole vocabulary."""
        return 0

    def horizon(self, prompt: Prompt, tokens: int) -> int:
        """Most completion tokens of a rollout of `prompt` where the step's horizon is `tokens`."""
        return tokens

    def submit(self, rollout: Rollout) -> None:
        """Called with every rollout of a step as soon as it has ended, while others are still being sampled: a teacher
        that runs elsewhere may start on it."""
        return

    def ready(self, rollouts: Sequence[Rollout]) -> None:
        """Wait for what scoring these needs from elsewhere. Raises ServerError where it does not come; `score` may then
        be called where one rank alone must not fail."""
        return

    def metrics(self) -> dict[str, float]:
        """Counts of this rank since the last call, which go summed over all ranks into a step's metrics."""
        return {}

    def prefill(self, prompts: Sequence[Prompt]) -> Any:
        """A prefill of `prompts` for `score`, done now or beside the student's decoding; None where there is none."""
        return None

    def align(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """`rollouts` with what the teacher can score of them (`Rollout.aligned`); as they are with one tokenizer."""
        return [*rollouts]

    def begin(self, micros: Sequence[Sequence[Rollout]]) -> None:
        """Called with all micro-batches of this rank's step before the first of them is scored."""
        return

    def score(self, rollouts: Sequence[Rollout], prefill: Any = None) -> LogitSource:
        """Logits at every scored completion token of `rollouts`, in row order, from the teacher's view of the prompts.
        `prefill` is what `prefill` returned for just these prompts, if that is not None."""
        ...


class Probe(Protocol):
    """Measures, at the end of a step and before the weights change, what its rollouts do not show.

    Everything is measured on rollouts of the step itself, on every rank, and gathered: all ranks get the same answers.
    """

    def long(self) -> LongReadings:
        """The student finishes the probed rollouts; both models are read on them. Measured once."""
        ...

    def continuations(self, length: int) -> Continuations:
        """The teacher continues the first `length` tokens of the probed rollouts; both endings are graded."""
        ...

    def teacher(self, length: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """The control: is the teacher right alone, and after the first `length` tokens of its own response?"""
        ...

    def metrics(self) -> dict[str, Any]:
        """What goes into the step's metrics: the cost (`probe_tokens`) and the readings that were taken."""
        ...


@dataclass(frozen=True, slots=True)
class Observation:
    """What a horizon policy is given after step `step` (from 0), the same on all ranks.

    `probe` is there on the steps of the probe schedule. `gradient(n)` is the gradient of the rollouts' first n tokens,
    summed over all ranks, one float64 vector; it costs a backward pass. `gradient(None)` is the step's own.
    """

    step: int
    horizon: int
    tokens: StepTokens
    probe: Probe | None
    gradient: Callable[[int | None], Tensor]


class HorizonPolicy(Protocol):
    """Decides how many completion tokens are sampled at all. The decision bounds generation itself."""

    def tokens(self, step: int) -> int:
        """The horizon N (tokens) for step `step`, which counts from 0."""
        ...

    def observe(self, seen: Observation) -> None:
        """Take in what the step measured: the only way from a measurement back to the horizon."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state, restored by `load_state_dict` on resume."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class TokenFactors(Protocol):
    """The loss side of a horizon: what the divergence of each sampled token is multiplied with."""

    signals: tuple[str, ...]
    """Readings of each token that it goes by: `gap` (ln student - ln teacher), `margin`."""

    def factors(self, length: int, signals: Mapping[str, Any]) -> Any:
        """Float array `[length]` for one rollout, from its own `signals` (`[length]` each)."""
        ...


class OnProgress(Protocol):
    """Called as work gets done: how much of it, out of how much, and what is being done."""

    def __call__(self, done: int, total: int, text: str = "", /) -> None: ...


def silent(done: int, total: int, text: str = "", /) -> None:
    """The OnProgress of those who do not watch."""


class Evaluator(Protocol):
    """Measures the student on a task, with a generation length that is independent of the training horizon."""

    def evaluate(
        self, step: int, interruptible: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> EvalReport:
        """The work is done inside `interruptible()`; StopRequested that is raised there is raised on every rank."""
        ...


class Tracker(Protocol):
    """Receives the events of a run: console, JSONL, TensorBoard, W&B, trackio. One that inherits from this need not
    show `samples`."""

    def step(self, report: StepReport) -> None: ...

    def evaluation(self, report: EvalReport) -> None: ...

    def samples(self, step: int, samples: Sequence[SampleRollout]) -> None:
        """Some of the rollouts of `step` (from 1), at the steps where they are saved."""
        return

    def message(self, text: str) -> None:
        """A line for the reader, such as a warning or a path just written."""
        ...

    def close(self) -> None: ...
