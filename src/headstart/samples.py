"""Sample rollouts of a run as text, table rows and coloured terminal text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from headstart.records import SampleRollout

BOUNDS = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Divergences in nats from which a token gets the next darker shade, here and in the report."""
STYLES = ("", *(f"black on {shade}" for shade in ("#fbe3d3", "#f7c7a8", "#f2a674", "#ec8540")), "white on #b34a00")
COLUMNS = ["problem", "sample", "prompt", "completion", "verdict", "ending", "nats per token"]


def heading(sample: SampleRollout) -> str:
    """`tiny/17 sample 0: 16 tokens, reached the horizon, 0.3120 nats per token, right`."""
    verdict = f", {sample.verdict}" if sample.verdict else ""
    size = f"{len(sample.tokens)} tokens, {sample.ending}, {sample.mean:.4f} nats per token"
    return f"{sample.problem_id} sample {sample.sample_index}: {size}{verdict}"


def marked(sample: SampleRollout) -> str:
    """The completion, each token followed by its divergence where that is not nearly nothing: `so⟨0.31⟩`."""
    both = zip(sample.tokens, sample.divergence, strict=True)
    return "".join(f"{token}⟨{nats:.2f}⟩" if nats >= 0.005 else token for token, nats in both)


def as_text(sample: SampleRollout) -> str:
    """What `rollouts/step_*.txt` holds of it: heading, the prompt's lines behind `>`, the marked completion."""
    prompt = "".join(f"> {line}\n" for line in sample.prompt.splitlines())
    return f"# {heading(sample)}\n{prompt}{marked(sample)}\n"


def as_row(sample: SampleRollout) -> list[str | int | float]:
    """Its cells in `COLUMNS`."""
    texts = (sample.prompt, marked(sample), sample.verdict, sample.ending)
    return [sample.problem_id, sample.sample_index, *texts, round(sample.mean, 4)]


def markdown(samples: Sequence[SampleRollout]) -> str:
    """A Markdown table of them. Markup in a cell is shown, not obeyed: `<|im_end|>` would vanish as a tag."""
    marks = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]|#"} | {"<": "&lt;", "\n": "<br>"})
    rows = [COLUMNS, ["---"] * len(COLUMNS), *([str(cell).translate(marks) for cell in as_row(s)] for s in samples)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shade(nats: float) -> int:
    """How many of `BOUNDS` a divergence reaches."""
    return sum(nats >= bound for bound in BOUNDS)


def worst(sample: SampleRollout, count: int = 3) -> str:
    """Its most divergent tokens, largest first: `“so” 2.31, “7” 0.42`."""
    order = sorted(range(len(sample.tokens)), key=lambda n: -sample.divergence[n])[:count]
    shown = [f"“{one_line(sample.tokens[n])}” {sample.divergence[n]:.2f}" for n in order if sample.divergence[n] > 0]
    return ", ".join(shown)


def one_line(text: str, limit: int = 0) -> str:
    """`text` in one line without control characters; beyond `limit` its middle is left out."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "·" for c in text).split())
    return f"{line[: limit // 4]} … {line[-(limit - limit // 4) :]}" if limit and len(line) > limit else line


def coloured(sample: SampleRollout, limit: int) -> Text:
    """The completion's first `limit` tokens for a terminal, the deeper the orange the further from the teacher."""
    text = Text("  ")
    for token, nats in list(zip(sample.tokens, sample.divergence, strict=True))[:limit]:
        clean = "".join(c if c.isprintable() or c == "\n" else "·" for c in token)
        text.append(clean.replace("\n", "\n  "), STYLES[shade(nats)])
    more = len(sample.tokens) - limit
    return text.append(f" … {more} tokens more", "dim") if more > 0 else text
