"""Do both models end a response with the same tokens? And does each see the other's end coming?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.models.causal import CausalModel
from headstart.models.lora import unwrap
from headstart.models.vocabulary import end_of_turn, stop_ids
from headstart.records import Rollout

CHECK = "stop tokens"
SMALL = 0.1
"""A probability below this, where the other model has just stopped, is no accident of a single response."""
MERGE = "their probabilities are summed into one class before the divergence, and sampling ends on any of them"


def declared(tokenizer: Any, generation_config: Any) -> dict[str, list[int]]:
    """Where a model's stop ids come from: its generation config, its tokenizer, its chat template."""
    eos = getattr(generation_config, "eos_token_id", None)
    named = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    sources = {
        "generation_config": named,
        "tokenizer": [tokenizer.eos_token_id],
        "chat_template": [end_of_turn(tokenizer)],
    }
    return {source: [i for i in ids if i is not None] for source, ids in sources.items()}


def stops(pair: Pair, student: Sequence[Rollout] = (), teacher: Sequence[Rollout] = ()) -> Finding:
    """Stop ids of both models and what Headstart does about a difference.

    With responses of both (spoken from their own views) also the probability each model gives to the other's stop ids
    where the other stopped. A warning when that is small and the ids are not merged into one class.
    """
    ids = {who: _ids(pair, who) for who in ("student", "teacher")}
    sources = {f"{who}_from": _sources(pair, who) for who in ids}
    merged = bool(pair.vocabulary.merge_ids)
    figures: dict[str, Any] = {**{f"{who}_ids": sorted(i) for who, i in ids.items()}, **sources, "merged": merged}
    if student or teacher:
        figures |= _probabilities(pair, "student", student, ids["student"])
        figures |= _probabilities(pair, "teacher", teacher, ids["teacher"])
    seen = [figures.get("teacher_gives_student_stop"), figures.get("student_gives_teacher_stop")]
    measured = _told(figures) if student or teacher else ""
    if ids["student"] == ids["teacher"]:
        return Finding(CHECK, "ok", f"both models stop at {_shown(pair, ids['student'])}{measured}", None, figures)
    text = f"the student stops at {_shown(pair, ids['student'])}, the teacher at {_shown(pair, ids['teacher'])}"
    if merged:
        return Finding(CHECK, "note", f"{text}: {MERGE}{measured}", None, figures)
    small = any(p is not None and p < SMALL for p in seen)
    return Finding(
        CHECK,
        "warning" if small else "note",
        f"{text}, but both declare the same ones, so they are not merged: where the student stops, the teacher may "
        f"expect another token{measured}",
        "let generation_config.json of each model name the ids it was trained to stop with (eos_token_id); where these "
        "differ, Headstart merges them"
        if small
        else None,
        figures,
    )


def _ids(pair: Pair, who: str) -> frozenset[int]:
    model, tokenizer = _side(pair, who)
    return stop_ids(tokenizer, unwrap(model.model).generation_config, pair.vocabulary.size)


def _sources(pair: Pair, who: str) -> dict[str, list[int]]:
    model, tokenizer = _side(pair, who)
    return declared(tokenizer, unwrap(model.model).generation_config)


def _side(pair: Pair, who: str) -> tuple[CausalModel, Any]:
    return (pair.student, pair.tokenizer) if who == "student" else (pair.teacher, pair.teacher_tokenizer)


def _probabilities(pair: Pair, who: str, rollouts: Sequence[Rollout], own: frozenset[int]) -> dict[str, Any]:
    """Means over responses of `who` that ended by its own stop ids, at the position before the stop."""
    ended = [r for r in rollouts if r.stopped and r.completion_ids[-1] in own]
    figures: dict[str, Any] = {f"{who}_responses": len(rollouts), f"{who}_stopped": len(ended)}
    if ended:
        other = "teacher" if who == "student" else "student"
        figures[f"{other}_gives_{who}_stop"] = float(_mass(pair, other, ended, own).mean())
        figures[f"{who}_gives_own_stop"] = float(_mass(pair, who, ended, own).mean())
    return figures


def _mass(pair: Pair, reader: str, rollouts: Sequence[Rollout], ids: frozenset[int]) -> Tensor:
    """Probability that `reader`, from its own view of the prompts, gives to `ids` in place of each last token."""
    model, _ = _side(pair, reader)
    found = []
    for rollout in rollouts:  # one at a time: full responses are long, and only one position is read
        batch = model.batch([rollout], "teacher" if reader == "teacher" else "student")
        with model.sampling_mode():
            logits_1V = model.head(model.completion_hidden(batch)[-1:])
        found.append(logits_1V.float().softmax(-1)[0, sorted(ids)].sum())
    return torch.stack(found)


def _told(figures: dict[str, Any]) -> str:
    parts = []
    for who, other in (("student", "teacher"), ("teacher", "student")):
        stopped, responses = figures[f"{who}_stopped"], figures[f"{who}_responses"]
        if stopped:
            given = f"the {other} gives it {figures[f'{other}_gives_{who}_stop']:.0%}"
            parts.append(f"where the {who} stopped ({stopped} of {responses} responses), {given}")
        else:
            parts.append(f"none of {responses} {who} responses stopped within the length tried")
    return "; " + "; ".join(parts)


def _shown(pair: Pair, ids: frozenset[int]) -> str:
    return ", ".join(f"{i} ({pair.tokenizer.convert_ids_to_tokens(i)!r})" for i in sorted(ids)) or "no token"
