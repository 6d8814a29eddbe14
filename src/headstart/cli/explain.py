"""`headstart explain`: what training did to the student, and where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


SETS = ("before", "after", "fixed")
SHARES = ("share before", "share after")


def explain_command(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Settings on top of the run's, such as evaluation.limit=48."),
    ] = None,
    twin: Annotated[Path | None, typer.Option(help="The same student's run on full rollouts.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Some of cascade,commitment,swap,selection,efficiency,samples, by commas.")
    ] = None,
    selection: Annotated[
        bool, typer.Option("--selection", help="Also train one arm on full rollouts for each selection rule.")
    ] = False,
) -> None:
    """Explain a finished run: student before and after, full-rollout twin and teacher, side by side.

    Writes RUN_DIR/explain/*.json. --only selection trains its arms, too.
    """
    if bad := [item for item in overrides or [] if "=" not in item]:
        raise ConfigError(f"{bad[0]!r} is no setting; write key=value, such as evaluation.limit=48 (one run at a time)")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from headstart.explanation.run import READINGS, explain  # imports torch

    console = Console()
    columns = (TextColumn("explaining"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not console.is_terminal) as bar:
        line = bar.add_task("explaining", total=None)
        found = explain(
            run,
            twin=twin,
            only=[name.strip() for name in only.split(",")] if only else READINGS,
            overrides=overrides or (),
            selection_arms=selection or only == "selection",
            progress=lambda done, total: bar.update(line, completed=done, total=total),
        )
    tables = {
        "cascade": _cascade,
        "commitment": _commitment,
        "swap": _swap,
        "selection": _selection,
        "efficiency": _efficiency,
    }
    for name, reading in found.items():
        if name in tables:
            console.print(tables[name](reading))
        console.print(reading["sentence"] + "\n", soft_wrap=True, highlight=False)
    console.print(f"written to {run / 'explain'}", soft_wrap=True, highlight=False)


def _cascade(reading: Mapping[str, Any]) -> Table:
    where = f"untrained positions, from {reading['first']} on" if reading["untrained"] else "all positions"
    table = _table(
        f"Cascading alignment: nats per token, {where}", ("mode", *SHARES, "before", "after", "old rollouts")
    )
    for mode in (*reading["modes"], {"mode": "all", "share_before": None, "share_after": None, **reading}):
        shares = [_number(mode[key], ".1%") for key in ("share_before", "share_after")]
        table.add_row(mode["mode"], *shares, *(_number(mode["levels"][key], ".4f") for key in SETS))
    parts = reading["parts"]
    table.caption = "\n".join(f"{name} {_interval(parts[name], '+.4f')}" for name in ("change", "mixture", "within"))
    return table


def _commitment(reading: Mapping[str, Any]) -> Table:
    speakers = reading["speakers"]
    table = _table(f"Sub-mode commitment: {reading['problems']} problems x {reading['samples']}", ("", *speakers))

    def row(name: str, section: str, key: str, form: str) -> None:
        table.add_row(name, *(_number(speaker[section][key], form) for speaker in speakers.values()))

    for q in (10, 50, 90):
        row(f"length, p{q}", "lengths", f"p{q}", ".0f")
    row("stopped", "lengths", "stopped", ".1%")
    row("own top-1 probability", "choices", "own_top", ".3f")
    row("divergent positions", "choices", "divergent", ".2%")
    for rank in ("1", "2-5", "over 5"):
        ranks = (_number(speaker["choices"]["ranks"][rank], ".1%") for speaker in speakers.values())
        table.add_row(f"  teacher rank {rank} there", *ranks)
    row("different openings per sample", "openings", "distinct", ".2f")
    row("on one of the teacher's openings", "openings", "on_teacher", ".2f")
    return table


def _swap(reading: Mapping[str, Any]) -> Table:
    voices = [v for v in ("before", "after", "twin", "teacher") if any(c["tail"] == v for c in reading["cells"])]
    table = _table(
        f"Prefix swap: accuracy, the first {reading['prefix_tokens']} tokens from one, then another",
        ("first", *(f"then {voice}" for voice in voices)),
    )
    accuracy = {(c["prefix"], c["tail"]): c["accuracy"] for c in reading["cells"]}

    def show(share: Mapping[str, Any]) -> str:
        return f"{share['successes'] / share['n']:.1%} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"

    for prefix in voices:
        table.add_row(prefix, *(show(accuracy[prefix, tail]) for tail in voices))
    return table


def _selection(reading: Mapping[str, Any]) -> Table:
    arms = {arm["rule"]: arm for arm in reading["arms"]}
    trained = ("accuracy", "against first", "seconds") if arms else ()
    columns = ("mean position", "divergence", "overlap with first", *trained)
    table = _table(f"Token selection: {reading['tokens']} tokens of each rollout", ("rule", *columns))
    for rule, picked in reading["picked"].items():
        overlap = reading["overlap"][rule]["first"]
        position = "-" if picked["mean_position"] is None else f"{picked['mean_position']:.0f}"
        cells = [position, _number(picked["divergence_share"], ".1%"), "-" if overlap is None else f"{overlap:.2f}"]
        if arms:
            arm = arms.get(rule)
            cells += [_number(arm["accuracy"], ".1%"), _interval(arm["against_first"], "+.1%")] if arm else ["-", "-"]
            cells += [f"{arm['seconds']:.1f}" if arm else "-"]
        table.add_row(rule, *cells)
    return table


def _efficiency(reading: Mapping[str, Any]) -> Table:
    costs = {name: reading[name] for name in ("run", "twin") if reading[name] is not None}
    table = _table("Efficiency", ("", *costs))

    def row(name: str, form: str, *keys: str) -> None:
        cells = []
        for cost in costs.values():
            value: Any = cost
            for key in keys:
                value = None if value is None else value[key]
            cells.append("-" if value is None else format(value, form))
        table.add_row(name, *cells)

    row("steps", "d", "steps")
    row("seconds per step", ".3f", "seconds_per_step", "value")
    row("tokens per step", ",.0f", "tokens_per_step", "value")
    row("seconds", ",.1f", "seconds")
    for phase in reading["run"]["phases"]:
        row(f"  {phase}", ",.1f", "phases", phase)
    row("generated tokens", ",d", "generated_tokens")
    row("peak memory, GiB", ".2f", "peak_memory_gib")
    row("accuracy", ".1%", "accuracy", "value")
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left")


def _number(estimate: Mapping[str, Any] | None, form: str) -> str:
    return "-" if estimate is None or estimate["value"] is None else format(estimate["value"], form)


def _interval(estimate: Mapping[str, Any] | None, form: str) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"
