"""`headstart chat`: a line, answered by a run's student before and after training, or by any model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import typer

from headstart.cli.show import loading, say
from headstart.progress import printing, shown


def chat_command(
    model: Annotated[str, typer.Argument(metavar="RUN_DIR|MODEL", help="A finished run, a model folder or hub name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings, such as prompts.system=TEXT.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this alone. Default: every line that is typed.")] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="Let the run's teacher answer, too.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy: answers differ by weights alone.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Ask a run's student, before and after side by side, or any model. Each line is a separate question."""
    with loading():
        from headstart.explanation.answers import open_speakers

    with shown("loading the models"):
        config, speakers = open_speakers(model, overrides or [], teacher)
    sampling = replace(config.rollout.sampling, temperature=temperature)
    for line in [prompt] if prompt is not None else _typed():
        answers = []
        with shown("answering") as progress:
            for done, speaker in enumerate(speakers):
                progress(done, len(speakers), speaker.name)
                answers.append(speaker.answer(line, sampling, max_tokens))
        _show(answers)


def _typed() -> Iterator[str]:
    """The lines of a terminal, until an empty one or `exit`; those of a pipe, until its end."""
    terminal = sys.stdin.isatty()
    if terminal:
        say("Each line is a separate question. An empty line, exit or Ctrl-D ends.", style="dim")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if line == "exit" or (terminal and not line):
            return
        if line:
            yield line


def _show(answers: list[tuple[str, str]]) -> None:
    """Side by side on a terminal; one below the other in a pipe."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    console = printing()
    if console.is_terminal and len(answers) > 1:
        table = Table(*(escape(head) for head, _ in answers), box=SIMPLE_HEAD, expand=True)
        table.add_row(*(Text(text) for _, text in answers))
        console.print(table)
        return
    for head, text in answers:
        say(f"{head}:", console, "bold")
        say(f"{text}\n", console)
