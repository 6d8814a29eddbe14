"""The section of a page with sample rollouts of the training: prompt, verdict, tokens coloured by divergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headstart.records import SampleRollout
from headstart.reports.page import Block, Fold, Section, Text, Token, Tokens
from headstart.reports.run import Record, Run
from headstart.samples import heading, one_line, shade, worst

NOTE = (
    "The first rollouts of a step, as the student wrote them then. The stronger a token's colour, the further the "
    "teacher is from the student there. A response that the horizon cut is unfinished, not wrong."
)


def sample_sections(runs: Sequence[tuple[str, Run]]) -> Iterator[Section]:
    """A section for each run that saved rollouts: those of its first and of its last step."""
    for name, run in runs:
        blocks: list[Block] = [Text(NOTE, "soft")]
        for step, records in run.samples.items():
            try:
                first, *more = [_blocks(record) for record in records]
            except (KeyError, TypeError, ValueError) as error:
                blocks.append(Text(f"The rollouts of step {step} cannot be shown ({error}).", "warning"))
                continue
            rest = [block for of in more for block in of]
            blocks += [Text(f"Step {step}"), *first, *([Fold(f"More of step {step}", rest)] if rest else [])]
        if run.samples:
            yield Section("Rollouts of the training" + (f" ({name})" if len(runs) > 1 else ""), blocks)


def _blocks(record: Record) -> list[Block]:
    sample = SampleRollout(**record)
    both = zip(sample.tokens, sample.divergence, strict=True)
    tokens = [Token(text, shade(nats), f"{nats:.2f} nats") for text, nats in both]
    notes = [f"largest divergence, in nats: {worst(sample)}"]
    return [Text(f"Prompt: {one_line(sample.prompt, 600)}", "soft"), Tokens(heading(sample), tokens, notes)]
