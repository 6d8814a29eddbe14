"""`headstart chat`: a line, answered by a run's student before and after training, or by any model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.show import loading, say
from headstart.errors import ConfigError, DataError
from headstart.progress import printing, shown

if TYPE_CHECKING:
    from headstart.config.schema import Config, ModelConfig, PromptsConfig
    from headstart.ranks.runtime import Runtime
    from headstart.records import Sampling


def chat_command(
    model: Annotated[str, typer.Argument(metavar="RUN_DIR|MODEL", help="A finished run, a model folder or hub name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings, such as prompts.system=TEXT.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this alone. Default: every line typed, or piped in.")
    ] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="Let the run's teacher answer, too.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy: answers differ by weights alone.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Ask a run's student, before and after side by side, or any model. Each line is a question of its own."""
    with loading():
        from headstart.ranks.runtime import Runtime

        config, sources = _sources(model, overrides or [], teacher)
        sampling = replace(config.rollout.sampling, temperature=temperature)
        runtime = Runtime.start(config.training.device)
        speakers = [_Speaker(*source, runtime) for source in sources]
    for line in [prompt] if prompt is not None else _typed():
        with shown("answering") as progress:
            answers = []
            for done, speaker in enumerate(speakers):
                progress(done, len(speakers), speaker.name)
                answers.append(speaker.answer(line, sampling, max_tokens))
        _show(answers)


def _sources(
    model: str, overrides: list[str], teacher: bool
) -> tuple[Config, list[tuple[str, ModelConfig, PromptsConfig]]]:
    """The run's configuration, or one that stands for it; name, checkpoint and view of prompts of all who answer."""
    from headstart.assemble.pair import IN_MEMORY
    from headstart.assemble.served import require_local
    from headstart.config.loader import load, parse
    from headstart.config.schema import ModelConfig
    from headstart.explanation.run import trained_model
    from headstart.models.load import load_tokenizer
    from headstart.models.templates import chat_template
    from headstart.train.folder import RunFolder

    folder = RunFolder(Path(model))
    if not folder.config.is_file():
        if teacher:
            raise ConfigError(f"--teacher goes with the folder of a run, and {model} is none")
        path = {"path": model}
        config = parse({"student": path, "teacher": path, "prompts": {"source": "tiny"}}, overrides)
        chat = chat_template(load_tokenizer(config.student)) is not None
        return config, [(model, config.student, config.prompts.model_copy(update={"chat": chat}))]
    config = load(folder.config, overrides)
    prompts = config.prompts
    sources = [("after", trained_model(config, folder), prompts)]
    if config.student.path != IN_MEMORY:
        sources.insert(0, ("before", config.student, prompts))
    if teacher:
        require_local(config, "headstart chat --teacher")
        assert isinstance(config.teacher, ModelConfig)
        view = {key: value for key, value in prompts.teacher_view.model_dump().items() if value is not None}
        sources.append(("teacher", config.teacher, prompts.model_copy(update=view)))
    return config, sources


class _Speaker:
    """A model that answers, as a prompt's view shows it the line."""

    def __init__(self, name: str, source: ModelConfig, view: PromptsConfig, runtime: Runtime) -> None:
        from headstart.assemble.pair import checked, frozen, pad_id
        from headstart.models.load import load_model, load_tokenizer
        from headstart.models.vocabulary import shared_vocabulary
        from headstart.rollout.engine import InProcessEngine

        self.name, self.view, self.tokenizer = name, view, load_tokenizer(source)
        model = frozen(load_model(source, runtime.device))
        own, rows = model.generation_config, len(model.get_output_embeddings().weight)
        vocabulary = shared_vocabulary(self.tokenizer, self.tokenizer, own, own, rows, rows)
        self.model = checked(model, vocabulary, "student", pad_id(self.tokenizer), source)
        self.engine = InProcessEngine(self.model, vocabulary.stop_ids)

    def answer(self, line: str, sampling: Sampling, max_tokens: int) -> tuple[str, str]:
        """Who answers, with the answer's length, and what."""
        from headstart.models.collate import completion_text
        from headstart.models.templates import render
        from headstart.records import Problem, Prompt

        content = {"messages": ({"role": "user", "content": line},)} if self.view.chat else {"text": line}
        view = {name: getattr(self.view, name) for name in ("chat", "system", "template_kwargs")}
        ids = tuple(render(Problem("line", **content), self.tokenizer, **view))
        most = min(max_tokens, (self.model.max_positions or sys.maxsize) - len(ids))
        if most < 1:
            raise DataError(f"the line has {len(ids):,} tokens, which leaves {self.name} no room to answer; shorten it")
        asked = [Prompt(0, "line", ids, ids)]
        (rollout,) = self.engine.generate(asked, samples=1, max_tokens=most, sampling=sampling, key=(0, "chat", 0))
        cut = "" if rollout.stopped else ", cut there: --max-tokens"
        head = f"{self.name} ({len(rollout.completion_ids)} tokens{cut})"
        return head, completion_text(self.tokenizer, rollout).strip()


def _typed() -> Iterator[str]:
    """The lines of a terminal, until an empty one or `exit`; those of a pipe, until its end."""
    terminal = sys.stdin.isatty()
    if terminal:
        say("Each line is a question of its own. An empty line, exit or Ctrl-D ends.", style="dim")
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
