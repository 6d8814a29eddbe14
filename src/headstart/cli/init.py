"""`headstart init`: a run file with the settings that matter; `headstart recipes`: the runs that come with the package.

What is given is inspected without torch: folders, tokenizer files, chat templates, the columns of a prompt file.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from headstart.config.evaluation import WORLDS
from headstart.errors import ConfigError, HeadstartError

DATA = {
    "gsm8k": "openai/gsm8k",
    "math500": "HuggingFaceH4/MATH-500",
    "mbpp": "google-research-datasets/mbpp",
    "humaneval": "openai/openai_humaneval",
    "bfcl": "gorilla-llm/Berkeley-Function-Calling-Leaderboard",
    "jsonl": None,
}
"""Tasks whose problems are in a file, a folder or a hub dataset, and the usual one."""
TRAINED = ("gsm8k", "math500", "mbpp")
"""Benchmarks with a training split, which may be named as prompts."""
TASKS = (*DATA, "tiny", "none")
COLUMNS = {
    "column": ("prompt", "question", "problem", "instruction", "text", "query", "messages", "conversations"),
    "answer_column": ("answer", "final_answer", "expected_answer", "reference_answer", "solution", "target", "label"),
}
"""What a column with the question and one with the answer is called, most likely name first."""
NUMBER = re.compile(r"[-+]?[\d.,]*\d")
TEMPLATE = Path(__file__).parents[1] / "data" / "init" / "run.yaml.jinja"
SMALL = 2**26
"""Bytes of weights below which all of them are trained: an adapter of rank 32 would be as large as the model."""


def init_command(
    student: Annotated[str | None, typer.Option(help="The model that is trained: a folder or hub name.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The model it learns from: a folder or hub name.")] = None,
    prompts: Annotated[str | None, typer.Option(help="File, hub dataset, or tiny, gsm8k, math500, mbpp.")] = None,
    task: Annotated[str | None, typer.Option(help=f"What the student is judged on: {', '.join(TASKS)}.")] = None,
    data: Annotated[str | None, typer.Option(help="The task's problems: a file, a folder or a hub dataset.")] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("run.yaml"),
) -> None:
    """Write a run file of about 20 lines: asks for what it needs on a terminal, takes it from the options elsewhere."""
    from headstart.cli.next_steps import say_next
    from headstart.cli.show import say
    from headstart.config.loader import parse
    from headstart.config.text import read_yaml
    from headstart.files import write_atomic

    if out.exists() or not out.parent.is_dir():
        why = "exists already" if out.exists() else "cannot be written: its folder does not exist"
        raise ConfigError(f"{out} {why}; name another file with --out")
    student = _asked("student", student, "Student (folder or hub name)", "tiny:student", _require_model)
    teacher = _asked("teacher", teacher, "Teacher (folder or hub name)", "tiny:teacher", _require_model)
    prompts = _asked("prompts", prompts, "Prompts (file, hub dataset or benchmark)", "tiny", _columns)
    likely = "tiny" if prompts == "tiny" else "none"
    task = _asked("task", task, f"Judged on ({', '.join(TASKS)})", likely, _require_task)
    if task in DATA:
        data = _asked("data", data, f"Problems of {task} (file or hub dataset)", DATA[task], _columns)
    text = _run_file(student, teacher, prompts, task, data)
    parse(read_yaml(text))
    write_atomic(out, text)
    say(f"{text}\nwritten: {out}. `headstart config {out}` prints every setting. Next:\n")
    say_next("init", out)


def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.")] = None,
) -> None:
    """List the runs that come with the package, or print one; `headstart distill recipe:NAME` takes it as it is."""
    from headstart.config.recipes import PREFIX, recipe_file, recipes

    known = recipes() if name is None else {}
    for recipe, line in known.items():
        typer.echo(f"{recipe:{max(map(len, known))}}  {line}")
    if name is not None:
        typer.echo(recipe_file(Path(PREFIX + name.removeprefix(PREFIX))).read_text(encoding="utf-8"), nl=False)


def _asked(flag: str, given: str | None, question: str, default: str | None, check: Callable[[str], object]) -> str:
    """What was given, else what is answered on a terminal, where a wrong answer is asked again."""
    if given is None and not sys.stdin.isatty():
        hint = f", such as {default}" if default else ""
        raise ConfigError(f"--{flag} is missing, and there is no terminal to ask on. {question}: give --{flag}{hint}")
    while True:
        answer = str(typer.prompt(question, default=default)) if given is None else given
        try:
            check(answer)
            return answer
        except HeadstartError as error:
            if given is not None:
                raise
            typer.echo(f"  {error}")


def _require_model(path: str) -> None:
    folder, local = _folder(path), path.startswith((".", "/", "~")) or path.count("/") != 1
    if folder is None and (local or Path(path).parent.is_dir()):
        raise ConfigError(f"there is no model folder {path}; give one with a config.json, or a hub name owner/name")
    if folder is not None and not any((folder / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
        raise ConfigError(
            f"{path} holds no config.json, so it is no Hugging Face checkpoint; give the folder that does"
        )


def _require_task(name: str) -> None:
    if name not in TASKS:
        raise ConfigError(f"{name!r} is no task here; choose one of {', '.join(TASKS)}")


def _folder(path: str) -> Path | None:
    """Where a model's files are; None for a hub name."""
    world, _, name = path.partition(":")
    folder = Path(__file__).parents[1] / "data" / world / name if world in WORLDS else Path(path).expanduser()
    return folder if folder.is_dir() else None


def _columns(source: str) -> tuple[dict[str, str], str, str]:
    """The settings that name the columns of a file, a remark on it, and its first answer; empty for what is no file."""
    from headstart.tasks.reading import is_file_source, read_rows

    if Path(source).is_dir() or not (is_file_source(source) or Path(source).exists() or source[:1] in "./~"):
        return {}, "", ""
    rows = read_rows(source)
    named = {name.lower(): name for name in rows[0]}
    found = {key: [named[name] for name in names if name in named][:1] for key, names in COLUMNS.items()}
    if not found["column"]:
        raise ConfigError(
            f"{source} has the columns {', '.join(rows[0])}, and the one with the question should be called "
            f"{', '.join(COLUMNS['column'])}; rename it, or name another in prompts.column of a file of your own"
        )
    columns = {key: names[0] for key, names in found.items() if names}
    remark = f"{len(rows):,} rows: {', '.join(rows[0])}"
    return columns, remark, str(rows[0].get(columns.get("answer_column", "")))


def _run_file(student: str, teacher: str, prompts: str, task: str, data: str | None) -> str:
    """The text of the run file, its comments in one column."""
    from jinja2 import Environment

    from headstart.tasks.math import SYSTEM

    folder, gpu = _folder(student), shutil.which("nvidia-smi") is not None
    context = re.search(r'"max_position_embeddings": *(\d+)', _text(folder, "config.json"))
    templates = {"template_kwargs": _template(student), "teacher_view": _template(teacher)}
    columns, remark, answer = _columns(prompts)
    if "/" in prompts and not remark:
        columns, remark = {"column": "prompt"}, "not looked into; subset and split choose a part"
    of_task = {"data": data} if data else {}
    if task == "jsonl" and data:
        named, _, gold = _columns(data)
        of_task = {"path": data, **named, "grader": "number" if NUMBER.fullmatch(gold) else "exact"}
    mathematics = task in ("gsm8k", "math500")
    values = {"student": student, "teacher": teacher, "prompts": prompts, "columns": columns, "task": task, "gpu": gpu}
    text = Environment().from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        values,
        of_task=of_task,
        tokenizers=_tokenizers(folder, _folder(teacher)),
        remark="the problems of the task: preflight says how many" if prompts == data else remark or "train split",
        prompt_data=(data if prompts == task else DATA[prompts]) if prompts in TRAINED else None,
        chat=templates["template_kwargs"] != "",
        thinks=next((key for key, text in templates.items() if "enable_thinking" in (text or "")), None),
        system=SYSTEM if mathematics and prompts not in TRAINED else None,
        small=folder is not None and sum(file.stat().st_size for file in folder.glob("*.safetensors")) < SMALL,
        number=NUMBER.fullmatch(answer) and not mathematics,
        room=int(context[1]) // 2 if context else 2048,
        limit=200 if gpu else 32,
    )  # fmt: skip
    lines = [line.partition("  # ") for line in text.split("\n")]
    width = max(len(line) for line, mark, _ in lines if mark and len(line) < 60)
    return "".join(f"{line:{width}}{mark}{comment}\n" if mark else f"{line}\n" for line, mark, comment in lines)


def _tokenizers(student: Path | None, teacher: Path | None) -> str:
    """What the teacher's tokenizer is to the student's, by their files."""
    files = [folder / "tokenizer.json" for folder in (student, teacher) if folder is not None]
    if len(files) < 2 or not all(file.is_file() for file in files):
        return "scores every token of them"
    same = files[0].read_bytes() == files[1].read_bytes()
    return "its tokenizer is the student's" if same else "its tokenizer file is not the student's; preflight compares"


def _template(path: str) -> str | None:
    """What a folder has about its chat template, empty where it has none; None for a hub name."""
    folder = _folder(path)
    texts = [_text(folder, name) for name in ("chat_template.jinja", "tokenizer_config.json")]
    return "".join(text for text in texts if "messages" in text) if folder else None


def _text(folder: Path | None, name: str) -> str:
    """A model's file; empty where it is not there, or the model is elsewhere."""
    file = (folder or Path()) / name
    return file.read_text(encoding="utf-8", errors="replace") if folder and file.is_file() else ""
