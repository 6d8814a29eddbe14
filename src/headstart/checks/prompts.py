"""Are the prompts what they should be: each once, none lost, none of the test? And is the teacher shown them well?"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding, Severity
from headstart.config.schema import ReverseKL
from headstart.losses.chunked import default_chunk, read_divergence
from headstart.models.templates import View, chat_template
from headstart.records import Problem, Prompt, Rollout
from headstart.tasks.overlap import Overlap
from headstart.teacher.local import LocalTeacher

MANY = 0.05
"""A share from which duplicates or dropped prompts are no accident of a source but change what is trained."""
LARGE = 0.05
"""Nats per token. A renderer that differed cost 0.287 elsewhere (tinker-cookbook, thread 796); a distilled student ends
some hundredths away from its teacher, so a view that shifts the teacher by more than that is no detail."""
THINKING = "enable_thinking"

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ViewReading:
    """The teacher in one view of the prompts: its KL (nats per token) from the teacher in the view of the run, and how
    much likelier the completions are to it (nats per token; positive: this view fits the student better)."""

    divergence: float
    gain: float


def duplicates(prompts: Sequence[Prompt]) -> Finding:
    """Prompts that the student reads as the same ids as an earlier one."""
    extra = len(prompts) - len({(p.token_ids, p.images) for p in prompts})
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
    texts = [problem.text or "", *(turn["content"] for turn in turns), problem.meta.get("context") or ""]
    return "\n".join([*texts, json.dumps(structured, ensure_ascii=False, default=str)])


def evaluation_overlap(found: Overlap, task: str) -> Finding:
    """Test problems among the training prompts."""
    figures: dict[str, Any] = {**found.counts, "test": found.test, "train": found.train}
    figures["examples"] = [asdict(match) for match in found.examples]
    text = found.warning(task)
    if text is None:
        return Finding("test overlap", "ok", f"no problem of {task} is among the training prompts", None, figures)
    remedy = "remove these prompts, or choose another test" if found.copies else None
    return Finding("test overlap", "warning" if found.copies else "note", text, remedy, figures)


def _severity(share: float) -> Severity:
    return "warning" if share >= MANY else "note"


def views(pair: Pair, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> Finding:
    """One finding for all views of the teacher's prompt.

    A view that shifts the teacher by more than LARGE is a note where it fits the student's completions no better than
    the run's own. It is a warning where it fits them better by more than LARGE, or where it is the other thinking mode
    and the configuration does not say which is meant.
    """

    def finding(severity: Severity, message: str, remedy: str | None = None) -> Finding:
        return Finding("chat template", severity, message, remedy, figures)

    readings = {name: read_view(pair, rollouts, ids) for name, ids in other_views(pair, problems, rollouts).items()}
    figures: dict[str, Any] = {
        "views": {name: {"nats_per_token": view.divergence, "gain": view.gain} for name, view in readings.items()}
    }
    if any(rollout.prompt.teacher_images for rollout in rollouts):
        return finding("ok", "prompts show images, of which no other view is tried")
    if not readings:
        same = "student and teacher are shown the same ids"
        if pair.vocabulary.aligner is not None:
            same = "each model is shown the problems by its own template"
        return finding("ok", f"{same}, and there is no thinking mode to choose")
    figures |= {"tokens": sum(len(r.completion_ids) for r in rollouts), "threshold": LARGE}
    shifts = ", ".join(f"{view.divergence:.3f} ({name} view)" for name, view in readings.items())
    text = f"the teacher shifts by {shifts} nats per token from the view of this run"
    large = {name: view for name, view in readings.items() if view.divergence > LARGE}
    better = [name for name, view in large.items() if view.gain > LARGE]
    if better:
        name = max(better, key=lambda n: readings[n].gain)
        fits = f"the {name} view fits the student's responses better by {readings[name].gain:.3f}"
        return finding("warning", f"{text}; {fits}", _remedy(name))
    chosen = View.of_teacher(None, pair.config.prompts).template_kwargs
    if THINKING not in chosen and any(name != "student" for name in large):
        unsaid = "the configuration does not say which thinking mode is meant, and it matters"
        return finding("warning", f"{text}; {unsaid}", _remedy("thinking off"))
    return finding("note" if large else "ok", f"{text}; no other fits the responses better")


def other_views(pair: Pair, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> dict[str, list[Ids]]:
    """Name -> prompt ids, one for each rollout, of the views that differ from the run's own teacher view.

    `student`: the student's ids. `thinking on` and `thinking off`, where the teacher's template knows the switch.
    """
    if any(rollout.prompt.teacher_images for rollout in rollouts):
        return {}  # other ids have other places for them
    others: dict[str, list[Ids]] = {"student": [r.prompt.token_ids for r in rollouts]}
    other_ids = any(i >= pair.vocabulary.size for ids in others["student"] for i in ids)
    if pair.vocabulary.aligner is not None or other_ids or pair.config.prompts.teacher_view.context_column:
        others = {}  # ids of the student's own, which the teacher reads as something else; or a view meant to differ
    asked = [problems[r.prompt.index] for r in rollouts]
    switch = pair.config.prompts.chat and THINKING in (chat_template(pair.teacher_tokenizer) or "")
    if switch and all(problem.messages is not None for problem in asked):
        view = View.of_teacher(pair.teacher_tokenizer, pair.config.prompts)
        for name, on in (("thinking on", True), ("thinking off", False)):
            switched = replace(view, template_kwargs={**view.template_kwargs, THINKING: on})
            others[name] = [reading.ids for reading in switched.readings(asked)]
    own = [r.prompt.teacher_token_ids for r in rollouts]
    return {name: ids for name, ids in others.items() if ids != own}


def read_view(pair: Pair, rollouts: Sequence[Rollout], prompts: Sequence[Ids]) -> ViewReading:
    """The teacher with `prompts` in front of the rollouts' completions, against the view of the run."""
    rollouts = pair.scorer().align(rollouts)
    changed = [
        replace(r, prompt=replace(r.prompt, teacher_token_ids=ids)) for r, ids in zip(rollouts, prompts, strict=True)
    ]
    teacher, batch = pair.teacher, pair.teacher.batch(rollouts, "teacher")
    with teacher.sampling_mode():
        own_MD = teacher.completion_hidden(batch)
        value_M, stats = read_divergence(
            ReverseKL(),
            own_MD,
            teacher.trained_head(),
            LocalTeacher(teacher).score(changed),
            batch.tokens_M,
            chunk=default_chunk(pair.teacher.vocabulary),
        )
    return ViewReading(float(value_M.mean()), float((stats.teacher_logprob_M - stats.student_logprob_M).mean()))


def _remedy(view: str) -> str:
    if view == "student":
        return (
            "compare the two chat templates and system prompts; bring them together with prompts.teacher_view "
            "(system, template_kwargs)"
        )
    switch = str(view == "thinking on").lower()
    return f"set prompts.teacher_view.template_kwargs={{{THINKING}: {switch}}} if the responses shall be like that"
