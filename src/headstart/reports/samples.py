"""The section of a page with sample rollouts of the training: prompt, verdict, tokens coloured by divergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headstart.records import SampleRollout
from headstart.reports.page import Block, Fold, Section, Text, Token, Tokens
from headstart.reports.run import Record, Run
from headstart.samples import BOUNDS, heading, one_line, worst

NOTE = (
    "The first rollouts of a step, so that nobody chose them, as the student wrote them then. The stronger a token's "
    "colour, the further the teacher's distribution is from the student's there. A response that the horizon cut is "
    "unfinished, not wrong."
)


def sample_sections(runs: Sequence[tuple[str, Run]]) -> Iterator[Section]:
    """A section for each run that saved rollouts: those of its first and of its last step."""
    for name, run in runs:
        blocks: list[Block] = []
        for step, records in run.samples.items():
            try:
                shown = [block for record in records for block in _blocks(record)]
            except (KeyError, TypeError, ValueError) as error:
                blocks.append(Text(f"The rollouts of step {step} cannot be shown ({error}).", "warning"))
                continue
            blocks += [
                Text(f"Step {step}"),
                *shown[:2],
                *([Fold(f"More of step {step}", shown[2:])] if shown[2:] else []),
            ]
        if blocks:
            title = "Rollouts of the training" + (f" ({name})" if len(runs) > 1 else "")
            yield Section(title, [Text(NOTE, "soft"), *blocks])


def _blocks(record: Record) -> list[Block]:
    tuples = {key: tuple(record[key]) for key in ("tokens", "divergence")}
    sample = SampleRollout(**{**record, **tuples})
    both = zip(sample.tokens, sample.divergence, strict=True)
    tokens = [Token(text, sum(nats >= bound for bound in BOUNDS), f"{nats:.2f} nats") for text, nats in both]
    notes = [f"furthest from the teacher, in nats: {worst(sample)}"] if worst(sample) else []
    return [Text(f"Prompt: {one_line(sample.prompt, 600)}", "soft"), Tokens(heading(sample), tokens, notes)]
