"""Do both models mean the same by an id, and end a response with the same ids?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headstart.assemble.pair import Pair, Speaker
from headstart.checks.findings import Finding
from headstart.models.alignment import Aligner
from headstart.models.causal import CausalModel
from headstart.models.lora import unwrap
from headstart.models.vocabulary import end_of_turn, stop_ids
from headstart.records import Prompt, Rollout

EXAMPLES = 3
SMALL = 0.1
"""A probability that a stop hardly gets by accident."""
ENOUGH = 2
"""Responses that ended, below which nothing is concluded: one may have ended where nobody would."""
BOTH: tuple[Speaker, Speaker] = ("student", "teacher")


def vocabulary(pair: Pair) -> list[Finding]:
    """Sizes of tokenizers and heads, and added tokens that the two models number differently."""
    if pair.vocabulary.aligner is not None:
        return [_two_vocabularies(pair, pair.vocabulary.aligner)]
    figures: dict[str, Any] = {
        "shared_ids": pair.vocabulary.size,
        "student_tokenizer_ids": tokenizer_size(pair.tokenizer),
        "teacher_tokenizer_ids": tokenizer_size(pair.teacher_tokenizer),
        "student_head_rows": _rows(pair.student, "output"),
        "teacher_head_rows": _rows(pair.teacher, "output"),
    }
    shared, *ids_and_rows = figures.values()
    if {*ids_and_rows} == {shared}:
        findings = [Finding("vocabulary", "ok", f"both tokenizers and both heads have {shared:,} ids", None, figures)]
    else:
        ids, teacher_ids, rows, teacher_rows = (f"{size:,}" for size in ids_and_rows)
        text = (
            f"{shared:,} ids are shared; tokenizers have {ids} (student) and {teacher_ids} (teacher), heads {rows} and "
            f"{teacher_rows} rows: what lies beyond (padding, one model's added tokens) is cut on both sides"
        )
        findings = [Finding("vocabulary", "note", text, None, figures)]
    # The base ids agree, or the pair would not have loaded.
    different = same_text_other_id(pair.tokenizer.get_added_vocab(), pair.teacher_tokenizer.get_added_vocab())
    if different:
        text = (
            f"{len(different)} added token(s) have other ids in the teacher's tokenizer ({_examples(different)}), "
            f"beyond the {shared:,} shared ids: the student can neither sample nor learn them"
        )
        remedy = "choose a teacher with the student's special tokens if the responses need these"
        figures = {"different": len(different), "examples": different[:EXAMPLES]}
        findings.append(Finding("vocabulary", "warning", text, remedy, figures))
    return findings


def _two_vocabularies(pair: Pair, aligner: Aligner) -> Finding:
    """Two tokenizers: how many of the tokens of each are tokens of the other."""
    theirs, ours = (
        {event for event in side.events if isinstance(event, bytes)} for side in (aligner.teacher, aligner.student)
    )
    both = len(ours & theirs)
    figures = {
        "alignment": aligner.kind,
        "student_tokens": len(ours),
        "teacher_tokens": len(theirs),
        "shared_tokens": both,
        "student_head_rows": _rows(pair.student, "output"),
        "teacher_head_rows": _rows(pair.teacher, "output"),
    }
    text = (
        f"two tokenizers: {both:,} tokens are the same bytes in both, {both / len(ours):.0%} of the student's "
        f"{len(ours):,} and {both / len(theirs):.0%} of the teacher's {len(theirs):,}; rollouts are aligned on their "
        f"bytes and compared by divergence.alignment {aligner.kind}"
    )
    return Finding("vocabulary", "note", text, None, figures)


def prompt_ids(pair: Pair, prompts: Sequence[Prompt]) -> Finding:
    """Ids in the prompts that a model has no embedding for (it would crash), or that the other one lacks."""
    figures: dict[str, Any] = {}
    own: list[str] = []
    lacking: list[tuple[str, str]] = []
    here = BOTH if pair.endpoint is None else BOTH[:1]  # a server refuses ids that it does not know itself
    for who in here:
        model, tokenizer = _side(pair, who)
        used = set().union(*(p.token_ids if who == "student" else p.teacher_token_ids for p in prompts))
        rows = _rows(model, "input")
        beyond = sorted(i for i in used if i >= rows)
        unshared = sorted(i for i in used if model.vocabulary <= i < rows)
        figures |= {f"{who}_beyond_embedding": beyond[:10], f"{who}_own": unshared[:10]}
        if beyond:
            text = f"the prompts use {len(beyond)} id(s) that the {who} has no embedding for ({beyond[0]}; it has "
            remedy = f"resize the {who}'s embeddings, or change the chat template or the prompts so that they are not "
            lacking.append((f"{text}{rows:,} rows)", f"{remedy}used"))
        if unshared:
            token = f"{unshared[0]}, {tokenizer.convert_ids_to_tokens(unshared[0])!r}"
            own.append(f"the {who}'s prompts use {len(unshared)} id(s) of its own ({token})")
    if lacking:
        return Finding("prompt ids", "blocking", *lacking[0], figures)
    if own:
        text = f"{' and '.join(own)}: read by that model alone, never produced"
        return Finding("prompt ids", "note", text, None, figures)
    text = "both models know every id in the prompts" if here == BOTH else "the student knows every id in its prompts"
    return Finding("prompt ids", "ok", text, None, figures)


def same_text_other_id(student: dict[str, int], teacher: dict[str, int]) -> list[tuple[str, int, int]]:
    """(text, the student's id, the teacher's id) of texts with different ids, in order of the student's ids."""
    different = [(text, i, teacher[text]) for text, i in student.items() if text in teacher and teacher[text] != i]
    return sorted(different, key=lambda item: item[1])


def tokenizer_size(tokenizer: Any) -> int:
    """One past the largest id. The whole vocabulary is not asked for: that alone takes 0.2 s for 150,000 ids."""
    return int(max([len(tokenizer) - 1, *tokenizer.get_added_vocab().values()])) + 1


def stops(pair: Pair, student: Sequence[Rollout] = (), teacher: Sequence[Rollout] = ()) -> Finding:
    """Stop ids of both models and what Headstart does about a difference.

    With responses (sampled from their writer's own view) also the probability the other model gives to a stop where
    one stopped. A warning when that is small in `ENOUGH` responses and the ids are not merged into one class.
    """
    own: dict[str, frozenset[int]] = {who: _own_stops(pair, who) for who in BOTH}
    figures: dict[str, Any] = {}
    for who in BOTH:
        model, tokenizer = _side(pair, who)
        sources = declared(tokenizer, unwrap(model.model).generation_config)
        figures |= {f"{who}_ids": sorted(own[who]), f"{who}_from": sources}
    figures["merged"] = bool(pair.vocabulary.merge_ids)
    measured = ""
    for who, responses in zip(BOTH, (student, teacher), strict=True):
        if responses:
            figures |= _after_stops(pair, who, responses, own)
            measured += _measured(figures, who, max(len(r.completion_ids) for r in responses))
    ours, theirs = (_shown(_side(pair, who)[1], own[who]) for who in BOTH)
    if pair.vocabulary.aligner is not None and all(own.values()):
        text = f"the student stops at {ours}, the teacher at {theirs}: one event of the divergence{measured}"
        return Finding("stop tokens", "ok", text, None, figures)
    if ours == theirs:
        return Finding("stop tokens", "ok", f"both models stop at {ours}{measured}", None, figures)
    text = f"the student stops at {ours}, the teacher at {theirs}"
    if figures["merged"]:
        merge = "their probabilities are summed into one class before the divergence, and sampling ends on any of them"
        return Finding("stop tokens", "note", f"{text}: {merge}{measured}", None, figures)
    text += (
        ", but both declare the same ones, so they are not merged: where the student stops, the teacher may expect "
        f"another token{measured}"
    )
    if not any(
        figures.get(f"{who}_stopped", 0) >= ENOUGH and figures[f"{other}_gives_{who}_stop"] < SMALL
        for who, other in (BOTH, BOTH[::-1])
    ):
        return Finding("stop tokens", "note", text, None, figures)
    remedy = (
        "let generation_config.json of each model name the ids it was trained to stop with (eos_token_id); where these "
        "differ, Headstart merges them"
    )
    return Finding("stop tokens", "warning", text, remedy, figures)


def stop_apart(pair: Pair) -> bool:
    """Whether the two stop at ids that differ and are not one class, so that it matters how the teacher's responses
    end."""
    one_class = pair.vocabulary.aligner is not None or bool(pair.vocabulary.merge_ids)
    return not one_class and _own_stops(pair, "student") != _own_stops(pair, "teacher")


def _own_stops(pair: Pair, who: Speaker) -> frozenset[int]:
    model, tokenizer = _side(pair, who)
    return stop_ids(tokenizer, unwrap(model.model).generation_config, model.vocabulary)


def declared(tokenizer: Any, generation_config: Any) -> dict[str, list[int]]:
    """Where a model's stop ids come from: its generation config, its tokenizer, its chat template."""
    eos = getattr(generation_config, "eos_token_id", None)
    sources = {
        "generation_config": list(eos) if isinstance(eos, list | tuple) else [eos],
        "tokenizer": [tokenizer.eos_token_id],
        "chat_template": [end_of_turn(tokenizer)],
    }
    return {source: [i for i in ids if i is not None] for source, ids in sources.items()}


def _after_stops(
    pair: Pair, who: Speaker, rollouts: Sequence[Rollout], own: Mapping[str, frozenset[int]]
) -> dict[str, Any]:
    """Means over responses of `who` that ended by its own stop ids, at the position before the stop. With two
    tokenizers each model's own stop ids stand for the other's."""
    aligned = pair.vocabulary.aligner is not None
    ended = [r for r in pair.scorer().align(rollouts) if r.stopped and (aligned or r.completion_ids[-1] in own[who])]
    ended = [r for r in ended if r.rows and r.rows[-1] == len(r.completion_ids) - 1]
    figures: dict[str, Any] = {f"{who}_responses": len(rollouts), f"{who}_stopped": len(ended)}
    if ended:
        other: Speaker = "teacher" if who == "student" else "student"
        figures[f"{other}_gives_{who}_stop"] = _mass(pair, other, ended, own[other if aligned else who])
        figures[f"{who}_gives_own_stop"] = _mass(pair, who, ended, own[who])
    return figures


def _mass(pair: Pair, reader: Speaker, rollouts: Sequence[Rollout], ids: frozenset[int]) -> float:
    """Mean probability that `reader`, from its own view of the prompts, gives to `ids` in place of each last token."""
    model, _ = _side(pair, reader)
    masses: list[Tensor] = []
    for rollout in rollouts:  # one at a time: full responses are long, and only one position is read
        with model.sampling_mode():
            logits_1V = model.head(model.completion_hidden(model.batch([rollout], reader))[-1:])
        masses.append(logits_1V.float().softmax(-1)[0, sorted(ids)].sum())
    return float(torch.stack(masses).mean())


def _measured(figures: dict[str, Any], who: Speaker, tokens: int) -> str:
    """What responses of `who` say, the longest of which has `tokens` tokens, and whether they are enough for it."""
    stopped, responses = figures[f"{who}_stopped"], figures[f"{who}_responses"]
    text = f"; of {responses} responses of the {who} of at most {tokens} tokens {stopped} ended"
    if not stopped:
        return f"{text}, so how the other model sees it stop is not known"
    other = "teacher" if who == "student" else "student"
    text += f", and the {other} gives the stop {figures[f'{other}_gives_{who}_stop']:.0%}"
    return text if stopped >= ENOUGH else f"{text} (too few to judge by)"


def _side(pair: Pair, who: Speaker) -> tuple[CausalModel, Any]:
    return (pair.student, pair.tokenizer) if who == "student" else (pair.teacher, pair.teacher_tokenizer)


def _shown(tokenizer: Any, ids: frozenset[int]) -> str:
    return ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in sorted(ids)) or "no token"


def _rows(model: CausalModel, side: str) -> int:
    base = unwrap(model.model)
    return int((base.get_output_embeddings() if side == "output" else base.get_input_embeddings()).weight.shape[0])


def _examples(different: Sequence[tuple[str, int, int]]) -> str:
    return "; ".join(f"{text!r}: {ours} / {theirs}" for text, ours, theirs in different[:EXAMPLES])
