"""What the files of `diagnose/` and `explain/` say: one section for each, left out where its file is absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from headstart.reports.wording import NOTHING, accuracy, decay_reading, estimate, share

SHADES = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Nats from which a token is shaded, and shaded darker."""
WORST = 3
"""Most divergent tokens of a rollout that are named in words."""


def reading_sections(runs: Sequence[tuple[str, Run]]) -> Iterator[Section]:
    """The readings of all folders, kind by kind. A file whose content is not what it should be gives one line."""
    for name, (title, build) in BUILDERS.items():
        having = [(of, run) for of, run in runs if name in run.readings]
        for place, (of, run) in enumerate(having):
            try:
                blocks = list(build(run.readings[name], run.readings))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                what = f"{type(error).__name__}: {error}"
                blocks = [Text(f"{run.path.name}/{name}.json cannot be shown ({what}); write it anew.", "warning")]
            if place:  # figures of several runs need names of their own
                blocks = [replace(b, name=f"{b.name}-{place}") if isinstance(b, Picture) else b for b in blocks]
            yield Section(f"{title} ({of})" if len(runs) > 1 else title, blocks)


def reading_blocks(name: str, readings: Mapping[str, Record]) -> list[Block]:
    """The blocks of one reading, such as `explain/swap`, for a terminal."""
    return list(BUILDERS[name][1](readings[name], readings))


def _preflight(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    findings = record["findings"]
    for finding in findings:
        if finding["severity"] in ("warning", "blocking"):
            remedy = f" {finding['remedy']}" if finding.get("remedy") else ""
            yield Text(
                f"{finding['severity'].capitalize()}, {finding['check']}: {finding['message']}.{remedy}", "warning"
            )
    calm = [[f["check"], f["severity"], f["message"]] for f in findings if f["severity"] in ("ok", "note")]
    if calm:
        yield Fold(f"{len(calm)} checks without a complaint", [Table(("check", "", "finding"), calm, prose=True)])


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
    told = ", ".join(f"{share(p['after_student'])} at {p['prefix_tokens']}" for p in points)
    yield Picture(
        "decay",
        to_svg(decay_figure(record, window)),
        f"Accuracy of continuations against prefix length. The teacher is right after the student's prefix on {told}.",
        f"One model begins, is cut after so many tokens, and one of the two finishes; {record['prompts']} problems. "
        "The axis is logarithmic beyond 4. Bands are 95% intervals"
        + ("; grey: the recommended range." if window else "."),
    )
    reading = decay_reading(record)
    if reading:
        yield Text(reading)
    columns = {
        "after_student": "R",
        "after_clean": "R clean",
        "after_wrong": "R wrong",
        "after_finished": "R finished",
        "after_own": "T own",
        "gift": "G",
        "student_continues": "S own",
    }
    shown = {key: name for key, name in columns.items() if any(key in p for p in points)}
    rows = [
        [str(p["prefix_tokens"]), *(_rate(p.get(key)) for key in shown), estimate(p.get("damage"), ".2f")]
        for p in points
    ]
    kind = "" if record.get("labelled", True) else ", agreement with the teacher's majority"
    legend = (
        "N: length of the prefix. R: the teacher finishes the student's prefix (clean so far, already wrong, already "
        "finished). G: the student finishes the teacher's. T own, S own: each finishes its own. D: damage share."
    )
    table = Table(("N", *shown.values(), "D"), rows)
    yield Fold(f"{record['task']}, {record['prompts']} problems: right answers{kind}", [table, Text(legend, "soft")])


def _rate(value: Record | None) -> str:
    """A share with its interval, `49% [39, 59]`."""
    if not value or not value["n"]:
        return NOTHING
    return f"{value['successes'] / value['n']:.0%} [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"


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
    yield Text(f"Of all divergence lie {cover}.")
    yield Picture("positions", to_svg(positions_figure(record)), alt, caption)
    rows = [
        [
            f"{row['first']}-{row['last']}",
            f"{row['divergence']['mean']:.3f}",
            NOTHING if row["divergence_share"] is None else f"{row['divergence_share']:.0%}",
            *(f"{row[name]['mean']:.2f}" for name in ("student_entropy", "teacher_entropy", "teacher_top")),
            *(f"{row[name]['mean']:.0%}" for name in ("agree", "overlap")),
        ]
        for row in record["bins"]
    ]
    header = ("tokens", "nats", "share so far", "entropy S", "entropy T", "teacher's top", "same top", "common top 16")
    yield Fold(f"{record['rollouts']} full rollouts of the student, by position", [Table(header, rows)])


def _pilot(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    steps = sorted({rung["steps"] for arm in record["arms"] for rung in arm["rungs"]})
    rows = []
    for arm in record["arms"]:
        at = {rung["steps"]: rung for rung in arm["rungs"]}
        cells = [accuracy(at[s]) if s in at else NOTHING for s in steps]
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
    rows = [
        [
            mode["mode"],
            *(estimate(mode[key], ".0%") for key in ("share_before", "share_after")),
            *(estimate(mode["levels"].get(key), ".2g") for key in ("before", "after", "fixed")),
        ]
        for mode in record["modes"]
    ]
    header = ("kind of rollout", "share before", "share after", "nats before", "nats after", "after, on old rollouts")
    yield Table(header, rows)
    parts = ", ".join(f"{name} {estimate(record['parts'][name], '+.4f')}" for name in ("change", "mixture", "within"))
    yield Text(f"Nats per token: {parts}.")
    yield Text(
        f"Kinds are told apart by {record['modes_by']}; nats per token on positions from {record['first']} on.", "soft"
    )


def _commitment(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    speakers = {MODELS.get(name, name): s for name, s in record["speakers"].items()}
    median = ", ".join(f"{name} {estimate(s['lengths']['p50'], '.0f')}" for name, s in speakers.items())
    alt = f"Distribution of response lengths. Medians in tokens: {median}."
    yield Picture("lengths", to_svg(lengths_figure(record["speakers"])), alt, "Responses by length in tokens.")
    rows: list[tuple[str, Callable[[Record], str]]] = [
        ("length p10, tokens", lambda s: estimate(s["lengths"]["p10"], ".0f")),
        ("median length", lambda s: estimate(s["lengths"]["p50"], ".0f")),
        ("length p90", lambda s: estimate(s["lengths"]["p90"], ".0f")),
        ("stopped by itself", lambda s: estimate(s["lengths"]["stopped"], ".0%")),
        ("positions with another favourite", lambda s: estimate(s["choices"]["divergent"])),
        ("… token is the teacher's favourite", lambda s: estimate(s["choices"]["ranks"]["1"], ".0%")),
        ("… token is the teacher's 2nd to 5th", lambda s: estimate(s["choices"]["ranks"]["2-5"], ".0%")),
        ("own favourite's probability", lambda s: estimate(s["choices"]["own_top"], ".3f")),
        ("different openings per sample", lambda s: estimate(s["openings"]["distinct"], ".2f")),
        ("samples on an opening of the teacher", lambda s: estimate(s["openings"]["on_teacher"], ".2f")),
    ]
    yield Table(("reading", *speakers), [[name, *(cell(s) for s in speakers.values())] for name, cell in rows])
    yield Text(
        "“…” is over positions where student and teacher favour different tokens; for the teacher, over all.", "soft"
    )


def _swap(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    cells = {(cell["prefix"], cell["tail"]): cell for cell in record["cells"]}
    voices = [v for v in MODELS if any(v in pair for pair in cells)]

    rows = [
        [MODELS[prefix], *(_rate(cells.get((prefix, tail), {}).get("accuracy")) for tail in voices)]
        for prefix in voices
    ]
    header = (f"first {record['prefix_tokens']} tokens from", *(f"rest from {MODELS[v]}" for v in voices))
    yield Table(header, rows)
    yield Text(f"Accuracy over {record['problems']} problems, one response each, 95% intervals.", "soft")


def _selection(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    arms = record.get("arms") or []
    if arms:
        dots: list[tuple[str, Record | None]] = [(arm["rule"], arm["accuracy"]) for arm in arms]
        xlabel = "accuracy after training"
    else:
        dots = [(rule, p["divergence_share"]) for rule, p in record["picked"].items() if rule != "all"]
        xlabel = f"share of all divergence on the {record['tokens']} tokens picked"
    told = ", ".join(f"{rule} {estimate(value, '.0%')}" for rule, value in dots)
    caption = f"{record['tokens']} tokens of each of {record['rollouts']} full rollouts, by the rule that picks them."
    yield Picture("selection", to_svg(dots_figure(dots, xlabel)), f"{xlabel.capitalize()}, by rule: {told}.", caption)
    if arms:
        rows = [
            [
                a["rule"],
                estimate(a["accuracy"]),
                estimate(a.get("against_first")),
                f"{a['generated_tokens']:,}",
                f"{a['seconds']:.1f}",
            ]
            for a in arms
        ]
        yield Table(("rule", "accuracy", "against first", "generated tokens", "seconds"), rows)
    rows = [
        [rule, _number(p["mean_position"]), estimate(p["divergence_share"], ".0%")]
        for rule, p in record["picked"].items()
    ]
    classes = [
        [name, estimate(c["tokens"], ".0%"), _number(c["divergence"]), estimate(c["divergence_share"], ".0%")]
        for name, c in record.get("classes", {}).items()
    ]
    tables = [Table(("rule", "mean position", "share of all divergence"), rows)]
    tables += (
        [Table(("class of token", "share", "nats per token", "share of all divergence"), classes)] if classes else []
    )
    yield Fold("What each rule picks", tables)


def _efficiency(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(record["sentence"], "outcome")
    runs = [(name, cost) for name, cost in (("this run", record["run"]), ("twin", record.get("twin"))) if cost]
    told = "; ".join(f"{name}: {estimate(cost['seconds_per_step'], '.3f')} s a step" for name, cost in runs)
    caption = "Seconds of a step by phase, evaluations not counted; both in the same engine."
    yield Picture("efficiency", to_svg(phases_figure(runs)), f"Seconds of a step by phase. {told}.", caption)
    rows = [
        ["seconds a step", *(estimate(cost["seconds_per_step"], ".3f") for _, cost in runs)],
        ["tokens a step", *(estimate(cost["tokens_per_step"], ".0f") for _, cost in runs)],
        ["steps", *(str(cost["steps"]) for _, cost in runs)],
        ["seconds", *(f"{cost['seconds']:.1f}" for _, cost in runs)],
        ["generated tokens", *(f"{cost['generated_tokens']:,}" for _, cost in runs)],
        ["peak GiB", *(_number(cost["peak_memory_gib"]) for _, cost in runs)],
    ]
    yield Table(("training only", *(name for name, _ in runs)), rows)


def _samples(record: Record, _: Mapping[str, Record]) -> Iterator[Block]:
    yield Text(
        "The first problems, before and after training. The stronger a token's colour, the more the student diverges "
        "from the teacher there; point at it, or tap it, to see what the teacher would rather have said.",
    )
    for before, after in zip(record["before"], record["after"], strict=True):
        prompt = f"Prompt: {before['prompt']}" if before.get("prompt") else f"Problem {before['problem_id']}"
        yield Text(prompt, "soft")
        yield _tokens("before", before)
        yield _tokens("after", after)


def _tokens(when: str, sample: Record) -> Tokens:
    told = [
        _told(nats, rank, alternatives)
        for nats, rank, alternatives in zip(sample["divergence"], sample["rank"], sample["alternatives"], strict=True)
    ]
    tokens = [
        Token(text, sum(nats >= bound for bound in SHADES), said)
        for text, nats, said in zip(sample["tokens"], sample["divergence"], told, strict=True)
    ]
    order = sorted(range(len(tokens)), key=lambda place: -sample["divergence"][place])
    worst = sorted(place for place in order[:WORST] if tokens[place].shade)
    notes = [f"token {place + 1}, “{tokens[place].text.strip()}”: {told[place]}" for place in worst]
    correct = sample.get("correct")
    graded = "" if correct is None else ", right" if correct else ", wrong"
    mean = sum(sample["divergence"]) / max(len(tokens), 1)
    ending = "" if sample.get("stopped", True) else ", cut off"
    title = f"{sample['problem_id']}, {when}{graded}{ending}: {len(tokens)} tokens, {mean:.3f} nats per token"
    return Tokens(title, tokens, notes)


def _told(nats: float, rank: int, alternatives: Sequence[Sequence[Any]]) -> str:
    rather = ", ".join(
        f"“{text.strip() or text}” {probability:.1%}" for text, probability in alternatives if probability >= 0.001
    )
    return f"{nats:.2f} nats, the teacher's no. {rank}; it would say {rather}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


Builder = Callable[[Record, Mapping[str, Record]], Iterator[Block]]
BUILDERS: dict[str, tuple[str, Builder]] = {
    "diagnose/preflight": ("Preflight: does the pair fit together?", _preflight),
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
