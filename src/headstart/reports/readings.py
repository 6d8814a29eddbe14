"""Sections of the page for the files of `diagnose/` and `explain/`, one for each file that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headstart.reports.figures import (
    MODELS,
    cascade_figure,
    decay_figure,
    dots_figure,
    lengths_figure,
    phases_figure,
    positions_figure,
    to_svg,
)
from headstart.reports.page import Block, Fold, Picture, Section, Table, Text, Token, Tokens
from headstart.reports.run import Record, Run
from headstart.reports.wording import NOTHING, decay_cuts, decay_reading, estimate, share
from headstart.samples import shade

Cells = Mapping[str, Callable[[Any], str]]
"""Titles of columns or rows, each with the function that makes its cells."""
WORST = 3
"""Most divergent tokens of a rollout that are named in words."""


def reading_sections(runs: Sequence[tuple[str, Run]]) -> Iterator[Section]:
    """The readings of all folders, kind by kind. A file with unexpected content gives one line of warning."""
    for name, (title, build) in BUILDERS.items():
        for index, (of, run) in enumerate((of, run) for of, run in runs if name in run.readings):
            try:
                blocks = list(build(run.readings[name], run.readings))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                what = f"{type(error).__name__}: {error}"
                blocks = [
                    Text(
                        f"{run.path.name}/{name}.json cannot be shown ({what}); run the command that wrote it again.",
                        "warning",
                    )
                ]
            if index:  # figures of several runs need distinct file names
                blocks = [replace(b, name=f"{b.name}-{index}") if isinstance(b, Picture) else b for b in blocks]
            yield Section(f"{title} ({of})" if len(runs) > 1 else title, blocks)


def reading_blocks(name: str, readings: Mapping[str, Record]) -> list[Block]:
    """The blocks of one reading, such as `explain/swap`, for a terminal."""
    return list(BUILDERS[name][1](readings[name], readings))


def _table(items: Iterable[Any], columns: Cells) -> Table:
    """A row for each item, a column for each cell function."""
    return Table(tuple(columns), [[cell(item) for cell in columns.values()] for item in items])


def _side_by_side(corner: str, named: Mapping[str, Record], lines: Cells) -> Table:
    """A column for each record, a row for each cell function."""
    rows = [[title, *(cell(record) for record in named.values())] for title, cell in lines.items()]
    return Table((corner, *named), rows)


def _preflight(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    calm = []
    for finding in record["findings"]:
        check, severity, message = (finding[key] for key in ("check", "severity", "message"))
        if severity in ("warning", "blocking"):
            remedy = f" {finding['remedy']}" if finding.get("remedy") else ""
            yield Text(f"{severity.capitalize()}, {check}: {message}.{remedy}", "warning")
        elif severity in ("ok", "note"):
            calm.append([check, severity, message])
    if calm:
        yield Fold(f"{len(calm)} checks without a complaint", [Table(("check", "", "finding"), calm, prose=True)])
    if left_out := record.get("not_made"):
        yield Text(f"Not made: {', '.join(left_out)}.", "soft")


PLAN_ITEMS = {
    "student_weights": ("student's weights", "always"),
    "teacher_weights": ("teacher's weights", "always"),
    "optimizer_states": ("optimizer: AdamW's averages", "always"),
    "gradients": ("gradients", "student, optimizer"),
    "gathered_layers": ("gathered layers and head, gradients of one", "all passes"),
    "kv_cache": ("KV cache", "rollout"),
    "generation_copy": ("student gathered whole for generation", "rollout"),
    "sampling": ("prefill and sampler", "rollout"),
    "teacher_scoring": ("teacher's scoring pass", "teacher"),
    "activations": ("student's activations", "student"),
    "logits": ("logits and divergence", "student"),
}


def _plan(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    items, memory, world = record["memory"]["items"], record["memory"], _world(record["world"])
    student, teacher = (
        record[who] + (f" ({_billions(count)})" if (count := record[f"{who}_parameters"]) else "")
        for who in ("student", "teacher")
    )
    held = "every rank holds both" if record["shards"] is None else f"each sharded over {record['shards']} ranks"
    tuning = f"{record['tuning']}, {_billions(record['trained_parameters'])} trained"
    yield Text(
        f"{student} <- {teacher}; {tuning}; {world}, {held}; prompts up to {record['prompt_tokens']:,} tokens, "
        f"rollouts of {record['horizon']:,}, {items['micro_batch']} in a micro-batch"
    )
    used = {name: cells for name, cells in PLAN_ITEMS.items() if items[name]}
    rows = [[title, phase, f"{items[name]:.2f}"] for name, (title, phase) in used.items()]
    other = "without" if record["checkpointing"] else "with"
    rows.append([f"(activations {other} gradient checkpointing)", "", f"{record['other_activations']:.2f}"])
    rows += [[f"in all: {p}", p, f"{_in_all(memory, p):.2f}"] for p in ("rollout", "teacher", "student", "optimizer")]
    yield Table(("GiB per rank", "phase", ""), rows)
    verdict = ("fits", "may not fit: over 90%", "does not fit")[record["exit_code"]]
    yield Text(f"peak {record['peak']:.1f} of {record['world']['gib']:g} GiB per device: {verdict}", "outcome")
    places = {"beside": "on the same devices", "url": "at a URL"}
    cells = [
        [s["tuning"], places[s["teacher"]], _world(s["world"]) if s["world"] else "none", f"{s['peak']:.1f}"]
        for s in record["smallest"]
    ]
    if cells:
        yield Table(("smallest world that fits", "teacher", "devices", "peak GiB"), cells)


def _in_all(memory: Record, phase: str) -> float:
    return float(memory["weights"] + memory["states"] + memory[phase])


def _world(world: Record) -> str:
    nodes = "" if world["nodes"] == 1 else f"{world['nodes']} nodes x "
    return f"{nodes}{world['gpus']} x {world['gib']:g} GiB"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def _recommendation(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome" if record["supported"] else "warning")
    yield Fold("Why", [Text(reason) for reason in record["reasons"]])
    rows = [[f"{c['tokens']:,}", _number(c["seconds"]), _number(c["gib"])] for c in record["costs"]]
    if rows:
        yield Table(("horizon, tokens", "seconds a step", "peak GiB"), rows)


def _decay(record: Record, all_: Mapping[str, Record]) -> Iterator[Block]:
    advice = all_.get("diagnose/recommendation", {})
    window = (advice["low"], advice["tokens"], advice["high"]) if advice.get("tokens") else None
    points = record["points"]
    right = ", ".join(f"{share(p['after_student'])} at {p['prefix_tokens']}" for p in points)
    yield Picture(
        "decay",
        to_svg(decay_figure(record, window)),
        f"Accuracy of continuations against prefix length. The teacher is right after the student's prefix on {right}.",
        f"One model starts, is cut at the prefix length, and one of the two finishes; {record['prompts']} problems. "
        "The axis is logarithmic beyond 4. Bands are 95% intervals"
        + ("; grey: the recommended range." if window else "."),
    )
    yield from (Text(note, "warning") for note in decay_cuts(record))
    if reading := decay_reading(record):
        yield Text(reading)
    columns = {
        "after_student": "R", "after_clean": "R clean", "after_wrong": "R wrong", "after_finished": "R finished",
        "after_own": "T own", "gift": "G", "student_continues": "S own",
    }  # fmt: skip
    shown = {key: name for key, name in columns.items() if any(key in p for p in points)}
    rows = [
        [str(p["prefix_tokens"]), *(estimate(p.get(key), ".0%") for key in shown), estimate(p.get("damage"), ".2f")]
        for p in points
    ]
    kind = "" if record.get("labelled", True) else ", agreement with the teacher's majority"
    legend = (
        "N: length of the prefix. R: the teacher finishes the student's prefix (clean so far, already wrong, already "
        "finished). G: the student finishes the teacher's. T own, S own: each finishes its own. D: damage share."
    )
    table = Table(("N", *shown.values(), "D"), rows)
    yield Fold(f"{record['task']}, {record['prompts']} problems: right answers{kind}", [table, Text(legend, "soft")])


def _positions(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    spread = record.get("coverage_interval", {})
    cover = ", ".join(
        f"{float(part):.0%} within {tokens} tokens" + (" [{}, {}]".format(*spread[part]) if part in spread else "")
        for part, tokens in record["coverage"].items()
    )
    first, last = record["bins"][0], record["bins"][-1]
    alt = (
        "Divergence, entropies and agreement by completion position. Divergence is "
        f"{first['divergence']['mean']:.3g} nats per token at the start and {last['divergence']['mean']:.3g} at "
        f"position {last['first']}."
    )
    caption = (
        f"{record['rollouts']} full rollouts of the student, {record['tokens']:,} tokens, in bins from where marked."
    )
    yield Text(f"Share of all divergence: {cover}.")
    yield Picture("positions", to_svg(positions_figure(record)), alt, caption)
    columns: Cells = {
        "tokens": lambda row: f"{row['first']}-{row['last']}",
        "nats": lambda row: f"{row['divergence']['mean']:.3f}",
        "share so far": lambda row: NOTHING if row["divergence_share"] is None else f"{row['divergence_share']:.0%}",
        "entropy S": lambda row: f"{row['student_entropy']['mean']:.2f}",
        "entropy T": lambda row: f"{row['teacher_entropy']['mean']:.2f}",
        "teacher's top": lambda row: f"{row['teacher_top']['mean']:.2f}",
        "same top": lambda row: f"{row['agree']['mean']:.0%}",
        "common top 16": lambda row: f"{row['overlap']['mean']:.0%}",
    }
    yield Fold(f"{record['rollouts']} full rollouts of the student, by position", [_table(record["bins"], columns)])


def _pilot(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    steps = sorted({rung["steps"] for arm in record["arms"] for rung in arm["rungs"]})
    rows = []
    for arm in record["arms"]:
        at = {rung["steps"]: rung for rung in arm["rungs"]}
        cells = [estimate(at.get(s)) for s in steps]
        cost = sum(rung["seconds"] for rung in arm["rungs"])
        rows.append([f"N = {arm['tokens']}, lr {arm['lr']:g}", *cells, f"{cost:.1f}", arm.get("reason") or NOTHING])
    yield Table(("arm", *(f"{s} steps" for s in steps), "seconds", "dropped"), rows)


def _cascade(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    levels = record["levels"]
    alt = (
        "Divergence by position before and after training, and its change in parts. Positions from "
        f"{record['first']} on: before {estimate(levels['before'], '.4f')}, after {estimate(levels['after'], '.4f')} "
        f"nats per token; mixture "
        f"{estimate(record['parts']['mixture'], '.4f')}, within {estimate(record['parts']['within'], '.4f')}."
    )
    caption = (
        "Mixture: other kinds of rollouts became frequent. Within: the same kind of rollout diverges less. “After, on "
        f"old rollouts” scores the rollouts of before. {record['problems']} problems x {record['samples']} samples; "
        "intervals resample problems."
    )
    yield Picture("cascade", to_svg(cascade_figure(record)), alt, caption)
    yield _table(
        record["modes"],
        {
            "kind of rollout": lambda mode: mode["mode"],
            "share before": lambda mode: estimate(mode["share_before"], ".0%"),
            "share after": lambda mode: estimate(mode["share_after"], ".0%"),
            "nats before": lambda mode: estimate(mode["levels"].get("before"), ".2g"),
            "nats after": lambda mode: estimate(mode["levels"].get("after"), ".2g"),
            "after, on old rollouts": lambda mode: estimate(mode["levels"].get("fixed"), ".2g"),
        },
    )
    parts = ", ".join(f"{name} {estimate(record['parts'][name], '+.4f')}" for name in ("change", "mixture", "within"))
    yield Text(f"Nats per token: {parts}.")
    yield Text(
        f"Kinds are distinguished by {record['modes_by']}; nats per token on positions from {record['first']} on.",
        "soft",
    )


def _commitment(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    models = {MODELS.get(name, name): model for name, model in record["speakers"].items()}
    median = ", ".join(f"{name} {estimate(model['lengths']['p50'], '.0f')}" for name, model in models.items())
    alt = f"Distribution of response lengths. Medians in tokens: {median}."
    yield Picture("lengths", to_svg(lengths_figure(record["speakers"])), alt, "Responses by length in tokens.")
    lines: Cells = {
        "length p10, tokens": lambda m: estimate(m["lengths"]["p10"], ".0f"),
        "median length": lambda m: estimate(m["lengths"]["p50"], ".0f"),
        "length p90": lambda m: estimate(m["lengths"]["p90"], ".0f"),
        "stopped by itself": lambda m: estimate(m["lengths"]["stopped"], ".0%"),
        "positions with another favourite": lambda m: estimate(m["choices"]["divergent"]),
        "… token is the teacher's favourite": lambda m: estimate(m["choices"]["ranks"]["1"], ".0%"),
        "… token is the teacher's 2nd to 5th": lambda m: estimate(m["choices"]["ranks"]["2-5"], ".0%"),
        "own favourite's probability": lambda m: estimate(m["choices"]["own_top"], ".3f"),
        "different openings per sample": lambda m: estimate(m["openings"]["distinct"], ".2f"),
        "samples on an opening of the teacher": lambda m: estimate(m["openings"]["on_teacher"], ".2f"),
    }
    yield _side_by_side("reading", models, lines)
    yield Text(
        "“…” is over positions where student and teacher favour different tokens; for the teacher, over all.", "soft"
    )


def _swap(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    accuracies = {(cell["prefix"], cell["tail"]): cell["accuracy"] for cell in record["cells"]}
    models = [model for model in MODELS if any(model in pair for pair in accuracies)]
    rows = [
        [MODELS[prefix], *(estimate(accuracies.get((prefix, tail)), ".0%") for tail in models)] for prefix in models
    ]
    header = (f"first {record['prefix_tokens']} tokens from", *(f"rest from {MODELS[model]}" for model in models))
    yield Table(header, rows)
    yield Text(f"Accuracy over {record['problems']} problems, one response each, 95% intervals.", "soft")


def _selection(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    dots: list[tuple[str, Record | None]] = [
        (rule, p["divergence_share"]) for rule, p in record["picked"].items() if rule != "all"
    ]
    xlabel = f"share of all divergence on the {record['tokens']} tokens picked"
    values = ", ".join(f"{rule} {estimate(value, '.0%')}" for rule, value in dots)
    caption = f"{record['tokens']} tokens of each of {record['rollouts']} full rollouts, by the rule that picks them."
    yield Picture("selection", to_svg(dots_figure(dots, xlabel)), f"{xlabel.capitalize()}, by rule: {values}.", caption)
    picked: Cells = {
        "rule": lambda item: item[0],
        "mean position": lambda item: _number(item[1]["mean_position"]),
        "share of all divergence": lambda item: estimate(item[1]["divergence_share"], ".0%"),
    }
    classes: Cells = {
        "class of token": lambda item: item[0],
        "share": lambda item: estimate(item[1]["tokens"], ".0%"),
        "nats per token": lambda item: _number(item[1]["divergence"]),
        "share of all divergence": lambda item: estimate(item[1]["divergence_share"], ".0%"),
    }
    tables = [_table(record["picked"].items(), picked)]
    tables += [_table(record["classes"].items(), classes)] if record.get("classes") else []
    yield Fold("What each rule picks", tables)


def _efficiency(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    runs = {"this run": record["run"], MODELS["twin"]: record.get("twin")}
    runs = {name: cost for name, cost in runs.items() if cost}
    pace = "; ".join(f"{name}: {estimate(cost['seconds_per_step'], '.3f')} s a step" for name, cost in runs.items())
    caption = "Seconds of a step by phase, evaluations not counted; both in the same engine."
    figure = phases_figure(list(runs.items()))
    yield Picture("efficiency", to_svg(figure), f"Seconds of a step by phase. {pace}.", caption)
    lines: Cells = {
        "seconds a step": lambda cost: estimate(cost["seconds_per_step"], ".3f"),
        "tokens a step": lambda cost: estimate(cost["tokens_per_step"], ".0f"),
        "steps": lambda cost: str(cost["steps"]),
        "seconds": lambda cost: f"{cost['seconds']:.1f}",
        "generated tokens": lambda cost: f"{cost['generated_tokens']:,}",
        "peak GiB": lambda cost: _number(cost["peak_memory_gib"]),
    }
    yield _side_by_side("training only", runs, lines)


def _samples(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    yield Text(
        "The first problems, before and after training. The stronger a token's colour, the more the student diverges "
        "from the teacher there; hover over it or tap it to see what the teacher would have said instead.",
    )
    for before, after in zip(record["before"], record["after"], strict=True):
        yield Text(f"Prompt: {before['prompt']}" if before.get("prompt") else f"Problem {before['problem_id']}", "soft")
        yield _tokens("before", before)
        yield _tokens("after", after)


def _tokens(when: str, sample: Record) -> Tokens:
    nats = sample["divergence"]
    notes = [_note(*token) for token in zip(nats, sample["rank"], sample["alternatives"], strict=True)]
    tokens = [Token(text, shade(value), note) for text, value, note in zip(sample["tokens"], nats, notes, strict=True)]
    order = sorted(range(len(tokens)), key=lambda i: -nats[i])
    worst = sorted(i for i in order[:WORST] if tokens[i].shade)
    graded = {None: "", True: ", right", False: ", wrong"}[sample.get("correct")]
    ending = "" if sample.get("stopped", True) else ", cut off"
    size = f"{len(tokens)} tokens, {sum(nats) / max(len(tokens), 1):.3f} nats per token"
    title = f"{sample['problem_id']}, {when}{graded}{ending}: {size}"
    return Tokens(title, tokens, [f"token {i + 1}, “{tokens[i].text.strip()}”: {notes[i]}" for i in worst])


def _note(nats: float, rank: int, alternatives: Sequence[Sequence[Any]]) -> str:
    likely = ((text.strip() or text, probability) for text, probability in alternatives if probability >= 0.001)
    rather = ", ".join(f"“{text}” {probability:.1%}" for text, probability in likely)
    return f"{nats:.2f} nats, the teacher's no. {rank}; it would say {rather}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


Builder = Callable[[Record, Mapping[str, Record]], Iterator[Block]]
BUILDERS: dict[str, tuple[str, Builder]] = {
    "diagnose/preflight": ("Preflight: does the pair fit together?", _preflight),
    "diagnose/plan": ("Memory by configurations", _plan),
    "diagnose/recommendation": ("Where to stop", _recommendation),
    "diagnose/decay": ("Teacher decay", _decay),
    "diagnose/positions": ("Where the signal is", _positions),
    "diagnose/pilot": ("Pilot: the horizon by experiment", _pilot),
    "explain/cascade": ("Cascading alignment: did the untrained positions follow?", _cascade),
    "explain/commitment": ("Sub-mode commitment: what does it say now?", _commitment),
    "explain/swap": ("Prefix swap: where is the gain?", _swap),
    "explain/selection": ("Token selection", _selection),
    "explain/efficiency": ("Efficiency", _efficiency),
    "explain/samples": ("Sample rollouts", _samples),
}
