"""The commands but `evaluate`: each loads what it needs inside its function, so that `--help` loads no torch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from headstart.cli.arguments import RunArguments, dated_folder, file_and_overrides, run_config
from headstart.cli.show import progress_bar, say, show
from headstart.errors import ConfigError, RunFolderError
from headstart.files import make_folder
from headstart.train.signals import StopSignals

if TYPE_CHECKING:
    from headstart.checks.findings import Preflight
    from headstart.config.schema import Config
    from headstart.reports.run import Run
    from headstart.train.loop import RunResult


class PairName(StrEnum):
    """The bundled pairs: a student that executes well, a worse one, and a teacher with another tokenizer."""

    strong = "strong"
    weak = "weak"
    cross = "cross"


def quickstart_command(
    pair: Annotated[
        PairName,
        typer.Option(
            help="weak: the student that executes worse, where early stopping loses. cross: a teacher with another "
            "tokenizer."
        ),
    ] = PairName.strong,
    out: Annotated[Path | None, typer.Option(help="Folder to make. Default: runs/quickstart-<time>.")] = None,
    seed: Annotated[int, typer.Option(help="Keys every random draw.")] = 0,
) -> None:
    """Distil a bundled student in about two minutes, with early stopping and with full rollouts, and compare."""
    from rich.console import Console

    from headstart.reports.contents import write_report
    from headstart.reports.readings import reading_blocks

    folder = out or dated_folder("quickstart")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists already; choose another folder with --out")
    console = Console()
    with console.status("Loading torch and transformers ..."):
        from headstart.quickstart import FOLDERS, quickstart

    results = quickstart(folder, pair.value, seed, lambda text: say(text, console, "bold"))
    show(reading_blocks("diagnose/decay", {"diagnose/decay": results["decay"]}), console)
    print_report(*write_report([folder / name for name in FOLDERS], folder / "report.html"))
    say(f"whole quickstart: {results['seconds']:.0f} s", console)


def preflight_command(
    arguments: RunArguments = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write diagnose/preflight.json into.")] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="nodes=N,gpus=N,gib=N",
            help="Only memory on such GPUs, from both config.json alone: no weights and no GPU needed.",
        ),
    ] = None,
    teacher_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Only what the teacher's server at this URL can give this run.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --teacher-url: the name it is served under.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="With --teacher-url: compare with this copy of the teacher."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what samples or differentiates: seconds, not minutes.")
    ] = False,
) -> None:
    """Check that student, teacher and prompts fit together. Exits with 0 (clean), 1 (warnings) or 2 (blocking)."""
    config = run_config(arguments, "headstart preflight recipes/tiny-esr.yaml")
    if out is not None:
        try:
            make_folder(out / "diagnose")
        except RunFolderError as error:  # whose own exit code would read as "warnings"
            raise ConfigError(f"--out: {error}") from error

    if teacher_url is None and (model or teacher):
        raise ConfigError("--model and --teacher go with --teacher-url URL")
    if plan is not None:
        _show_plan(config, plan, out)

    from headstart.checks.run import run_preflight, write_preflight
    from headstart.checks.server import run_server_preflight
    from headstart.reports.readings import reading_blocks

    made: list[Preflight] = []
    try:
        with progress_bar("checks") as progress:
            if teacher_url is None:
                made.append(run_preflight(config, quick=quick, progress=progress, kept=made.append))
            else:
                made.append(run_server_preflight(config, teacher_url, model, teacher))
    finally:  # also when it is interrupted, with what it had
        for result in made[-1:]:
            show(reading_blocks("diagnose/preflight", {"diagnose/preflight": result.to_json()}))
            counts = Counter(finding.severity for finding in result.findings)
            say("preflight: " + ", ".join(f"{count} {severity}" for severity, count in counts.items()))
            if out is not None and os.environ.get("RANK", "0") == "0":
                say(f"written: {write_preflight(out, result)}")
    raise typer.Exit(made[-1].exit_code)


def _show_plan(config: Config, world: str, out: Path | None) -> NoReturn:
    """The table of `--plan`; exits with 0 (fits), 1 (may not fit) or 2 (does not fit)."""
    from headstart.checks.plan import World, plan
    from headstart.files import write_json
    from headstart.reports.readings import reading_blocks

    record = plan(config, World.parse(world)).to_json()
    show(reading_blocks("diagnose/plan", {"diagnose/plan": record}))
    if out is not None:
        write_json(out / "diagnose" / "plan.json", record)
        say(f"written: {out / 'diagnose' / 'plan.json'}")
    raise typer.Exit(record["exit_code"])


def diagnose_command(
    arguments: RunArguments = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write, or to resume. Default: runs/diagnosis-<time>.")
    ] = None,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Then settle it by experiment: a few short trainings at several horizons.")
    ] = False,
) -> None:
    """Measure, before training, where the teacher stops teaching, and recommend a horizon and its cost."""
    config = run_config(arguments, "headstart diagnose recipes/tiny-esr.yaml --out runs/tiny-diagnosis")
    folder = out or dated_folder("diagnosis")

    from headstart.diagnosis.run import diagnose  # imports torch
    from headstart.reports.readings import reading_blocks

    with progress_bar("loading") as progress:
        result = diagnose(config, out=folder, progress=progress, say=say)
    readings = {
        "diagnose/decay": result.decay.to_json(),
        "diagnose/positions": result.positions,
        "diagnose/recommendation": result.recommendation.to_json(),
    }
    for name in readings:
        show(reading_blocks(name, readings))
    say(f"written: {folder / 'diagnose'}")
    if pilot:
        from headstart.study.pilot import run_pilot

        with progress_bar("trained and graded") as progress:
            settled = run_pilot(config, folder, progress, say)
        show(reading_blocks("diagnose/pilot", {"diagnose/pilot": settled.to_json()}))


def distill_command(
    arguments: RunArguments = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make. Default: output.dir, else runs/<time>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the run in this folder.")] = None,
    allow_changed: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="With --resume: what may differ from the start (training.steps,prompts)."
        ),
    ] = None,
) -> None:
    """Distil a student from its teacher, as RUN.yaml says."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and StopSignals.current is not None:
        StopSignals.current.defer()  # a rank that left now would leave the others waiting for it
    names = [name.strip() for name in allow_changed.split(",")] if allow_changed is not None else []
    if resume is not None and (arguments or out is not None):
        raise ConfigError("--resume takes its configuration from the run folder; leave out everything else")
    if resume is None and names:
        raise ConfigError("--allow-changed goes with --resume DIR: it names what of that run may differ from its start")
    example = "headstart distill recipes/tiny-esr.yaml, or --resume DIR"
    config = run_config(arguments, example) if resume is None else None

    from headstart.distillation.run import distill  # imports torch, so only once the configuration is known to be right

    _print_result(distill(config, out=out, resume=resume, allow_changed=names))


def _print_result(result: RunResult) -> None:
    from headstart.reports.contents import before_and_after
    from headstart.reports.run import read_run

    if os.environ.get("RANK", "0") != "0":
        return
    if result.after is not None:
        show([before_and_after(result.after.task, read_run(result.path).points)])
    p = result.progress
    say(
        f"{p.step} steps, {p.generated_tokens:,} generated tokens, {p.seconds:.1f} s of training. "
        f"Run folder: {result.path}"
    )


def explain_command(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Settings on top of the run's, such as evaluation.limit=48."),
    ] = None,
    twin: Annotated[
        Path | None, typer.Option(help="Its full-rollout counterpart: the same student trained on full rollouts.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Some of cascade,commitment,swap,selection,efficiency,samples, by commas.")
    ] = None,
    selection: Annotated[
        bool, typer.Option("--selection", help="Also train one arm on full rollouts for each selection rule.")
    ] = False,
) -> None:
    """Explain a finished run: student before and after, its full-rollout counterpart and teacher, side by side.

    Writes RUN_DIR/explain/*.json. --only selection trains its arms, too.
    """
    if bad := [item for item in overrides or [] if "=" not in item]:
        raise ConfigError(f"{bad[0]!r} is no setting; write key=value, such as evaluation.limit=48 (one run at a time)")
    from headstart.explanation.run import READINGS, explain  # imports torch
    from headstart.reports.readings import reading_blocks

    with progress_bar("explaining") as progress:
        readings = explain(
            run,
            twin=twin,
            only=[name.strip() for name in only.split(",")] if only else READINGS,
            overrides=overrides or (),
            selection_arms=selection or only == "selection",
            progress=progress,
        )
    for name in readings:
        show(reading_blocks(f"explain/{name}", {f"explain/{key}": value for key, value in readings.items()}))
    say(f"written to {run / 'explain'}")


def compare_command(
    arguments: Annotated[
        list[str], typer.Argument(metavar="STUDY.yaml [key=value ...]", help="A study and overrides on top of it.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to make, or to resume. Default: runs/<study's name>.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: one for each GPU, or one on a CPU.")
    ] = None,
) -> None:
    """Run every arm of a study with every seed, and compare them at equal steps, tokens and seconds.

    The same command resumes a study that was stopped.
    """
    from rich.console import Console

    from headstart.config.loader import load_study
    from headstart.study.page import accuracy_table, cost_table

    path, overrides = file_and_overrides(arguments)
    if path is None:
        raise ConfigError("which study? Give a file, such as studies/horizon.yaml, and overrides after it")
    folder, console = out or Path("runs") / path.stem, Console()
    load_study(path, overrides)  # what is wrong in it is said before torch is loaded
    with console.status("Loading torch and transformers ..."):
        from headstart.study.run import compare

    with progress_bar("runs", console) as bar:

        def finished(done: int, total: int, text: str = "", /) -> None:
            bar(done, total, text)
            if not console.is_terminal:
                say(f"{done}/{total} {text}", console)

        record = compare(path, overrides, out=folder, jobs=jobs, progress=finished)
    show([accuracy_table(record), cost_table(record)], console)
    say(str(record), console)
    for name in ("study.html", "study.md", "study.json"):
        say(f"written: {folder / name}", console)


def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Folders of runs or diagnoses.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: report.html in RUN_DIR, comparison.html in the first of several."),
    ] = None,
) -> None:
    """Write one self-contained HTML page, and a Markdown copy, about one run or several side by side."""
    from headstart.reports.contents import write_report

    print_report(*write_report(folders, out))


def print_report(paths: Sequence[Path], runs: Sequence[Run]) -> None:
    """The page's table and its sentences, what could not be read, and where the page lies."""
    from headstart.reports.contents import TABLE_HEADER, table_rows, teacher
    from headstart.reports.page import Table
    from headstart.reports.run import labels
    from headstart.reports.wording import outcome

    rows = table_rows(list(zip(labels(runs), runs, strict=True)), teacher(runs))
    show([Table(TABLE_HEADER, rows)] if rows else [])
    for text in (*outcome(runs), *(f"{run.path}: {problem}" for run in runs for problem in run.problems)):
        say(text)
    for path in paths:
        say(f"written: {path}")


def config_command(
    arguments: RunArguments = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema instead.")] = False,
) -> None:
    """Print the annotated default configuration, or RUN.yaml resolved: overrides applied, defaults filled in."""
    from headstart.config.loader import load
    from headstart.config.render import annotated_default, json_schema, resolved

    if schema and arguments:
        raise ConfigError(f"--schema prints the schema of every configuration; leave out {' '.join(arguments)}")
    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
    elif not arguments:
        typer.echo(annotated_default(), nl=False)
    else:
        typer.echo(resolved(load(*file_and_overrides(arguments))), nl=False)
