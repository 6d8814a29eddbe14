"""The records that travel through one training step, in the order they appear. No torch at run time.

Shape letters, used as suffixes of tensor names everywhere:
  B rollouts in a batch          P prompt positions (left-padded)     N completion positions (right-padded)
  T = P + N                      V shared vocabulary (after the cut)  K ids of a truncated support
  M scored completion tokens of a batch, in row order (b, n): all of them, but for a teacher with another tokenizer
  D hidden width
A worked example runs through the docstrings: two rollouts, a prompt of 3 and one of 2 tokens, horizon 4; the first
rollout stops after 2 tokens, the second reaches the horizon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

    from headstart.pictures import Picture


class Message(TypedDict):
    """One chat turn: `{"role": "user", "content": "2+2?"}`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with, where it has one, a verifiable answer.

    Exactly one of `messages` (chat turns, rendered with a chat template) and `text` (used as it is) is set. `images`
    stand in the messages, in order.
    Example: `Problem(id="gsm8k/17", messages=({"role": "user", "content": "2+2?"},), answer="4")`.
    """

    id: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    answer: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    completion: str | None = None
    """A response that comes with it, such as a reference solution."""
    images: tuple[Picture, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a grader says of one response.

    `status` is `correct`, `wrong`, `no_answer`, `bad_gold` (the reference cannot be used), `timeout` or `error`.
    `details` holds further yes/no readings of the task, averaged in reports:
    `Verdict(False, "wrong", {"plan_right": False, "faithful": True})`.
    """

    correct: bool
    status: str
    details: Mapping[str, bool] = field(default_factory=dict)
    answer: str | None = None
    """The answer that was read from the response, for majority votes."""


PrefixState = Literal["clean", "wrong", "finished", "unknown"]
"""State of a truncated response: still clean, already wrong, already finished, or the task cannot tell."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem as the two models read it.

    `index` is the problem's place in its source, or its slot in a training step: with the step and `sample_index` it
    keys every random draw. `token_ids` is the student's context, in sampling and in training alike, `teacher_token_ids`
    the teacher's own view (its chat template, its thinking mode) of the same problem; `images` and `teacher_images`
    what each is shown beside them (`models.images.Shown`). Example: `Prompt(0, "p0", (5, 6, 7), (5, 6, 7))`.
    `views` are there with several teachers: the names of those that score it, each with its own view; the first one's
    is `teacher_token_ids`.
    """

    index: int
    problem_id: str
    token_ids: tuple[int, ...]
    teacher_token_ids: tuple[int, ...]
    images: Any = None
    teacher_images: Any = None
    views: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def as_teacher(self) -> Prompt:
        """With the teacher's view in the student's place."""
        return replace(self, token_ids=self.teacher_token_ids, images=self.teacher_images)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Aligned:
    """A completion in the tokens of a teacher with another tokenizer.

    `ids` are the teacher's tokens of the same bytes, its stop token included. The student's token `rows[k]` is scored
    by the teacher's prediction of its token `teacher_rows[k]`: both follow the same bytes, but for `inside[k]`, the
    bytes of the teacher's token that the student has written already. `dropped`: the teacher's tokenizer does not give
    the completion's bytes back, so nothing is scored. `spans` are the shared starts and the last of them, where whole
    spans are compared (alignment `chunk`): then `rows` and `teacher_rows` are all tokens in them.
    Example: "ab", "c" against "a", "bc" is `Aligned(ids, rows=(0,), teacher_rows=(0,))`: "c" starts inside "bc".
    """

    ids: tuple[int, ...]
    rows: tuple[int, ...]
    teacher_rows: tuple[int, ...]
    inside: tuple[bytes, ...] = ()
    dropped: bool = False
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion.

    `completion_ids` holds the sampled tokens, the stop token included when one was sampled. `stopped` says that the
    last token is a stop token; otherwise the rollout reached its horizon, which is normal and never penalised.
    `aligned` is set where the teacher has another tokenizer.
    Example: rollout 0 is `(8, 2)` with `stopped=True` (2 is the stop id); rollout 1 is `(8, 9, 8, 9)`, not stopped.
    """

    prompt: Prompt
    sample_index: int
    completion_ids: tuple[int, ...]
    stopped: bool
    aligned: Aligned | None = None
    candidate_ids: Any = field(default=None, compare=False)
    """int64 array `[n, K]`, where a teacher asks for it: for each token the student's K - 1 most probable ids when it
    was drawn (-1 where there are fewer), then the token itself."""
    engine_logprobs: Any = field(default=None, compare=False)
    """float array `[n]`, where a server sampled: its log-probability of each token, temperature 1."""

    @property
    def rows(self) -> Sequence[int]:
        """Indices of the completion tokens that the teacher scores: all of them, but for a teacher with another
        tokenizer."""
        return range(len(self.completion_ids)) if self.aligned is None else self.aligned.rows


@dataclass(frozen=True, slots=True)
class SampleRollout:
    """A rollout of a training step for a reader, prompt and tokens as text.

    `divergence` in nats, one per token, 0 where it is not among the `scored`. `verdict`: `right`, `wrong`, `no answer`;
    of a cut one `already wrong`, `right so far` or `unfinished`; empty where nothing grades it.
    """

    problem_id: str
    sample_index: int
    prompt: str
    tokens: Sequence[str]
    divergence: Sequence[float]
    scored: int
    stopped: bool
    verdict: str = ""

    @property
    def ending(self) -> str:
        return "stopped" if self.stopped else "reached the horizon"

    @property
    def mean(self) -> float:
        """Nats per scored token."""
        return sum(self.divergence) / max(self.scored, 1)


class Result(dict[str, Any]):
    """What a verb returns: plain JSON types under their names on disk, and `str(result)`, what they say in words."""

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> dict[str, Any]:
        return dict(self)


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens of a packed row that stand side by side, in pieces of `width` each."""

    places: slice
    width: int


@dataclass(frozen=True, slots=True)
class PackedPrompts:
    """U different prompts in one row of L tokens; one with which another begins lies in that one and has no tokens of
    its own. `starts` are the places (in L) where they begin, `place_UP` those of each one's tokens, padded on the right
    with 0, and `real_UP` says which are tokens; `back_L` where in `[U, P]`, flattened, each token stands, None where
    nothing is padded; `last_U` the place of each one's last token; `runs` are neighbours of one length.
    """

    tokens: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    ids_L: Tensor
    position_L: Tensor
    place_UP: Tensor
    real_UP: Tensor
    back_L: Tensor | None
    last_U: Tensor
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Packing:
    """The different prompts, and B completions without their last tokens (they predict nothing) in one row of L tokens.

    `place_BN`, `back_L` and `runs` are as for the prompts; `prompt_B` says which prompt a completion continues;
    `predicts_M` which of the U last prompt tokens and then L completion tokens predicts each completion token, in row
    order; `follows` are tokens, and the prompt that they continue; `masks` those that attention has made of this, by
    sliding window (0 for none) and type.
    """

    prompts: PackedPrompts
    ids_L: Tensor
    position_L: Tensor
    place_BN: Tensor
    back_L: Tensor | None
    prompt_B: Tensor
    predicts_M: Tensor
    runs: tuple[Run, ...]
    follows: tuple[tuple[Run, Run], ...]
    masks: dict[tuple[int, Any], Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Rollouts as tensors, for one model's view of the prompt (int64 ids, bool masks).

    Example, student view, P = 3, N = 4, pad id 0:
      input_ids_BT       [[5, 6, 7, 8, 2, 0, 0],     completion_mask_BN [[1, 1, 0, 0],
                          [0, 5, 6, 8, 9, 8, 9]]                         [1, 1, 1, 1]]
      attention_mask_BT  1 where a real token stands; position_ids_BT counts real tokens from 0.
      tokens_M           [8, 2, 8, 9, 8, 9]           position_M [0, 1, 0, 1, 2, 3]      row_M [0, 0, 1, 1, 1, 1]
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    position_ids_BT: Tensor
    completion_mask_BN: Tensor
    tokens_M: Tensor
    position_M: Tensor
    row_M: Tensor
    packing: Packing | None = None  # the same tokens without padding, where the model can take them
    images_B: tuple[Any, ...] = ()  # what each row's prompt shows (`Prompt.images`), for a model that sees

    @property
    def prompt_width(self) -> int:
        """P, the number of (padded) prompt positions."""
        return int(self.input_ids_BT.shape[1] - self.completion_mask_BN.shape[1])


@dataclass(frozen=True, slots=True)
class Divergence:
    """The divergence at each completion token, in nats.

    `value_M` is what is reported (detached, float32, never negative for exact and top-k supports). `surrogate_M` is
    what is differentiated: the same number for exact and top-k supports, the policy-gradient form for the sampled one.
    `tail_M2`: the probabilities that student and teacher give to what a top-k support leaves out; None for others.
    """

    value_M: Tensor
    surrogate_M: Tensor
    tail_M2: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PositionStats:
    """Readings at each completion token, detached. Entropies in nats; `teacher_rank_M` 1 = the teacher's favourite."""

    student_entropy_M: Tensor
    teacher_entropy_M: Tensor
    student_logprob_M: Tensor
    teacher_logprob_M: Tensor
    teacher_rank_M: Tensor


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Every scored completion token of a step over all ranks, and of its rollouts; numpy arrays in row order, as in
    `PositionStats` and `RolloutBatch`. `scored_B` counts a rollout's scored tokens, 0 where its bytes were not the
    teacher's (`dropped_B`). `weight_M` is a token's coefficient in the loss; `overlap_M` (None unless a horizon goes by
    it) is the common share of both models' top-16 sets; `student_rest_M` and `teacher_rest_M` (None within one
    vocabulary) the probability of what the other model cannot express; `student_tail_M` and `teacher_tail_M` that of
    what a top-k support leaves out (None for other supports); `engine_logprob_M` what a server said that the token
    it sampled has (None in process). A `teacher_rank_M` of 0 and a `teacher_entropy_M` of NaN are not known.

    Example: lengths_B [2, 4], stopped_B [True, False], position_M [0, 1, 0, 1, 2, 3].
    """

    lengths_B: Any
    stopped_B: Any
    prompt_tokens: int
    position_M: Any
    weight_M: Any
    divergence_M: Any
    student_entropy_M: Any
    teacher_entropy_M: Any
    student_logprob_M: Any
    teacher_logprob_M: Any
    teacher_rank_M: Any
    scored_B: Any
    overlap_M: Any = None
    student_rest_M: Any = None
    teacher_rest_M: Any = None
    student_tail_M: Any = None
    teacher_tail_M: Any = None
    engine_logprob_M: Any = None
    dropped_B: Any = None


@dataclass(frozen=True, slots=True)
class LongReadings:
    """Some rollouts of a step, finished by the student, over all ranks (numpy arrays in row order).

    `stopped_B` says which ended by themselves within the longest length that is looked at.
    """

    lengths_B: Any
    stopped_B: Any
    position_M: Any
    divergence_M: Any
    overlap_M: Any


@dataclass(frozen=True, slots=True)
class Continuations:
    """Of the same problems, over all ranks: is the student's own response right, is the teacher's continuation of its
    first N tokens? Example, N = 16: the student is wrong twice and the teacher repairs one, `([0, 0], [1, 0])`."""

    student: tuple[bool, ...]
    after: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step (`step` counts from 1), global over all ranks, as it is written to `metrics.jsonl`. Every key
    is documented in `docs/reference/metrics.md`."""

    step: int
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How responses are sampled: `samples` per problem, at most `max_tokens` each, `batch_size` decoded at once (None:
    as many as fit). A response ends in front of the first of `stop_strings`."""

    samples: int
    sampling: Sampling
    max_tokens: int
    batch_size: int | None
    seed: int = 0
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GradedResponse:
    """One evaluated response: text, verdict, and how its generation ended (None for responses made elsewhere)."""

    problem_id: str
    sample_index: int
    response: str
    tokens: int | None
    stopped: bool | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class EvalReport:
    """An evaluation: `accuracy` is avg@k over problems with its 95% interval, all shares in 0..1.

    `details` averages the task's further readings (such as `plan_right`); `truncated` is the share of responses that
    did not stop within `max_tokens`.
    """

    task: str
    step: int
    problems: int
    samples: int
    accuracy: float
    interval: tuple[float, float]
    details: Mapping[str, float]
    truncated: float
    no_answer: float
    mean_tokens: float
    generated_tokens: int
    seconds: float
    settings: Mapping[str, Any]
    timeout: float = 0.0  # share of responses that the grader gave up on
    rows: tuple[GradedResponse, ...] = ()
