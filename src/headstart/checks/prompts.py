"""Are the prompts what they should be: each once, none lost, none of the test?"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from headstart.checks.findings import Finding, Severity
from headstart.records import Problem, Prompt
from headstart.tasks.overlap import Overlap

MANY = 0.05
"""A share from which duplicates or dropped prompts are no accident of a source but change what is trained."""


def duplicates(prompts: Sequence[Prompt]) -> Finding:
    """Prompts that the student reads as the same ids as an earlier one."""
    extra = len(prompts) - len({p.token_ids for p in prompts})
    figures = {"prompts": len(prompts), "duplicates": extra}
    if not extra:
        return Finding("duplicate prompts", "ok", f"{len(prompts):,} prompts, each once", None, figures)
    text = f"{extra:,} of {len(prompts):,} prompts repeat another one: they weigh more in training"
    remedy = "remove the repeated rows from prompts.source"
    return Finding("duplicate prompts", _severity(extra / len(prompts)), text, remedy, figures)


def overlong(prompts: Sequence[Prompt], dropped: int, max_tokens: int) -> Finding:
    """Prompts left out because they are longer than `prompts.max_tokens`."""
    longest, total = max(len(p.token_ids) for p in prompts), len(prompts) + dropped
    figures = {"dropped": dropped, "longest": longest, "max_tokens": max_tokens}
    if not dropped:
        text = f"no prompt is longer than prompts.max_tokens = {max_tokens:,} (the longest has {longest:,} tokens)"
        return Finding("prompt length", "ok", text, None, figures)
    text = f"{dropped:,} of {total:,} prompts are longer than prompts.max_tokens = {max_tokens:,} and are dropped"
    remedy = "raise prompts.max_tokens, unless long questions shall not be trained"
    return Finding("prompt length", _severity(dropped / total), text, remedy, figures)


def special_tokens(tokenizers: Sequence[Any], problems: Sequence[Problem], prompts: Sequence[Prompt]) -> list[Finding]:
    """Special tokens that stand in the rows themselves and are read as such; those of a template do not count.

    `tokenizers` are the student's and the teacher's. No finding where there are none, a note for plain prompts
    (`prompts.chat=false`), which may be rendered on purpose.
    """
    used = {prompt.index for prompt in prompts}
    texts = {index: _own_text(problem) for index, problem in enumerate(problems) if index in used}
    held = {who: _special(reader, texts) for who, reader in zip(("student", "teacher"), tokenizers, strict=True)}
    rows = sorted({index for found in held.values() for index in found})
    if not rows:
        return []
    counts = {who: dict(Counter(t for tokens in found.values() for t in tokens)) for who, found in held.items()}
    every = counts["teacher"] | counts["student"]
    shown = ", ".join(f"{token!r} in {every[token]:,}" for token in sorted(every, key=every.__getitem__)[:-6:-1])
    first = problems[rows[0]]
    text = (
        f"{len(rows):,} of {len(prompts):,} prompts hold special tokens in their own text ({shown}), which are read as "
        f"the ends and roles they stand for; the first is row {rows[0] + 1} ({first.id})"
    )
    figures = {"prompts": len(prompts), "held": len(rows), "row": rows[0] + 1, **counts}
    if first.messages is None:
        return [Finding("special tokens", "note", text, None, figures)]
    remedy = "remove these rows from prompts.source, or write the tokens in another way (with a space inside)"
    return [Finding("special tokens", "warning", text, remedy, figures)]


def _special(tokenizer: Any, texts: Mapping[int, str]) -> dict[int, set[str]]:
    """Index -> special tokens of `tokenizer` in that text; texts without are left out."""
    ids = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    anywhere = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or r"(?!)")
    found = {}
    for index, text in texts.items():
        if written := set(anywhere.findall(text)):
            read = set(tokenizer(text, add_special_tokens=False)["input_ids"])
            found[index] = {token for token in written if ids[token] in read}
    return {index: tokens for index, tokens in found.items() if tokens}


def _own_text(problem: Problem) -> str:
    turns = problem.messages or ()
    structured = [problem.meta.get("tools"), *(turn.get("tool_calls") for turn in turns)]
    texts = [problem.text or "", *(turn["content"] for turn in turns)]
    return "\n".join([*texts, json.dumps(structured, ensure_ascii=False, default=str)])


def evaluation_overlap(found: Overlap, task: str) -> Finding:
    """Test problems among the training prompts."""
    figures = {"exact": len(found.exact), "near": len(found.near), "test": found.test, "train": found.train}
    text = found.warning(task)
    if text is None:
        return Finding("test overlap", "ok", f"no problem of {task} is among the training prompts", None, figures)
    remedy = "remove these prompts, or choose another test" if found.exact else None
    return Finding("test overlap", "warning" if found.exact else "note", text, remedy, figures)


def _severity(share: float) -> Severity:
    return "warning" if share >= MANY else "note"
