"""Prefix swap: accuracy when the first N tokens come from one model and the rest from another (arXiv 2605.27028)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headstart.diagnosis.curve import Share
from headstart.explanation.cast import Cast, Voice
from headstart.stats import Estimate, is_noise, paired_difference


@dataclass(frozen=True, slots=True)
class Cell:
    """Prefix from `prefix`, tail from `tail`; `gain` is paired over problems against the student before alone."""

    prefix: Voice
    tail: Voice
    accuracy: Share
    gain: Estimate


@dataclass(frozen=True, slots=True)
class Swap:
    """Every pairing at `prefix_tokens`; `generated_tokens` is what the tails cost beside the shared rollouts."""

    sentence: str
    task: str | None
    prefix_tokens: int
    problems: int
    generated_tokens: int
    cells: tuple[Cell, ...]

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


def explain_swap(cast: Cast) -> Swap:
    """One prefix for each model and problem (its first sample), finished by every other model.

    All tails of one model are sampled together. With itself a model is its own first sample. There are no cells when
    nothing can be graded, or when the horizon leaves no tail.
    """
    N, task = cast.horizon, cast.task
    if task is None or cast.max_tokens <= N:
        why = "the run has no evaluation task" if task is None else f"the horizon of {N} tokens leaves no tail to swap"
        return Swap(f"There is no prefix swap: {why}.", task.name if task else None, N, len(cast.problems), 0, ())
    firsts = {voice: cast.said(voice)[:: cast.samples] for voice in cast.voices}
    outcomes: dict[tuple[Voice, Voice], list[bool]] = {}
    generated = 0
    for tail in cast.voices:
        others = [voice for voice in cast.voices if voice != tail]
        begun = [rollout for voice in others for rollout in firsts[voice]]
        finished = cast.finish(tail, begun, N)
        generated += sum(len(whole.completion_ids) - min(N, len(own.completion_ids)) for whole, own in zip(
            finished, begun, strict=True) if len(own.completion_ids) > N)  # fmt: skip
        right = [verdict.correct for verdict in cast.verdicts([*finished, *firsts[tail]])]
        size = len(cast.problems)
        for place, prefix in enumerate((*others, tail)):
            outcomes[prefix, tail] = right[place * size : (place + 1) * size]
    cells = compare(outcomes)
    return Swap(_sentence(cells, N), task.name, N, len(cast.problems), generated, cells)


def compare(outcomes: Mapping[tuple[Voice, Voice], Sequence[bool]]) -> tuple[Cell, ...]:
    """Accuracy of every (prefix, tail) with its Wilson interval, and its paired gain over (before, before)."""
    base = outcomes["before", "before"]
    cells = []
    for (prefix, tail), right in sorted(outcomes.items()):
        value, (low, high) = paired_difference([float(x) for x in right], [float(x) for x in base])
        cells.append(Cell(prefix, tail, Share.of(right), Estimate(value, low, high)))
    return tuple(cells)


def _sentence(cells: Sequence[Cell], tokens: int) -> str:
    found = {(cell.prefix, cell.tail): cell for cell in cells}
    start, end = found["before", "before"], found["after", "after"]
    said = f"Training took the student from {start.accuracy.mean:.1%} to {end.accuracy.mean:.1%}"
    if is_noise(end.gain):
        return f"{said}, within noise: there is no gain whose place could be asked for."
    return (
        f"{said}. With the trained student's first {tokens} tokens the old student reaches "
        f"{_cell(found['after', 'before'])}; with the old student's first {tokens} tokens the trained one reaches "
        f"{_cell(found['before', 'after'])}; with the teacher's the old one reaches "
        f"{_cell(found['teacher', 'before'])}."
    )


def _cell(cell: Cell) -> str:
    noise = ", within noise of the old student" if is_noise(cell.gain) else ""
    return f"{cell.accuracy.mean:.1%} [{100 * cell.accuracy.low:.1f}, {100 * cell.accuracy.high:.1f}]{noise}"
