"""What a verb starts from: a configuration and the files it names, or what is in memory in their place (the models of a
Pair, prompts), with settings as keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from headstart.assemble.pair import Pair, described, frozen, load_pair, prepare_student
from headstart.assemble.several import load_panel, shown_to_several
from headstart.config.differences import flat
from headstart.config.loader import for_teacher, parse
from headstart.config.models import IN_MEMORY
from headstart.config.schema import Config
from headstart.errors import ConfigError, ModelError, RunFolderError
from headstart.models.load import load_tokenizer
from headstart.models.lora import remove_adapter, unwrap
from headstart.models.quiet import quiet
from headstart.models.templates import PromptSet, build_prompts
from headstart.ranks.runtime import Runtime
from headstart.records import Problem
from headstart.tasks.prompts import load_problems
from headstart.train.checkpoint import weights_sha256

STUDENT = "student/weights in memory"
"""The part of the inputs that says which weights the student had."""


@dataclass
class Sources:
    """A configuration, and the models and prompts that came from Python in place of what it names."""

    config: Config
    pair: Pair | None = None
    given: Iterable[Any] | None = None
    prepared: Any = None
    """The student as it is trained, once `open` has prepared it."""

    @cached_property
    def tokenizers(self) -> tuple[Any, Any]:
        """The student's and the teacher's."""
        if self.pair is not None:
            return self.pair.tokenizer, self.pair.teacher_tokenizer
        sees = self.config.sees
        return load_tokenizer(self.config.student, sees=sees), load_tokenizer(self.config.teacher_tokenizer, sees=sees)

    @cached_property
    def readers(self) -> dict[str, Any]:
        """The tokenizers of several teachers, by name; empty with one."""
        named = {one.name: for_teacher(self.config, one.name).teacher_tokenizer for one in self.config.teachers}
        return {name: load_tokenizer(source) for name, source in named.items()}

    def shown(self, problems: Sequence[Problem]) -> PromptSet:
        """Problems as the student and its teachers read them. Raises as `build_prompts`."""
        if self.config.teachers:
            return shown_to_several(problems, self.tokenizers[0], self.readers, self.config)
        return build_prompts(problems, *self.tokenizers, self.config.prompts)

    @cached_property
    def parts(self) -> dict[str, str]:
        """Digests of the weights in memory, as parts of a run's inputs."""
        if self.pair is None:
            return {}
        return {
            name: f"sha256 {weights_digest(model.model)}"
            for name, model in zip((STUDENT, "teacher/weights in memory"), self.pair.models, strict=True)
        }

    @property
    def trained(self) -> Any:
        """The transformers model that was trained in place, if any."""
        return self.pair.student.model if self.pair is not None and self.prepared is not None else None

    def runtime(self) -> Runtime:
        """This process among its peers, where the models are. Raises ConfigError where a setting says otherwise."""
        asked = self.config.training.device
        if self.pair is None:
            return Runtime.start(asked)
        device = self.pair.student.device
        runtime = Runtime.start(device.type)
        alone = replace(runtime, device=device) if runtime.world_size == 1 else runtime
        if asked not in ("auto", device.type) or alone.device != device:
            where = asked if asked != "auto" else str(runtime.device)
            raise ConfigError(
                f"the models in memory are on {device}, the run on {where}; move both there: .to({where!r})"
            )
        return alone

    def problems(self, say: Callable[[str], None] = lambda text: None) -> list[Problem]:
        """What is asked in training."""
        return load_problems(self.config.prompts, self.given, say)

    def open(self, runtime: Runtime, longest: int = 1) -> Pair:
        """The pair, ready to train. `longest` is the longest prompt, which with several teachers decides whether they
        fit together. Raises ConfigError or ModelError where models in memory cannot be trained."""
        if self.config.teachers:
            return load_panel(self.config, runtime, self.tokenizers[0], self.readers, longest)
        if self.pair is None:
            return load_pair(self.config, runtime, *self.tokenizers)
        student, teacher = (model.model for model in self.pair.models)
        if student is teacher:
            raise ConfigError("student and teacher are the same object, and training would change both; load it twice")
        if self.config.sharding.type != "none":
            raise ConfigError("sharding divides models while they are loaded; give paths, or set sharding.type=none")
        if getattr(student, "is_quantized", False):
            raise ModelError("the student is quantized, and cannot be trained; load it in bfloat16 or float32")
        if unwrap(student) is not student:
            raise ModelError("the student has an adapter; merge it before: model = model.merge_and_unload()")
        self.prepared = prepare_student(student.eval(), self.config)
        return Pair(self.prepared, frozen(teacher.eval()), *self.tokenizers, config=self.config, runtime=runtime)

    @contextmanager
    def lent(self, *, trained: bool) -> Iterator[None]:
        """While entered, models in memory may be prepared and trained. Afterwards they are plain and as trainable as
        they were; what the student has learned stays (`trained`), folded into its weights, unless an error ended it."""
        models = [model.model for model in self.pair.models] if self.pair else []
        flags = [(p, p.requires_grad) for model in models for p in model.parameters()]
        done = False
        try:
            yield
            done = trained
        finally:
            if self.prepared is not None:
                remove_adapter(self.prepared.eval(), merged=done)
                if self.config.tuning.gradient_checkpointing:
                    with quiet():  # as in prepare_student
                        models[0].gradient_checkpointing_disable()
            for parameter, flag in flags:
                parameter.requires_grad_(flag).grad = None


def sources(subject: Config | Pair, prompts: Any = None, settings: Mapping[str, Any] | None = None) -> Sources:
    """`subject` with `settings` (sections, or keys such as {"training.steps": 6}) on top. `prompts` are those
    themselves, or settings of their section. Raises ConfigError as `config.loader.parse` does."""
    pair = subject if isinstance(subject, Pair) else None
    config = subject.config if isinstance(subject, Pair) else subject
    asked, given = dict(settings or {}), None
    if isinstance(prompts, Mapping):
        asked["prompts"] = prompts
    elif prompts is not None:
        given = prompts if hasattr(prompts, "with_format") else list(prompts)
        asked["prompts"] = {"source": IN_MEMORY, "data": None, "subset": None, "split": "train"}
    if not asked and pair is None:
        return Sources(config, given=given)
    data = config.model_dump(mode="json")
    if pair is not None:
        data |= {
            who: {**data[who], **described(m.model)} for who, m in zip(("student", "teacher"), pair.models, strict=True)
        }
        if wrong := [key for key in asked if key.split(".")[0] in ("student", "teacher", "teachers")]:
            raise ConfigError(f"{wrong[0]}: the models of a Pair are in memory; change them there and leave this out")
    return Sources(parse(data, list(flat(asked).items())), pair, given)


def of_run(pair: Pair, config: Config, recorded: Mapping[str, str]) -> Pair:
    """`pair` with the configuration of a run. Raises RunFolderError where the run started from other weights."""
    for name, now in Sources(config, pair).parts.items():
        if (then := recorded.get(name)) != now:
            raise RunFolderError(
                f"the {name} are not those the run started from ({then or 'which were files'}; now {now}); a student "
                "is trained in place: load it again"
            )
    return pair.with_config(config)


def weights_digest(model: Any) -> str:
    """Of every weight's name, shape and some thousand values spread over it."""
    weights = {f"{name} {tuple(w.shape)}": w.reshape(-1) for name, w in model.state_dict().items()}
    return weights_sha256({name: w[:: max(1, len(w) // 4096)] for name, w in weights.items()})
