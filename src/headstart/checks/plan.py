"""Memory of a run on given devices, from both models' config.json alone: nothing is loaded and no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

from headstart.assemble.pair import frozen, prepare_student
from headstart.config.schema import Config, FullTuning, LoraTuning, ModelConfig
from headstart.errors import ConfigError
from headstart.models.causal import CausalModel
from headstart.models.decoder import FastDecoder
from headstart.models.load import load_outline
from headstart.models.memory import GIB, NEAR, Memory, MicroMemory
from headstart.models.sharded import shape
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt

MOST = 64
"""Nodes up to which the smallest world is looked for."""

TuningType = Literal["lora", "full"]
Place = Literal["beside", "url"]
"""Where the teacher is: on the same devices, or on a separate server."""


@dataclass(frozen=True, slots=True)
class World:
    """`nodes` machines with `gpus` devices each, `gib` GiB of memory per device."""

    nodes: int = 1
    gpus: int = 1
    gib: float = 80.0

    @classmethod
    def parse(cls, text: str) -> World:
        """`nodes=4,gpus=8,gib=80`; what is left out is one node, one device, 80 GiB. Raises ConfigError."""
        kinds: dict[str, type[int] | type[float]] = {"nodes": int, "gpus": int, "gib": float}
        given: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            try:
                given[name] = kinds[name](value)
                if name in kinds and 0 < given[name] < 10**6:
                    continue
            except (KeyError, ValueError):
                pass
            raise ConfigError(f"--plan: found {part!r}", "write positive numbers, such as --plan nodes=4,gpus=8,gib=80")
        return cls(**given)

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def __str__(self) -> str:
        nodes = "" if self.nodes == 1 else f"{self.nodes} nodes x "
        return f"{nodes}{self.gpus} x {self.gib:g} GiB"

    def smaller(self) -> Iterator[World]:
        """Worlds of such devices from one on: part of a node by powers of two, then whole nodes up to `MOST`."""
        gpus = 1
        while gpus < self.gpus:
            yield World(1, gpus, self.gib)
            gpus *= 2
        for nodes in range(1, MOST + 1):
            yield World(nodes, self.gpus, self.gib)


@dataclass(frozen=True, slots=True)
class Smallest:
    """The smallest world in which a run with this tuning fits, both models sharded over all of it (one device: whole).

    `world` is None where it fits into none that was tried."""

    tuning: TuningType
    teacher: Place
    world: World | None
    peak: float
    """GiB per rank there."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step needs per rank in `world`. `shards` ranks hold each model together; None: every rank holds both."""

    student: str
    student_parameters: int
    trained_parameters: int
    teacher: str
    teacher_parameters: int
    """0 where it is at a URL."""
    tuning: TuningType
    checkpointing: bool
    prompt_tokens: int
    horizon: int
    world: World
    shards: int | None
    memory: Memory
    other_activations: float
    """GiB of activations with gradient checkpointing if the run is without, and the other way round."""
    smallest: tuple[Smallest, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 fits, 1 too near to the limit for a formula, 2 does not fit."""
        return 0 if self.memory.peak <= NEAR * self.world.gib else 1 if self.memory.peak <= self.world.gib else 2

    def to_json(self) -> dict[str, Any]:
        """The content of `diagnose/plan.json`."""
        return {"format": 1, **asdict(self), "peak": self.memory.peak, "exit_code": self.exit_code}


class Outlines:
    """Both models of a run without weights, ready to be counted for any world and tuning."""

    def __init__(self, config: Config, device: str = "cuda") -> None:
        """`device` is the kind the run would compute on. Raises ModelError when a config.json cannot be read, and
        ConfigError when the horizon has no bound."""
        if config.horizon.longest is None:
            raise ConfigError(
                f"horizon.type {config.horizon.type} says only during the run how long rollouts are",
                "plan with horizon.type=fixed horizon.tokens=N",
            )
        self.config, self.device, self.horizon = config, torch.device(device), config.horizon.longest
        # Of those at a URL nothing is here.
        here = [source for source in config.teachers or (config.teacher,) if isinstance(source, ModelConfig)]
        self.teachers = tuple(_outlined(frozen(load_outline(one, self.device, sees=config.sees))) for one in here)
        self.student = cache(self._student)

    def _student(self, tuning: TuningType, dtype: str) -> CausalModel:
        source = self.config.student.model_copy(update={"dtype": dtype})
        outline = load_outline(source, self.device, sees=self.config.sees)
        return _outlined(prepare_student(outline, self._with(tuning)))

    def _with(self, tuning: TuningType) -> Config:
        """The run with this tuning: its own settings, or that tuning's defaults."""
        if self.config.tuning.type == tuning:
            return self.config
        kinds = {"lora": LoraTuning, "full": FullTuning}
        other = kinds[tuning](gradient_checkpointing=self.config.tuning.gradient_checkpointing)
        return self.config.model_copy(update={"tuning": other})

    def memory(
        self,
        world: World,
        shards: int | None,
        prompt_tokens: int,
        tuning: TuningType,
        teacher: Place,
        dtype: str,
        config: Config | None = None,
    ) -> Memory:
        """Of one rank, whose device has nothing else in its memory; `config` where it is not the run's own."""
        config, runtime = config or self._with(tuning), Runtime(0, world.ranks, self.device)
        beside = self.teachers if teacher == "beside" else ()
        student = self.student(tuning, dtype)
        micro = MicroMemory.of(student, beside, config, shards=shards, device=self.device.type)
        alone = world.gib * GIB - micro.student_weights.resident
        if len(beside) > 1 and micro.least(prompt_tokens, self.horizon) > NEAR * alone:
            micro = MicroMemory.of(student, beside, config, device=self.device.type, visits=True)
        free = world.gib * GIB * (world.ranks if self.device.type == "cpu" else 1) - micro.weights
        ids = (0,) * prompt_tokens
        prompts = [Prompt(slot, "", ids, ids) for slot in range(-(-config.training.prompts_per_step // world.ranks))]
        return micro.step(config, runtime, prompts, self.horizon, free)

    def plan(self, world: World, prompt_tokens: int) -> Plan:
        """The run as it is configured, in `world`. Raises ConfigError where its `sharding` needs another world."""
        arranged = shape(self.config.sharding, world.ranks)
        shards = None if arranged is None else arranged[0]
        config, tuning, dtype = self.config, self.config.tuning.type, self.config.student.dtype
        memory = self.memory(world, shards, prompt_tokens, tuning, "beside", dtype)
        turned = config.tuning.model_copy(update={"gradient_checkpointing": not config.tuning.gradient_checkpointing})
        changed = self.memory(
            world, shards, prompt_tokens, tuning, "beside", dtype, config.model_copy(update={"tuning": turned})
        )
        student = self.student(tuning, dtype)
        trained = sum(p.numel() for p in student.trainable().values())
        whole = self.student("full", dtype)
        return Plan(
            student=config.student.path,
            student_parameters=sum(p.numel() for p in whole.model.parameters()),
            trained_parameters=trained,
            teacher=", ".join(source.path for source in config.teachers or (config.teacher,)),
            teacher_parameters=sum(p.numel() for teacher in self.teachers for p in teacher.model.parameters()),
            tuning=tuning,
            checkpointing=config.tuning.gradient_checkpointing,
            prompt_tokens=prompt_tokens,
            horizon=self.horizon,
            world=world,
            shards=shards,
            memory=memory,
            other_activations=changed.items.activations if changed.items else 0.0,
        )

    def smallest(self, world: World, prompt_tokens: int) -> tuple[Smallest, ...]:
        """For LoRA and full fine-tuning, with the teacher beside the student and at a URL: the least that fits."""
        places: Sequence[Place] = ("beside", "url") if self.teachers else ("url",)
        cases: list[tuple[TuningType, Place]] = [(t, p) for t in ("lora", "full") for p in places]
        return tuple(self._smallest(world, prompt_tokens, *case) for case in cases)

    def _smallest(self, world: World, prompt_tokens: int, tuning: TuningType, teacher: Place) -> Smallest:
        peak = 0.0
        for candidate in world.smaller():
            alone = candidate.ranks == 1  # nothing to shard over; then masters are the weights themselves
            dtype = "float32" if alone and tuning == "full" else self.config.student.dtype
            shards = None if alone else candidate.ranks
            peak = self.memory(candidate, shards, prompt_tokens, tuning, teacher, dtype).peak
            if peak <= NEAR * world.gib:
                return Smallest(tuning, teacher, candidate, peak)
        return Smallest(tuning, teacher, None, peak)


def plan(config: Config, world: World) -> Plan:
    """GiB per rank of a step of `config` on GPUs of `world`, and the smallest worlds in which it would fit.

    Prompts are counted at their longest, `prompts.max_tokens`. Example: `plan(config, World(4, 8, 80.0))`.
    """
    outlines, longest = Outlines(config), config.prompts.max_tokens
    return replace(outlines.plan(world, longest), smallest=outlines.smallest(world, longest))


def _outlined(model: Any) -> CausalModel:
    """With its whole vocabulary, and on the fast paths where its architecture has them: without weights they cannot be
    checked."""
    made = CausalModel(model, len(model.get_output_embeddings().weight), 0)
    made.packs = made.may_pack
    made.decoder = FastDecoder.of(made.model, made.backbone) if made.packs else None
    return made
