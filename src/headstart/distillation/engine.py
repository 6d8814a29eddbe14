"""What a run's rollouts and evaluations are sampled by, as `rollout.engine` says."""

from __future__ import annotations

from headstart.assemble.pair import Pair
from headstart.assemble.tasks import Questions
from headstart.config.schema import Config
from headstart.models.templates import PromptSet
from headstart.rollout.engine import InProcessEngine
from headstart.rollout.served import ServedEngine
from headstart.rollout.sync import WeightSync
from headstart.serving.client import Client

TIMEOUT, REQUESTS = 600.0, 256
"""Seconds for one rollout, and rollouts on their way to servers at once; a server batches what it has."""


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
