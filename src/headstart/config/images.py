"""Where images do not fit the rest of a run. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from headstart.config.models import ServedTeacher

if TYPE_CHECKING:
    from headstart.config.schema import Config


def image_problems(config: Config) -> Iterator[str]:
    """What a run with images cannot do."""
    if not config.sees:
        return
    if not config.prompts.chat:
        yield (
            "prompts.chat: found false, but images stand in chat messages, where the template says how: set it to "
            "true, or remove image_column and prompts.images"
        )
    if isinstance(config.teacher, ServedTeacher):
        yield "teacher.type: a teacher at a URL is sent token ids alone, not images: load it here (teacher.path)"
    if config.teachers:
        yield "teachers: several teachers are shown text alone, not images; name one in teacher"
    if config.rollout.engine != "in_process":
        yield (
            f"rollout.engine: found {config.rollout.engine}, which is sent token ids alone, not images; set in_process"
        )
    if config.sharding.type != "none":
        yield (
            f"sharding.type: found {config.sharding.type}, but models that see are not divided: a rank without images "
            "would not gather the layers that others need; set none"
        )
