"""Do both models mean the same by an id? What loading refuses becomes a finding here, with its figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.models.causal import CausalModel
from headstart.models.lora import unwrap
from headstart.records import Prompt

CHECK = "vocabulary"
EXAMPLES = 3


def vocabulary(pair: Pair) -> list[Finding]:
    """Sizes of tokenizers and heads, and added tokens that the two models number differently."""
    shared = pair.vocabulary.size
    ids = tokenizer_size(pair.tokenizer), tokenizer_size(pair.teacher_tokenizer)
    heads = _rows(pair.student, "output"), _rows(pair.teacher, "output")
    figures = {
        "shared_ids": shared,
        "student_tokenizer_ids": ids[0],
        "teacher_tokenizer_ids": ids[1],
        "student_head_rows": heads[0],
        "teacher_head_rows": heads[1],
    }
    same = {*ids, *heads} == {shared}
    told = (
        f"both tokenizers and both heads have {shared:,} ids"
        if same
        else f"{shared:,} ids are shared; tokenizers have {ids[0]:,} (student) and {ids[1]:,} (teacher), heads "
        f"{heads[0]:,} and {heads[1]:,} rows: what lies beyond (padding, one model's added tokens) is cut on both sides"
    )
    return [Finding(CHECK, "ok" if same else "note", told, None, figures), *renumbered(pair)]


def renumbered(pair: Pair) -> list[Finding]:
    """Added tokens with one text and two ids. The base ids agree, or the pair would not have loaded."""
    different = same_text_other_id(pair.tokenizer.get_added_vocab(), pair.teacher_tokenizer.get_added_vocab())
    if not different:
        return []
    return [
        Finding(
            CHECK,
            "warning",
            f"{len(different)} added token(s) have other ids in the teacher's tokenizer ({_shown(different)}), "
            f"beyond the {pair.vocabulary.size:,} shared ids: the student can neither sample nor learn them",
            "choose a teacher with the student's special tokens if the responses need these",
            {"different": len(different), "examples": different[:EXAMPLES]},
        )
    ]


def renumbered_everywhere(tokenizer: Any, teacher_tokenizer: Any) -> list[Finding]:
    """Texts with two different ids, for tokenizers that loading refused."""
    different = same_text_other_id(tokenizer.get_vocab(), teacher_tokenizer.get_vocab())
    if not different:
        return []
    figures = {
        "different": len(different),
        "examples": different[:EXAMPLES],
        "student_tokenizer_ids": tokenizer_size(tokenizer),
        "teacher_tokenizer_ids": tokenizer_size(teacher_tokenizer),
    }
    text = (
        f"{len(different):,} tokens have the same text but another id in the teacher's tokenizer "
        f"({_shown(different)}): the teacher would read the student's ids as other text"
    )
    return [Finding(CHECK, "blocking", text, "choose two models of one tokenizer family", figures)]


def prompt_ids(pair: Pair, prompts: Sequence[Prompt]) -> Finding:
    """Ids in the prompts that a model has no embedding for (it would crash), or that the other one lacks."""
    used = {"student": _used(p.token_ids for p in prompts), "teacher": _used(p.teacher_token_ids for p in prompts)}
    rows = {"student": _rows(pair.student, "input"), "teacher": _rows(pair.teacher, "input")}
    lacking = {who: sorted(i for i in used[who] if i >= rows[who]) for who in used}
    own = {who: sorted(i for i in used[who] if pair.vocabulary.size <= i < rows[who]) for who in used}
    figures = {
        f"{who}_{kind}": ids[who][:10] for who in used for kind, ids in (("beyond_embedding", lacking), ("own", own))
    }
    for who, ids in lacking.items():
        if ids:
            return Finding(
                "prompt ids",
                "blocking",
                f"the prompts use {len(ids)} id(s) that the {who} has no embedding for ({ids[0]}; it has "
                f"{rows[who]:,} rows)",
                f"resize the {who}'s embeddings, or change the chat template or the prompts so that they are not used",
                figures,
            )
    if own["student"] or own["teacher"]:
        text = " and ".join(
            f"the {who}'s prompts use {len(ids)} id(s) of its own ({_token(pair, who, ids[0])})"
            for who, ids in own.items()
            if ids
        )
        return Finding("prompt ids", "note", f"{text}: read by that model alone, never produced", None, figures)
    return Finding("prompt ids", "ok", "both models know every id in the prompts", None, figures)


def same_text_other_id(student: dict[str, int], teacher: dict[str, int]) -> list[tuple[str, int, int]]:
    """(text, the student's id, the teacher's id) of texts with different ids, in order of the student's ids."""
    found = [(text, i, teacher[text]) for text, i in student.items() if text in teacher and teacher[text] != i]
    return sorted(found, key=lambda item: item[1])


def tokenizer_size(tokenizer: Any) -> int:
    """One past the largest id. The whole vocabulary is not asked for: that alone takes 0.2 s for 150,000 ids."""
    return int(max([len(tokenizer) - 1, *tokenizer.get_added_vocab().values()])) + 1


def _used(sequences: Iterable[tuple[int, ...]]) -> set[int]:
    return set().union(*sequences)


def _rows(model: CausalModel, side: str) -> int:
    base = unwrap(model.model)
    return int((base.get_output_embeddings() if side == "output" else base.get_input_embeddings()).weight.shape[0])


def _token(pair: Pair, who: str, token: int) -> str:
    tokenizer = pair.tokenizer if who == "student" else pair.teacher_tokenizer
    return f"{token}, {tokenizer.convert_ids_to_tokens(token)!r}"


def _shown(different: Sequence[tuple[str, int, int]]) -> str:
    return "; ".join(f"{text!r}: {ours} / {theirs}" for text, ours, theirs in different[:EXAMPLES])
