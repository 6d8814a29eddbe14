"""How much memory a training step needs, as a formula: nothing is run, so it costs nothing to ask.

Weights, gradients, optimizer state and caches are counted exactly, micro-batches as `models/memory.py` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headstart.assemble.pair import Pair
from headstart.config.schema import Config
from headstart.models.causal import CausalModel
from headstart.models.memory import GIB, MicroMemory
from headstart.records import Prompt, Rollout
from headstart.rollout.memory import SAMPLER, free_bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB of one optimizer step on one device, if every rollout reaches its horizon.

    `weights` (both models) and `states` (AdamW's two averages) are there all the time. The rest is what each phase
    holds beside them; a step peaks at the largest.
    """

    weights: float
    states: float
    rollout: float
    teacher: float
    student: float
    optimizer: float

    @property
    def peak(self) -> float:
        return self.weights + self.states + max(self.rollout, self.teacher, self.student, self.optimizer)


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rollouts of a step are on one device, and how many of them are decoded at once."""

    step: int
    decoded: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> Rows:
        step = -(-config.training.prompts_per_step // world_size) * config.rollout.samples_per_prompt
        return cls(step, min(config.rollout.batch_size or step, step))


def micro_batches(pair: Pair, config: Config, rollouts: Sequence[Rollout]) -> tuple[MicroMemory, list[list[Rollout]]]:
    """`rollouts` as a step that began now would divide them, and by what formula."""
    micro = MicroMemory.of(pair.student, pair.teacher, config, pair.vocabulary.merge_ids)
    budget = micro.budget(config, pair.runtime, free_bytes(pair.runtime.device))
    return micro, micro.split(rollouts, budget, config.training.micro_batch)


def memory(pair: Pair, config: Config, prompt_tokens: int, horizon: int) -> Memory:
    """What a step needs whose longest prompt has `prompt_tokens` and whose rollouts have `horizon` tokens."""
    rows, samples, V = Rows.of(config, pair.runtime.world_size), config.rollout.samples_per_prompt, pair.vocabulary.size
    ids = (0,) * prompt_tokens
    prompts = [Prompt(slot, "", ids, ids) for slot in range(rows.step // samples)]
    longest = [Rollout(prompt, sample, (0,) * horizon, False) for prompt in prompts for sample in range(samples)]
    micro, divided = micro_batches(pair, config, longest)
    trained = list(pair.student.trainable().values())
    largest = max((p.numel() * p.element_size() for p in trained), default=0)
    accumulated = micro.gradients if len(divided) > 1 else 0
    cache = micro.student.cached * (prompt_tokens + horizon) * rows.decoded
    # While keys and values grow, one layer's storage is there twice, and it is up to half wider than needed.
    growing = (1.5 + 1 / micro.student.layers) * cache + SAMPLER * V * rows.decoded
    encoded = min(rows.decoded, len(prompts)) * prompt_tokens * micro.student.passing
    clipped = micro.gradients if pair.runtime.device.type == "cuda" else largest  # all at once, or one after another
    return Memory(
        weights=(_weight_bytes(pair.student) + _weight_bytes(pair.teacher)) / GIB,
        states=2 * micro.gradients / GIB,
        rollout=(growing + encoded) / GIB,
        teacher=max(micro.scoring(rollouts, accumulated) for rollouts in divided) / GIB,
        student=max(micro.learning(rollouts, accumulated) for rollouts in divided) / GIB,
        optimizer=(micro.gradients + 2 * clipped) / GIB,
    )


def _weight_bytes(model: CausalModel) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.model.parameters(), *model.model.buffers()))
