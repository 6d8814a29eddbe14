"""The one schema behind YAML files, `section.key=value` overrides and Python. Imports no torch.

Closed (unknown keys are errors), frozen, `type`-tagged unions. The defaults are the settings of the Early Stopping
Rollout paper (arXiv 2605.27028). A field's description is what `headstart config` prints beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from headstart.config.evaluation import DiagnosisConfig, EvaluationConfig
from headstart.config.horizon import FixedHorizon, Horizon, ProbesConfig, is_graded, problems_of
from headstart.config.images import image_problems
from headstart.config.models import IN_MEMORY, ServedTeacher, TeacherConfig, served_problems, tail_problems
from headstart.config.models import ModelConfig as ModelConfig
from headstart.config.prompts import PromptsConfig as PromptsConfig
from headstart.config.prompts import ViewConfig as ViewConfig
from headstart.config.prompts import context_problems, source_problems
from headstart.config.rollout import RolloutConfig, mix_problems, server_problems
from headstart.config.section import Count, Decay, Section, Share
from headstart.config.teachers import NamedTeacher, alone, several_problems


class LoraTuning(Section):
    type: Literal["lora"] = "lora"
    r: PositiveInt = 32
    """Rank."""
    alpha: PositiveFloat = 64
    """Scale; the update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Dropout on the adapter's input during training (never during sampling)."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Module names to adapt; all-linear is every projection except the output head."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class FullTuning(Section):
    type: Literal["full"] = "full"
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


Tuning = Annotated[LoraTuning | FullTuning, Field(discriminator="type")]


class NoSharding(Section):
    type: Literal["none"] = "none"


class FsdpSharding(Section):
    type: Literal["fsdp"] = "fsdp"
    size: PositiveInt | None = None
    """Ranks that one copy of a model is divided over; null is all of them, or all that `replicate` leaves."""
    replicate: PositiveInt | None = None
    """Copies, each divided over `size` neighbours (the ranks of a machine); null is as many as there are ranks for."""


Sharding = Annotated[NoSharding | FsdpSharding, Field(discriminator="type")]


class FullSupport(Section):
    type: Literal["full"] = "full"


class TopKSupport(Section):
    type: Literal["top_k"] = "top_k"
    k: PositiveInt = 64
    """The student's k most probable tokens; everything else is one tail bucket."""
    tail: Literal["bucket", "unbiased"] = "bucket"
    """bucket: a lower bound. unbiased (reverse KL, temperature 1, top_p 1, top_k 0): the sampled token adds what the
    bucket hides, so that value and gradient are exact in the mean."""


class SampledSupport(Section):
    type: Literal["sampled"] = "sampled"


Support = Annotated[FullSupport | TopKSupport | SampledSupport, Field(discriminator="type")]


Alignment = Literal["coarse", "strict", "byte", "other", "chunk", "sorted"]


class _Divergence(Section):
    alignment: Alignment | None = None
    """How a teacher with another tokenizer is compared; null is coarse, and plain ids where the tokenizer is the same.
    coarse: every token counts for the longest token of both that it starts with. strict: only tokens of both, where
    they start and end together. byte: coarse, and rows inside the teacher's tokens. Controls for studies: other (tokens
    of both and one bucket), chunk (probability of whole spans), sorted (probabilities by size)."""
    mixture: Literal["losses", "distributions"] | None = None
    """With several teachers that score every row: the weighted sum of the divergences from each (losses, also null), or
    the divergence from the weighted sum of their distributions."""


class ReverseKL(_Divergence):
    type: Literal["reverse_kl"] = "reverse_kl"
    support: Support = FullSupport()
    """Tokens the divergence is summed over: full (exact), top_k (with a tail bucket), sampled (policy gradient)."""


class ForwardKL(_Divergence):
    type: Literal["forward_kl"] = "forward_kl"
    support: Support = FullSupport()
    """Tokens the divergence is summed over: full (exact), top_k (with a tail bucket), sampled (policy gradient)."""


class GeneralizedJSD(_Divergence):
    type: Literal["jsd"] = "jsd"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """beta * KL(teacher || m) + (1 - beta) * KL(student || m) with m = beta * teacher + (1 - beta) * student."""
    support: Support = FullSupport()
    """Tokens the divergence is summed over: full (exact), top_k (with a tail bucket), sampled (policy gradient)."""


class CrossEntropy(Section):
    type: Literal["sft"] = "sft"
    """-ln p of each token: supervised fine-tuning on the text of rollout.mix; the teacher is not asked."""
    alignment: ClassVar[None] = None
    mixture: ClassVar[None] = None
    support: ClassVar[Support] = FullSupport()


DivergenceConfig = Annotated[ReverseKL | ForwardKL | GeneralizedJSD | CrossEntropy, Field(discriminator="type")]


class AllTokens(Section):
    type: Literal["all"] = "all"


class PlacedTokens(Section):
    type: Literal["first", "last", "middle", "random", "window"] = "first"
    """Which of a rollout's tokens: the first, the last, those around its middle, random ones, or a random run of
    neighbours."""
    tokens: PositiveInt = 100
    """Tokens trained per rollout; all of a shorter one."""


class TopTokens(Section):
    type: Literal["top"] = "top"
    by: Annotated[tuple[Literal["divergence", "student_entropy", "teacher_entropy"], ...], Field(min_length=1)] = (
        "divergence",
    )
    """The signal whose largest values are trained; several are multiplied."""
    tokens: PositiveInt = 100
    """Tokens trained per rollout; all of a shorter one."""


class FormatTokens(Section):
    type: Literal["format"] = "format"
    classes: Annotated[tuple[Literal["number", "word", "symbol", "space", "stop"], ...], Field(min_length=1)] = (
        "number",
    )
    """Tokens trained, by what their text is made of."""
    tokens: PositiveInt | None = None
    """Tokens of these classes trained per rollout, random ones; null is all of them."""


Selection = Annotated[AllTokens | PlacedTokens | TopTokens | FormatTokens, Field(discriminator="type")]


class OptimizerConfig(Section):
    type: Literal["adamw"] = "adamw"
    lr: PositiveFloat | None = None
    """Peak learning rate; null is 5e-5 for LoRA and 5e-6 for full fine-tuning."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of AdamW's running averages of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay."""
    clip: PositiveFloat = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""


class ScheduleConfig(Section):
    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up; cosine and linear end at zero."""
    warmup: Share = 0.1
    """Share of the steps with a linearly growing learning rate."""
    restarts: tuple[PositiveInt, ...] = ()
    """Steps after which warm-up and decay begin anew, over the steps up to the next; --resume RUN training.steps=+200
    adds the one it extends a run from."""


class TrainingConfig(Section):
    steps: PositiveInt = 200
    """Optimizer steps."""
    prompts_per_step: PositiveInt = 16
    """Prompts per step, over all ranks together."""
    micro_batch: PositiveInt | None = None
    """Rollouts per forward and backward pass at most; null goes by memory_budget_gib. Never changes the gradient."""
    memory_budget_gib: Literal["auto"] | PositiveFloat = "auto"
    """GiB for a forward and backward pass beside weights and optimizer; auto is most of what is free at the start."""
    denominator: Literal["trajectory", "token", "sum"] = "trajectory"
    """Mean over a rollout's window, then over rollouts (the paper); mean over all tokens; or the sum over each window,
    then the mean over rollouts."""
    seed: int = 0
    """Seed of every random draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs; auto is a GPU if there is one."""
    logit_chunk: PositiveInt | None = None
    """Completion tokens whose logits exist at once; null is chosen from the vocabulary (about 256 MiB)."""


class CheckpointConfig(Section):
    every: PositiveInt = 50
    """Steps between checkpoints; one is also written at the end and on SIGINT or SIGTERM."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the best evaluation."""


class TrackingConfig(Section):
    rollouts_every: Count = 10
    """Steps between sample rollouts with prompt, verdict and per-token divergence, saved in rollouts/ and sent to the
    trackers; those of the first and the last step are there, too. The terminal shows about ten of a run. 0 never."""
    rollouts_saved: PositiveInt = 4
    """Rollouts saved each time."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the package tensorboard)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the package wandb)."""
    trackio: str | None = None
    """Also log to this trackio project, on this machine (needs the package trackio)."""


class OutputConfig(Section):
    dir: Path | None = None
    """Run folder; --out on the command line wins. Null makes runs/<config name>-<time>."""
    format: Literal["merged", "adapter", "both"] = "merged"
    """What a LoRA run leaves in model/: full merged weights, the adapter, or both."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the merged weights in model/; auto is that of the student's checkpoint on disk, or the one it was trained
    in where that is smaller. An adapter stays as trained."""
    push: str | None = Field(None, examples=["me/my-student"])
    """Repository on the hub that model/ is uploaded to when the run ends; null uploads nothing."""
    private: bool = True
    """Whether a repository that `push` makes is private; one that exists stays as it is."""


class Config(Section):
    """A whole run."""

    student: ModelConfig = Field(examples=[{"path": "Qwen/Qwen2.5-Math-1.5B"}])
    """The model that samples the rollouts and is trained."""
    teacher: TeacherConfig = Field(examples=[{"path": "Qwen/Qwen3-1.7B"}])
    """The model whose distribution the student is trained towards; it is never changed."""
    teachers: tuple[NamedTeacher, ...] = ()
    """Several teachers in place of `teacher`: [{name: math, path: ...}, {name: code, path: ...}]. Rows name theirs
    (prompts.teacher_column, prompts.teacher), or all teachers score every row, by weight."""
    tuning: Tuning = LoraTuning()
    """Which of the student's weights are trained."""
    sharding: Sharding = NoSharding()
    """Whether each rank of torchrun has both models whole (none), or a part of every weight (fsdp)."""
    prompts: PromptsConfig = Field(examples=[{"source": "openai/gsm8k", "subset": "main", "column": "question"}])
    """The problems that responses are sampled for."""
    rollout: RolloutConfig = RolloutConfig()
    """How the student's rollouts are sampled, and where."""
    horizon: Horizon = FixedHorizon()
    """How many completion tokens a rollout has at most."""
    probes: ProbesConfig = ProbesConfig()
    """Long rollouts, now and then, that measure what lies beyond the horizon; their cost is in the run's totals."""
    divergence: DivergenceConfig = ReverseKL()
    """What is minimised at every sampled position."""
    selection: Selection = AllTokens()
    """Which of the sampled tokens are trained; the loss is a mean over these."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Learning rate, weight decay and gradient clipping."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate changes over the run."""
    training: TrainingConfig = TrainingConfig()
    """Steps, batch size, memory, seed and device."""
    evaluation: EvaluationConfig | None = None
    """How accuracy is measured during the run; null does not measure it."""
    diagnosis: DiagnosisConfig = DiagnosisConfig()
    """How `headstart diagnose` measures where the teacher stops teaching."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state of the run is saved."""
    tracking: TrackingConfig = TrackingConfig()
    """What is logged beside metrics.jsonl and the console."""
    output: OutputConfig = OutputConfig()
    """Where the run folder is and what it ends with."""

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.teachers:
            object.__setattr__(self, "teacher", alone(self.teachers[0]))
        if problems := [*problems_of(self.horizon, self.probes), *self._horizon_conflicts(), *self._other_conflicts()]:
            raise ValueError("\n".join(problems))
        if self.student.chat_template == "teacher":  # what is written says where that is
            place = self.teacher_tokenizer.chat_template or self.teacher_tokenizer.path
            object.__setattr__(self, "student", self.student.model_copy(update={"chat_template": place}))
        return self

    @model_serializer(mode="wrap")
    def _written(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With several teachers `teacher` stands for the first of them, and is not written."""
        data: dict[str, Any] = written(self)
        return {key: value for key, value in data.items() if key != "teacher" or not self.teachers}

    def _horizon_conflicts(self) -> Iterator[str]:
        """Where the horizon does not fit the rest of the run."""
        h = self.horizon
        labelled = self.prompts.source == IN_MEMORY or any(source.labelled for source in self.prompts.sources)
        if is_graded(h) and not labelled and not self.probes.label_free:
            yield (
                f"horizon.type: {h.type} judges responses, and prompts.answer_column is null; name the column with the "
                "answers, or set probes.label_free true to go by agreement with the teacher's majority answer"
            )
        weighted = getattr(h, "weighted", False)
        if weighted and self.training.denominator != "sum":
            yield (
                f"training.denominator: found {self.training.denominator}, but weights 1 / P(H >= t) are exact only "
                "with sum: the others divide by how long the cut rollouts are; use training.denominator sum, or "
                "horizon.weighted false"
            )
        if weighted and self.selection.type != "all":
            yield (
                f"selection.type: found {self.selection.type}, but horizon.weighted weighs every sampled token; use "
                "selection {type: all}, or horizon.weighted false"
            )

    def _other_conflicts(self) -> Iterator[str]:
        yield from source_problems(self.prompts)
        yield from context_problems(self.prompts.teacher_view)
        yield from server_problems(self.rollout, self.tuning.type)
        yield from tail_problems(self)
        yield from several_problems(self)
        yield from mix_problems(self)
        yield from image_problems(self)
        if any(isinstance(teacher, ServedTeacher) for teacher in (self.teacher, *self.teachers)):
            yield from served_problems(self)
        if self.divergence.support.type == "sampled" and self.rollout.temperature == 0:
            yield (
                "divergence.support: type sampled needs rollout.temperature > 0 (found 0): greedy rollouts carry no "
                "policy gradient; use support {type: full}"
            )
        micro, budget = self.training.micro_batch, self.training.memory_budget_gib
        if micro is not None and budget != "auto":
            yield (
                f"training.micro_batch: found {micro} beside memory_budget_gib {budget:g}; both say how a step is "
                "divided, so drop one of them"
            )
        if list(self.legs) != sorted(set(self.legs)):
            yield (
                f"schedule.restarts: found {list(self.schedule.restarts)} with training.steps {self.training.steps}; "
                "they must rise and lie below training.steps"
            )
        kind, adapter = self.output.format, self.student.adapter
        if kind == "adapter" and self.output.dtype != "auto":
            yield f"output.dtype: {self.output.dtype} needs merged weights; use output.format both, or dtype auto"
        if kind != "merged" and self.tuning.type == "full":
            yield f"output.format: {kind} needs tuning.type lora (found full); use output.format merged"
        if kind != "merged" and adapter is not None:
            yield (
                f"output.format: {kind} cannot be used with student.adapter (found {adapter}): the new adapter fits "
                "only a student with that one merged; use output.format merged"
            )

    @property
    def teacher_tokenizer(self) -> ModelConfig:
        """Where the teacher's tokenizer is."""
        return (
            self.teacher.tokenizer_source or self.student if isinstance(self.teacher, ServedTeacher) else self.teacher
        )

    @property
    def routed(self) -> bool:
        """Whether rows name the one of several teachers that scores them."""
        return any(source.teacher or source.teacher_column for source in self.prompts.sources)

    @property
    def teacher_is_start(self) -> bool:
        """Whether the teacher is what the student starts from, and adapters leave its weights alone: they are loaded
        once for both."""
        here = self.sharding.type == "none" and not self.teachers and not self.student.path.endswith(IN_MEMORY)
        alone = here and self.tuning.type == "lora"
        skipped = {"type", "chat_template"}
        return (
            alone
            and isinstance(self.teacher, ModelConfig)
            and self.teacher.model_dump(exclude=skipped) == self.student.model_dump(exclude=skipped)
        )

    @property
    def sees(self) -> bool:
        """Whether prompts of the training, the evaluation or the diagnosis may hold images."""
        tasks = (self.evaluation.task if self.evaluation else None, self.diagnosis.task)
        return self.prompts.sees or any(getattr(task, "image_column", None) for task in tasks)

    @property
    def legs(self) -> tuple[int, ...]:
        """The steps at which the schedule's legs end; the last ends the run."""
        return (*self.schedule.restarts, self.training.steps)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, with the paper's defaults filled in."""
        return self.optimizer.lr or (5e-5 if self.tuning.type == "lora" else 5e-6)
