"""Rollouts of which the student writes only a share: the others are the teacher's, or come with the prompt.

Supervised fine-tuning, warm starts and GKD's lambda (arXiv 2306.13649) differ from on-policy distillation in who writes
the text. So that is a property of the engine, and the step that trains on it stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

from headstart.config.rollout import MixConfig
from headstart.errors import RunFolderError
from headstart.files import append_lines, read_lines
from headstart.interfaces import Draws, RolloutEngine
from headstart.progress import doing
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt, Rollout
from headstart.rollout.decoding import token_limits

Author = Literal["student", "teacher", "given"]
AHEAD = 64
"""Texts that the teacher writes at once: it writes those of later steps beside those of this one, because a decode step
costs nearly the same for one row as for many."""
_GOLDEN = 0.6180339887498949


def author(mix: MixConfig, place: int) -> Author:
    """Who writes the response to the prompt at `place`, counted over all steps from 0.

    The places of an author are spread evenly (multiples of the golden ratio, modulo 1), so every stretch of a run has
    nearly the shares of `mix`, and a resumed run the same authors.
    """
    point, reached = (0.5 + place * _GOLDEN) % 1.0, 0.0
    shares: dict[Author, float] = {"student": mix.own, "teacher": mix.teacher, "given": mix.given}
    for who, share in shares.items():
        reached += share
        if point < reached:
            return who
    return max(shares, key=lambda who: shares[who])  # they sum to 1 but for rounding


class Text(NamedTuple):
    """A response in the student's tokens, the stop token included where it `stopped`."""

    ids: tuple[int, ...]
    stopped: bool


class TeacherTexts:
    """The teacher's responses, `samples` to a prompt, of which each is sampled once in a run and kept in a file.

    Draws depend on the prompt's place in the source, so that it changes no text which ranks and steps ask for it, and
    beside how many others.
    """

    def __init__(
        self,
        sample: Callable[[Sequence[Prompt], int], Sequence[Rollout]],
        tokens: int,
        file: Path | None,
        runtime: Runtime,
    ) -> None:
        """`sample(prompts, max_tokens)` gives the teacher's rollouts of prompts that carry their place in the source;
        `tokens` is the most that the run's horizon can ask for. `file` (rank 0 has it) is read if it exists."""
        self._sample, self._tokens, self._file, self._runtime = sample, tokens, file, runtime
        self._texts: dict[tuple[int, int], Text] = {}
        if file is not None:
            self._keep(read_lines(file))
        self._texts = runtime.gather(self._texts)[0]

    def texts(self, prompts: Sequence[Prompt], later: Iterable[Prompt], samples: int) -> list[Text]:
        """The texts to `prompts`, prompt-major; those to some of `later` are sampled beside what is missing."""
        wanted = {prompt.index: prompt for prompt in prompts if (prompt.index, 0) not in self._texts}
        if wanted:
            for prompt in islice((p for p in later if (p.index, 0) not in self._texts), 20 * AHEAD):
                if len(wanted) * samples >= AHEAD:
                    break
                wanted.setdefault(prompt.index, prompt)
        if any(self._runtime.gather(bool(wanted))):  # a divided model takes all ranks
            with doing(f"the teacher writes {len(wanted) * samples} texts"):
                rollouts = self._sample(list(wanted.values()), self._tokens)
            rows = [
                {"prompt": r.prompt.index, "sample": r.sample_index, "ids": r.completion_ids, "stopped": r.stopped}
                for r in rollouts
            ]
            new = [row for part in self._runtime.gather(rows) for row in part]
            if self._file is not None:
                append_lines(self._file, new)
            self._keep(new)
        return [self._texts[prompt.index, sample] for prompt in prompts for sample in range(samples)]

    def _keep(self, rows: Iterable[Mapping[str, Any]]) -> None:
        try:
            for row in rows:
                self._texts[row["prompt"], row["sample"]] = Text(tuple(row["ids"]), row["stopped"])
        except (KeyError, TypeError) as error:
            raise RunFolderError(f"{self._file} holds no texts of a teacher ({error}); remove it") from error


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the text of a run comes from: every prompt at its place in the source, the prompts of a step, and the texts
    that are given with them (by that place) or that the teacher writes."""

    prompts: Sequence[Prompt]
    order: Callable[[int], Sequence[int]]
    """Places in `prompts` of all of a step's prompts, over all ranks."""
    given: Mapping[int, Text]
    teacher: TeacherTexts | None
    steps: int


class MixedEngine(RolloutEngine):
    """Rollouts in the shares of `mix`. `engine` samples the student's; texts of others are cut at the horizon."""

    def __init__(self, engine: RolloutEngine, mix: MixConfig, sources: Sources) -> None:
        self.engine, self.mix, self.sources = engine, mix, sources

    def sync(self, step: int) -> None:
        """See `RolloutEngine.sync`."""
        self.engine.sync(step)

    def prefill(self, prompts: Sequence[Prompt]) -> Any:
        """See `RolloutEngine.prefill`."""
        return self.engine.prefill(prompts)

    def generate(self, prompts: Sequence[Prompt], **draws: Unpack[Draws]) -> list[Rollout]:
        """See `RolloutEngine.generate`; `key[2]` is the training step, and a prompt's index its slot in it."""
        assert not draws.get("candidates"), "given text has no candidates"
        step, samples, limits = draws["key"][2], draws["samples"], token_limits(draws["max_tokens"], prompts)
        order = self.sources.order(step)
        writers = [author(self.mix, step * len(order) + prompt.index) for prompt in prompts]
        mine = [place for place, who in enumerate(writers) if who == "student"]
        own: Draws = {**draws, "max_tokens": [limits[place] for place in mine]}
        sampled = self.engine.generate([prompts[place] for place in mine], **own)
        parts = {place: sampled[k * samples : (k + 1) * samples] for k, place in enumerate(mine)}
        texts = self._texts([order[p.index] for p in prompts], writers, step, samples)
        for place, written in texts.items():
            prompt, end = prompts[place], limits[place]
            cut = [(text.ids[:end], text.stopped and len(text.ids) <= end) for text in written]
            parts[place] = [Rollout(prompt, n, *text) for n, text in enumerate(cut)]
        return [rollout for place in range(len(prompts)) for rollout in parts[place]]

    def _texts(self, rows: Sequence[int], writers: Sequence[Author], step: int, samples: int) -> dict[int, list[Text]]:
        """The texts that the student does not write, by the place of their prompt in the batch; `rows` are the prompts'
        places in the source."""
        found = {place: [self.sources.given[row]] for place, row in enumerate(rows) if writers[place] == "given"}
        if self.sources.teacher is not None:
            theirs = [place for place, who in enumerate(writers) if who == "teacher"]
            ready = [replace(self.sources.prompts[rows[place]], index=rows[place]) for place in theirs]
            texts = self.sources.teacher.texts(ready, self._later(step), samples)
            found |= {place: texts[k * samples : (k + 1) * samples] for k, place in enumerate(theirs)}
        return found

    def _later(self, step: int) -> Iterable[Prompt]:
        """The prompts that the teacher answers after `step`."""
        for other in range(step + 1, self.sources.steps):
            order = self.sources.order(other)
            for slot, row in enumerate(order):
                if author(self.mix, other * len(order) + slot) == "teacher":
                    yield replace(self.sources.prompts[row], index=row)

    def alone(self) -> AbstractContextManager[None]:
        """See `RolloutEngine.alone`."""
        return self.engine.alone()

    def fitting(self, prompts: Sequence[Prompt], max_tokens: int) -> int | None:
        """See `RolloutEngine.fitting`."""
        return self.engine.fitting(prompts, max_tokens)
