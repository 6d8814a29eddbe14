"""What a run's rollouts and evaluations are sampled by, as `rollout.engine` says."""

from __future__ import annotations

from collections.abc import Sequence

from headstart.assemble.pair import Pair
from headstart.assemble.tasks import Questions
from headstart.config.schema import Config
from headstart.errors import ConfigError
from headstart.interfaces import RolloutEngine
from headstart.models.completions import Completions
from headstart.models.templates import PromptSet
from headstart.records import Prompt, Rollout
from headstart.rollout.engine import InProcessEngine
from headstart.rollout.served import ServedEngine
from headstart.rollout.sync import WeightSync
from headstart.rollout.written import MixedEngine, Sources, TeacherTexts, Text
from headstart.serving.client import Client
from headstart.streams import prompt_order
from headstart.train.folder import RunFolder

TIMEOUT, REQUESTS = 600.0, 256
"""Seconds for one rollout, and rollouts on their way to servers at once; a server batches what it has."""
TEXTS = "teacher_texts.jsonl"
"""File of a run folder with what the teacher wrote for `rollout.mix`."""


def make_engine(
    config: Config, pair: Pair, prompts: PromptSet, questions: Questions | None
) -> InProcessEngine | ServedEngine:
    """The engine of a run. Raises ServerError or ConfigError when the servers cannot
    be reached or do not fit."""
    rollout, stops = config.rollout, pair.vocabulary.stop_ids
    if rollout.engine == "in_process":
        return InProcessEngine(pair.student, stops)
    assert rollout.sync_dir is not None
    longest = [prompts.longest + (config.horizon.longest or 1)]
    if questions is not None:
        longest.append(max(len(p.token_ids) for p in questions.prompts) + questions.settings.max_tokens)
    timeout = rollout.timeout or TIMEOUT
    client = Client(rollout.urls, timeout=timeout, deadline=2 * timeout, concurrent=REQUESTS)
    form = rollout.sync or ("adapter" if config.tuning.type == "lora" else "checkpoint")
    sync = WeightSync(client, pair.student, pair.runtime, rollout.sync_dir, form, prompts.prompts, max(longest))
    return ServedEngine(client, pair.student, stops, sync)


def mixed_engine(
    config: Config,
    pair: Pair,
    prompts: Sequence[Prompt],
    completions: Completions | None,
    engine: RolloutEngine,
    folder: RunFolder | None,
) -> RolloutEngine:
    """What writes the text that is trained on: `engine`, or it and others in the shares of `rollout.mix`."""
    mix, training = config.rollout.mix, config.training
    if mix.own == 1.0:
        return engine
    if config.divergence.type == "sft" and pair.vocabulary.aligner is not None:
        raise ConfigError(
            "divergence.type: sft trains on the student's own tokens, and this teacher has others; name a teacher with "
            "the student's tokenizer, or write its answers to a file and give them as prompts.completion_column"
        )
    given = {place: Text(ids, True) for place, ids in enumerate(completions.ids if completions else ())}

    def order(step: int) -> list[int]:
        return prompt_order(len(prompts), training.seed, step, training.prompts_per_step)

    teacher = _teacher_texts(config, pair, folder) if mix.teacher else None
    return MixedEngine(engine, mix, Sources(prompts, order, given, teacher, training.steps))


def _teacher_texts(config: Config, pair: Pair, folder: RunFolder | None) -> TeacherTexts:
    """The teacher's responses, sampled as the student's are, to the longest that the horizon can ask for."""
    rollout, tokens = config.rollout, config.horizon.longest
    assert tokens is not None, "checked with the configuration"

    def sample(prompts: Sequence[Prompt], max_tokens: int) -> list[Rollout]:
        return pair.sample(
            prompts,
            max_tokens=max_tokens,
            samples=rollout.samples_per_prompt,
            seed=config.training.seed,
            who="teacher",
            purpose="teacher text",
            batch_size=rollout.batch_size,
        )

    return TeacherTexts(sample, tokens, folder.path / TEXTS if folder else None, pair.runtime)
