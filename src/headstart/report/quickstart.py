"""The page of `headstart quickstart`: one self-contained HTML file, two pictures and the figures as JSON.

`results` is the JSON-able dict that the quickstart returns; a worked example is made in
`tests/unit/test_quickstart_report.py`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from headstart.report.comparison import Record, at_equal_steps, find_arm, first_past, last_within
from headstart.report.wording import decay_reading, outcome, percent, weaknesses

__all__ = ["TABLE_HEADER", "outcome", "render", "table_rows", "write_page"]

TABLE_HEADER = ("model", "steps", "accuracy [95% interval]", "plan right", "generated tokens", "training seconds")
NOTHING = "-"


def table_rows(results: Record) -> list[list[str]]:
    """One row per compared model, in the columns of `TABLE_HEADER`; ready for a terminal and for HTML.

    Student, teacher, early stopping (also after as many steps as full rollouts ended with, where that was measured),
    then full rollouts in step order: the points around equal seconds, the one at equal steps (or the nearest before),
    the end. Roles that fall on one point share a row; a missing arm has none.
    """
    student, teacher = results["student"], results["teacher"]
    rows = [_row("student before", "0", student), _row("teacher", NOTHING, teacher)]
    early, full = find_arm(results, "esr"), find_arm(results, "full")
    end = early["points"][-1] if early is not None else None
    last = full["points"][-1]["step"] if full is not None else None
    halfway = [p for p in (early["points"] if early is not None else []) if p["step"] == last and p is not end]
    if early is not None:
        rows += [_trained(f"{early['name']}: {last} steps", point) for point in halfway]
        rows.append(_trained(f"{early['name']}: end", early["points"][-1]))
    if full is not None:
        roles = _roles(full["points"], end, same_steps=bool(halfway))
        rows += [_trained(f"{full['name']}: {role}", point) for role, point in roles]
    return rows


def _roles(points: Sequence[Record], end: Record | None, same_steps: bool) -> list[tuple[str, Record]]:
    """The points of full rollouts worth a row beside early stopping's `end`, in step order, with what they stand for.

    Evaluations are rare, so equal cost is shown as the two points around it. `same_steps`: early stopping has a row of
    its own at the last step of full rollouts, so that needs no stand-in.
    """
    roles: list[tuple[str, Record | None]] = [("end", points[-1])]
    if end is not None:
        step, seconds = end["step"], end["seconds"]
        same = at_equal_steps(points, step)
        exact = same is not None and same["step"] == step
        within = last_within(points, seconds)
        if exact or not same_steps:
            roles.append(("equal steps" if exact else f"nearest to {step} steps", same))
        roles.append((f"last within {seconds:.1f} s", within))
        if within is None or within["seconds"] < seconds:
            roles.append((f"first past {seconds:.1f} s", first_past(points, seconds)))
    return [
        (", ".join(role for role, other in roles if other is point), point)
        for point in points
        if any(other is point for _, other in roles)
    ]


def _trained(name: str, point: Record) -> list[str]:
    cost = f"{point['generated_tokens']:,}", f"{point['seconds']:.1f}"
    return _row(name, str(point["step"]), point["eval"], *cost)


def _row(name: str, step: str, evaluation: Record, tokens: str = NOTHING, seconds: str = NOTHING) -> list[str]:
    low, high = evaluation["interval"]
    plan = evaluation["details"].get("plan_right")
    return [
        name,
        step,
        f"{percent(evaluation['accuracy'])} [{100 * low:.1f}, {100 * high:.1f}]",
        NOTHING if plan is None else percent(plan),
        tokens,
        seconds,
    ]


def write_page(results: Record, folder: Path) -> list[Path]:
    """Write `quickstart.json`, `accuracy.png`, `decay.png` and `quickstart.html` into `folder`; return their paths.

    The figures come first, as JSON, so that nothing measured is lost should drawing fail. The page needs no network
    and no other file. Raises OSError when the folder cannot be written.
    """
    from headstart.report.figures import accuracy_figure, decay_figure, to_png, to_svg

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("quickstart.json", "accuracy.png", "decay.png", "quickstart.html")]
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    accuracy, decay = accuracy_figure(results), decay_figure(results)
    paths[1].write_bytes(to_png(accuracy))
    paths[2].write_bytes(to_png(decay))
    paths[3].write_text(render(results, to_svg(accuracy), to_svg(decay)), encoding="utf-8")
    return paths


def render(results: Record, accuracy_svg: str, decay_svg: str) -> str:
    """The page as HTML text around two pictures given as SVG text."""
    from jinja2 import Environment, StrictUndefined

    source = files("headstart.report").joinpath("quickstart.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        results=results,
        outcome=outcome(results),
        header=TABLE_HEADER,
        rows=table_rows(results),
        accuracy_image=_data_uri(accuracy_svg),
        decay_image=_data_uri(decay_svg),
        decay_reading=decay_reading(results),
        decay_rows=_decay_rows(results),
        weaknesses=weaknesses(results),
        settings=_settings(results),
    )


def _data_uri(svg: str) -> str:
    """As an image, not as inline markup: the two pictures then cannot clash in their ids."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _decay_rows(results: Record) -> list[list[str]]:
    keys = ("after_student", "after_clean", "after_wrong", "after_own")
    return [[str(p["prefix_tokens"]), *(_share_cell(p[key]) for key in keys)] for p in results["decay"]["points"]]


def _share_cell(share: Record) -> str:
    if not share["n"]:
        return NOTHING
    return f"{share['successes']} of {share['n']} ({share['successes'] / share['n']:.0%})"


def _settings(results: Record) -> list[list[str]]:
    """Settings by arm: one row per name, one column per arm; what an arm does not set is a dash."""
    arms = results["arms"]
    names = list(dict.fromkeys(name for arm in arms for name in arm["settings"]))
    return [[name.replace("_", " "), *(_setting(arm["settings"].get(name)) for arm in arms)] for name in names]


def _setting(value: Any) -> str:
    match value:
        case None:
            return NOTHING
        case float() if math.isfinite(value):
            return f"{value:g}"
        case _:
            return str(value)
