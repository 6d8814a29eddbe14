"""Sample rollouts of a step, with prompt, verdict and per-token divergence: into the run folder and to the trackers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice

from headstart.files import write_atomic
from headstart.records import SampleRollout
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
    samples = list(islice(_samples(parts, readings), tracking.rollouts_saved))
    lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples]
    place = parts.folder.rollouts / f"step_{step:06d}.txt"
    write_atomic(place, "\n".join(map(as_text, samples)))
    write_atomic(place.with_suffix(".jsonl"), "".join(lines))
    parts.tracker.samples(step, samples)


def _samples(parts: Parts, readings: Sequence[MicroReadings]) -> Iterator[SampleRollout]:
    """The step's rollouts in order; each is decoded and judged when it is asked for."""
    for micro in readings:
        end = 0
        for r in micro.rollouts:
            start, end = end, end + len(r.rows)
            nats = dict(zip(r.rows, map(float, micro.divergence[start:end]), strict=True))
            prompt, tokens = "".join(parts.decode(r.prompt.token_ids)), tuple(parts.decode(r.completion_ids))
            divergence = tuple(round(nats.get(n, 0.0), 4) for n in range(len(tokens)))
            about = (r.prompt.problem_id, r.sample_index, prompt, tokens, divergence)
            yield SampleRollout(*about, scored=len(nats), stopped=r.stopped, verdict=parts.judge(r))
