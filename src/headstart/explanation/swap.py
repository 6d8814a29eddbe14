"""Prefix swap: accuracy when the first N tokens come from one model and the rest from another (arXiv 2605.27028)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headstart.diagnosis.curve import Share
from headstart.explanation.models import Models, Reading, Source
from headstart.stats import Estimate, is_noise, paired_difference


@dataclass(frozen=True, slots=True)
class Cell:
    """Prefix from `prefix`, tail from `tail`; `gain` is paired over problems against the student before alone."""

    prefix: Source
    tail: Source
    accuracy: Share
    gain: Estimate


@dataclass(frozen=True, slots=True)
class Swap(Reading):
    """Every pairing at `prefix_tokens`; `generated_tokens` is what the tails cost beside the shared rollouts."""

    task: str | None
    prefix_tokens: int
    problems: int
    generated_tokens: int
    cells: tuple[Cell, ...]


def explain_swap(models: Models) -> Swap:
    """One prefix for each model and problem (its first sample), finished by every other model.

    All tails of one model are sampled together; finished by itself, a prefix is the model's own first sample. There are
    no cells when nothing can be graded, or when the horizon leaves no tail.
    """
    N, task, P = models.horizon, models.task, len(models.problems)
    if task is None or models.max_tokens <= N:
        why = "the run has no evaluation task" if task is None else f"the horizon of {N} tokens leaves no tail to swap"
        return Swap(f"There is no prefix swap: {why}.", task.name if task else None, N, P, 0, ())
    firsts = {source: models.responses(source)[:: models.samples] for source in models.sources}
    outcomes: dict[tuple[Source, Source], list[bool]] = {}
    generated = 0
    for tail in models.sources:
        others = [source for source in models.sources if source != tail]
        begun = [rollout for source in others for rollout in firsts[source]]
        finished = models.finish(tail, begun, N)
        open_ = [len(r.completion_ids) > N for r in begun]
        generated += sum(len(r.completion_ids) - N for r, has_tail in zip(finished, open_, strict=True) if has_tail)
        right = [verdict.correct for verdict in models.verdicts([*finished, *firsts[tail]])]
        for i, prefix in enumerate((*others, tail)):
            outcomes[prefix, tail] = right[i * P : (i + 1) * P]
    cells = compare(outcomes)
    return Swap(_sentence(cells, N), task.name, N, P, generated, cells)


def compare(outcomes: Mapping[tuple[Source, Source], Sequence[bool]]) -> tuple[Cell, ...]:
    """Accuracy of every (prefix, tail) with its Wilson interval, and its paired gain over (before, before)."""
    cells = []
    for (prefix, tail), right in sorted(outcomes.items()):
        value, (low, high) = paired_difference(right, outcomes["before", "before"])
        cells.append(Cell(prefix, tail, Share.of(right), Estimate(value, low, high)))
    return tuple(cells)


def _sentence(cells: Sequence[Cell], tokens: int) -> str:
    by = {(cell.prefix, cell.tail): cell for cell in cells}
    start, end = by["before", "before"], by["after", "after"]
    text = f"Training took the student from {start.accuracy.mean:.1%} to {end.accuracy.mean:.1%}"
    if is_noise(end.gain):
        return f"{text}, within noise: there is no gain to locate."
    return (
        f"{text}. With the trained student's first {tokens} tokens the old student reaches "
        f"{_cell(by['after', 'before'])}; with the old student's first {tokens} tokens the trained one reaches "
        f"{_cell(by['before', 'after'])}; with the teacher's the old one reaches "
        f"{_cell(by['teacher', 'before'])}."
    )


def _cell(cell: Cell) -> str:
    noise = ", within noise of the old student" if is_noise(cell.gain) else ""
    return f"{Estimate(cell.accuracy.mean, cell.accuracy.low, cell.accuracy.high):.1%}{noise}"
