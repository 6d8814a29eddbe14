"""Sample rollouts of a step, with prompt, verdict and per-token divergence: into the run folder and to the trackers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice

from headstart.files import write_atomic
from headstart.records import Rollout, SampleRollout
from headstart.samples import as_text
from headstart.train.metrics import MicroReadings
from headstart.train.parts import Parts


def save_samples_if_due(parts: Parts, step: int, readings: Sequence[MicroReadings]) -> None:
    """`rollouts/step_000010.txt` for a reader and `.jsonl` for programs, every `tracking.rollouts_every` steps, at the
    first and at the last."""
    tracking, ends = parts.config.tracking, (1, parts.config.training.steps)
    every = tracking.rollouts_every
    if parts.folder is None or every == 0 or not readings or (step not in ends and step % every):
        return
    samples = [_sample(parts, *read) for read in islice(_each(readings), tracking.rollouts_saved)]
    place = parts.folder.rollouts / f"step_{step:06d}.txt"
    write_atomic(place, "\n".join(map(as_text, samples)))
    lines = [json.dumps(asdict(sample), ensure_ascii=False) for sample in samples]
    write_atomic(place.with_suffix(".jsonl"), "".join(line + "\n" for line in lines))
    parts.tracker.samples(step, samples)


def _each(readings: Sequence[MicroReadings]) -> Iterator[tuple[Rollout, dict[int, float]]]:
    """The step's rollouts with the divergence of their scored tokens."""
    for micro in readings:
        end = 0
        for rollout in micro.rollouts:
            start, end = end, end + len(rollout.rows)
            yield rollout, dict(zip(rollout.rows, map(float, micro.divergence[start:end]), strict=True))


def _sample(parts: Parts, rollout: Rollout, nats: dict[int, float]) -> SampleRollout:
    return SampleRollout(
        problem_id=rollout.prompt.problem_id,
        sample_index=rollout.sample_index,
        prompt="".join(parts.decode(rollout.prompt.token_ids)),
        tokens=tuple(parts.decode(rollout.completion_ids)),
        divergence=tuple(round(nats.get(n, 0.0), 4) for n in range(len(rollout.completion_ids))),
        scored=len(nats),
        stopped=rollout.stopped,
        verdict=parts.judge(rollout),
    )
