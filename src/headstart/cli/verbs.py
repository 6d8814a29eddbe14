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
from headstart.cli.next_steps import say_next
from headstart.cli.show import loading, say, show
from headstart.config.loader import for_teacher
from headstart.errors import ConfigError, RunFolderError
from headstart.files import make_folder
from headstart.progress import first_rank, shown
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
    from headstart.reports.contents import write_report
    from headstart.reports.readings import reading_blocks

    folder = out or dated_folder("quickstart")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists already; choose another folder with --out")
    with loading():
        from headstart.quickstart import FOLDERS, quickstart

    results = quickstart(folder, pair.value, seed, lambda text: say(text, style="bold"))
    show(reading_blocks("diagnose/decay", {"diagnose/decay": results["decay"]}))
    with shown("writing the report"):
        report = write_report([folder / name for name in FOLDERS], folder / "report.html")
    print_report(*report)
    say(f"whole quickstart: {results['seconds']:.0f} s")
    say_next("quickstart", folder / FOLDERS[0])


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
    config = run_config(arguments, "headstart preflight recipe:tiny-esr")
    if out is not None:
        try:
            make_folder(out / "diagnose")
        except RunFolderError as error:  # whose own exit code would read as "warnings"
            raise ConfigError(f"--out: {error}") from error

    if teacher_url is None and (model or teacher):
        raise ConfigError("--model and --teacher go with --teacher-url URL")
    if plan is not None:
        _show_plan(config, plan, out)

    with loading():
        from headstart.checks.run import run_preflight, write_preflight
        from headstart.checks.server import run_server_preflight
    from headstart.reports.readings import reading_blocks

    made: list[Preflight] = []
    try:
        if teacher_url is None:
            made.append(run_preflight(config, quick=quick, kept=made.append))
        else:
            with shown("asking the server"):
                made.append(run_server_preflight(config, teacher_url, model, teacher))
    finally:  # also when it is interrupted, with what it had
        for result in made[-1:]:
            show(reading_blocks("diagnose/preflight", {"diagnose/preflight": result.to_json()}))
            counts = Counter(finding.severity for finding in result.findings)
            say("preflight: " + ", ".join(f"{count} {severity}" for severity, count in counts.items()))
            if out is not None and first_rank():
                say(f"written: {write_preflight(out, result)}")
    if made[-1].exit_code < 2 and teacher_url is None:
        say_next("preflight", *(arguments or []))
    raise typer.Exit(made[-1].exit_code)


def _show_plan(config: Config, world: str, out: Path | None) -> NoReturn:
    """The table of `--plan`; exits with 0 (fits), 1 (may not fit) or 2 (does not fit)."""
    with loading():
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
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="End within these: fewer problems or lengths, shorter responses.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of several teachers, on the rows that it scores.")
    ] = None,
) -> None:
    """Measure, before training, where the teacher stops teaching, and recommend a horizon and its cost."""
    config = run_config(arguments, "headstart diagnose recipe:tiny-esr --out runs/tiny-diagnosis")
    if teacher is not None:
        config = for_teacher(config, teacher)
    folder = out or dated_folder("diagnosis")

    with loading():
        from headstart.diagnosis.run import diagnose
    from headstart.reports.readings import reading_blocks

    result = diagnose(config, out=folder, minutes=minutes, say=say)
    readings = {
        "diagnose/decay": result.decay.to_json(),
        "diagnose/positions": result.positions,
        "diagnose/recommendation": result.recommendation.to_json(),
    }
    for name in readings:
        show(reading_blocks(name, readings))
    say(f"written: {folder / 'diagnose'}")
    if pilot:
        with loading():
            from headstart.study.pilot import run_pilot

        settled = run_pilot(config, folder, say=say)
        show(reading_blocks("diagnose/pilot", {"diagnose/pilot": settled.to_json()}))
    elif (window := result.recommendation.window) is not None and teacher is None:
        kind = "" if config.horizon.type == "fixed" else "horizon.type=fixed "
        say_next("diagnose", *(arguments or []), horizon=f"{kind}horizon.tokens={window.tokens}")


def distill_command(
    arguments: RunArguments = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make. Default: output.dir, else runs/<time>.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Resume the run in this folder; training.steps=+200 after it extends one that is complete."),
    ] = None,
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
    if resume is not None and (out is not None or any("=" not in item for item in arguments or [])):
        raise ConfigError("--resume takes its configuration from the run folder; leave out all but key=value changes")
    if resume is None and names:
        raise ConfigError("--allow-changed goes with --resume DIR: it names what of that run may differ from its start")
    example = "headstart distill recipe:tiny-esr, or --resume DIR"
    config, changes = (run_config(arguments, example), []) if resume is None else (None, arguments or [])

    with loading():  # only once the configuration is known to be right
        from headstart.distillation.run import distill

    _print_result(distill(config, out=out, resume=resume, allow_changed=names, overrides=changes))


def _print_result(result: RunResult) -> None:
    from headstart.reports.contents import before_and_after
    from headstart.reports.run import read_run

    if not first_rank():
        return
    if result.after is not None:
        show([before_and_after(result.after.task, read_run(result.path).points)])
    p = result.progress
    say(
        f"{p.step} steps, {p.generated_tokens:,} generated tokens, {p.seconds:.1f} s of training. "
        f"Run folder: {result.path}"
    )
    say_next("distill", result.path)


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
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="End within these: fewer problems or samples.")
    ] = None,
) -> None:
    """Explain a finished run: student before and after, its full-rollout counterpart and teacher, side by side.

    Writes RUN_DIR/explain/*.json.
    """
    if bad := [item for item in overrides or [] if "=" not in item]:
        raise ConfigError(f"{bad[0]!r} is no setting; write key=value, such as evaluation.limit=48 (one run at a time)")
    with loading():
        from headstart.explanation.run import READINGS, explain
    from headstart.reports.readings import reading_blocks

    readings = explain(
        run,
        twin=twin,
        only=[name.strip() for name in only.split(",")] if only else READINGS,
        overrides=overrides or (),
        minutes=minutes,
        say=say,
    )
    for name in readings:
        show(reading_blocks(f"explain/{name}", {f"explain/{key}": value for key, value in readings.items()}))
    say(f"written to {run / 'explain'}")
    say_next("explain", run)


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
    from headstart.config.loader import load_study
    from headstart.study.page import accuracy_table, cost_table

    path, overrides = file_and_overrides(arguments)
    if path is None:
        raise ConfigError("which study? Give a file, such as studies/horizon.yaml, and overrides after it")
    folder = out or Path("runs") / path.stem
    load_study(path, overrides)  # what is wrong in it is said before torch is loaded
    with loading():
        from headstart.study.run import compare

    record = compare(path, overrides, out=folder, jobs=jobs)
    show([accuracy_table(record), cost_table(record)])
    say(str(record))
    for name in ("study.html", "study.md", "study.json"):
        say(f"written: {folder / name}")


def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Folders of runs or diagnoses.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: report.html in RUN_DIR, comparison.html in the first of several."),
    ] = None,
) -> None:
    """Write one self-contained HTML page, and a Markdown copy, about one run or several side by side."""
    from headstart.reports.contents import write_report

    with shown("reading and drawing"):
        written = write_report(folders, out)
    print_report(*written)
    if len(folders) == 1 and (folders[0] / "model").is_dir() and not (folders[0] / "explain").exists():
        say_next("report", *folders)


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
