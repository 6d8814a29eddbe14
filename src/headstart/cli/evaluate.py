"""`headstart evaluate`: a model on a task, responses made elsewhere, or two results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.arguments import dated_folder, file_and_overrides
from headstart.cli.next_steps import say_next
from headstart.cli.show import loading, say, show
from headstart.errors import ConfigError

if TYPE_CHECKING:
    from headstart.config.schema import Config

SECTIONS = ("student", "prompts", "evaluation", "training", "sharding")
"""Sections of a run's configuration that the evaluation of a model reads."""


def evaluate_command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|RUN.yaml [key=value ...]",
            help="A model folder, hub name or run configuration; settings such as samples=8 or prompts.system=TEXT.",
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="gsm8k, math500, aime, humaneval, mbpp, bfcl, tiny, ...")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or hub dataset with the task's problems.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: runs/evaluation-<time>.")] = None,
    responses: Annotated[Path | None, typer.Option(help="Grade the responses in this JSONL file; no model.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Compare two results of the same problems.")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="k of pass@k and maj@k. Default: all samples.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="End within these: fewer problems or samples.")
    ] = None,
) -> None:
    """Measure accuracy: generate and grade, grade what exists, or compare two results."""
    if compare is not None:
        _print_comparison(*compare)
        return
    config = _config(arguments or [], task, data, without_model=responses is not None)
    assert config.evaluation is not None
    with loading():
        from headstart.evaluation.run import evaluate, evaluate_responses

    out = out or dated_folder("evaluation")
    if responses is None:
        summary = evaluate(config, out=out, k=k, minutes=minutes, say=say)
    else:
        summary = evaluate_responses(config.evaluation.task, responses, out=out, k=k)
    _print_summary(summary)
    say(f"written: {out}")
    say_next("evaluate", out)


def _config(arguments: list[str], task: str | None, data: str | None, without_model: bool) -> Config:
    """The run configuration that stands for this evaluation; keys without a section belong to `evaluation`."""
    from headstart.config.loader import load, parse
    from headstart.config.recipes import PREFIX
    from headstart.config.schema import Config

    named, settings = file_and_overrides(arguments)
    model = None if named is None else arguments[0]
    run_file = model is not None and (model.endswith((".yaml", ".yml")) or model.startswith(PREFIX))
    known = Config.model_fields if run_file else SECTIONS
    keys = [(item, item.split("=")[0].split(".")[0]) for item in settings]
    overrides = [item if section in known else f"evaluation.{item}" for item, section in keys]
    if task == "custom" and data is not None:
        task = "jsonl"  # one's own file, not one's own class
    overrides += [f"evaluation.task.{'path' if task == 'jsonl' else 'data'}={data}"] if data is not None else []
    if model is not None and run_file:
        return load(Path(model), [f"evaluation.task.type={task}", *overrides] if task else overrides)
    if task is None:
        raise ConfigError(
            "which task? Give --task NAME (gsm8k, math500, aime, humaneval, mbpp, bfcl, tiny, jsonl, ...)"
        )
    if model is None and not without_model:
        raise ConfigError("which model? headstart evaluate MODEL --task NAME, or --responses FILE to grade without one")
    path = {"path": model or "none"}
    evaluation = {"task": {"type": task}, "limit": None}
    base = {"student": path, "teacher": path, "prompts": {"source": "tiny"}, "evaluation": evaluation}
    return parse(base, overrides)


def _print_summary(summary: dict[str, Any]) -> None:
    from headstart.reports.page import Table
    from headstart.reports.wording import NOTHING, cut_mark, estimate, percent
    from headstart.stats import cut_note

    def shown(value: Any) -> str:
        return NOTHING if value is None else percent(value)

    rows = [
        [f"avg@{summary['samples']}", estimate(summary) + cut_mark(summary["truncated"])],
        *([f"{name}@{summary['k']}", shown(summary[f"{name}_at_k"])] for name in ("pass", "maj")),
        *([name.replace("_", " "), shown(summary[name])] for name in ("truncated", "no_answer", "timeout")),
        *([name.replace("_", " "), shown(value)] for name, value in summary["details"].items()),
        *(
            [f"{name} ({part['problems']})", shown(part["accuracy"])]
            for name, part in summary.get("categories", {}).items()
        ),
    ]
    if summary["length_p50"] is not None:
        lengths = " / ".join(f"{summary[f'length_p{q}']:.0f}" for q in (10, 50, 90))
        rows.append(["tokens, p10 / p50 / p90", lengths])
    rows.append(["repetition", shown(summary["repetition"])])
    show([Table((summary["task"], f"{summary['problems']} problems"), rows)])
    if note := cut_note(summary["truncated"], (summary.get("settings") or {}).get("max_tokens")):
        say(note, style="yellow")
    say(f"graded by {summary['grader']}")


def _print_comparison(a: Path, b: Path) -> None:
    from headstart.evaluation.store import compare
    from headstart.reports.page import Table
    from headstart.reports.wording import NOTHING, percent

    c = compare(a, b)
    low, high = (100 * end for end in c.interval)
    cells = [
        percent(c.a),
        percent(c.b),
        f"{100 * c.difference:+.1f}",
        f"{low:+.1f} to {high:+.1f}",
        str(c.only_a),
        str(c.only_b),
        NOTHING if c.mcnemar is None else f"{c.mcnemar:.3g}",
    ]
    show([Table(("A", "B", "A - B", "paired 95% interval", "only A", "only B", "McNemar p"), [cells])])
    verdict = "within noise" if low <= 0 <= high else "beyond noise"
    say(f"A: {a}\nB: {b}\n{c.problems} shared problems; the difference is {verdict}")
