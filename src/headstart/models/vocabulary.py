"""The vocabulary two models share, and where a completion ends.

Both heads are cut to the ids `[0, size)` that mean the same in both tokenizers: rows beyond are padding (Qwen2.5 has
151,936 or 152,064 rows for 151,665 ids) or added tokens of one model only. Stop tokens are found by their role, not by
their id, because base and instruction-tuned models end a turn differently (151643 and 151645 in the same family).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from headstart.config.schema import Alignment
from headstart.errors import VocabularyError
from headstart.losses.events import Events
from headstart.models.alignment import Aligner, Side
from headstart.models.templates import PROBE, apply_template, chat_template
from headstart.models.token_bytes import TokenBytes

DEFAULT: Alignment = "coarse"
"""How a pair with two tokenizers is compared unless the configuration says otherwise."""


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """What both models agree on.

    With one tokenizer: ids `[0, size)` have one meaning, and both heads are cut to them. `stop_ids`: either model's
    stop ids below `size`, sorted; sampling ends on any of them. `merge_ids`: the stop class, whose probability is
    summed on both sides before the divergence; empty when the stop ids that the two models declare agree, and then the
    divergence is the plain exact one.
    With two tokenizers `size` and `stop_ids` are the student's own, and `aligner` holds the teacher's.
    With several teachers it is what all of them share, and `widest` counts the ids of the largest head.
    """

    size: int
    stop_ids: tuple[int, ...]
    merge_ids: tuple[int, ...] = ()
    aligner: Aligner | None = None
    widest: int = 0

    @property
    def teacher_size(self) -> int:
        """Ids of the teacher's head after the cut."""
        return self.size if self.aligner is None else self.aligner.teacher.size

    @property
    def teacher_stop_ids(self) -> tuple[int, ...]:
        return self.stop_ids if self.aligner is None else self.aligner.teacher.stop_ids

    @property
    def largest(self) -> int:
        """Ids of the larger head."""
        return max(self.size, self.teacher_size, self.widest)

    def events(self, who: Literal["student", "teacher"]) -> Events | None:
        """What a model's ids are joined to before the two are compared; None where nothing is joined."""
        if self.aligner is None:
            return Events.of_stops(self.merge_ids, self.size)
        return self.aligner.events[who == "teacher"]


def shared_vocabulary(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    student_generation_config: Any,
    teacher_generation_config: Any,
    student_head_rows: int,
    teacher_head_rows: int,
    alignment: Alignment | None = None,
) -> SharedVocabulary:
    """What a pair shares: ids, where its tokenizers differ at most in added tokens at the end, else byte strings.

    `alignment` compares byte strings even where the ids are the same. Raises VocabularyError when a tokenizer's tokens
    have no exact bytes, when a head has fewer rows than its tokenizer's base vocabulary, or when the cut leaves the
    student without a stop token.
    """
    student, teacher = _Ids.of(student_tokenizer), _Ids.of(teacher_tokenizer)
    size = _common_prefix(student, teacher)
    if size is None or alignment is not None:
        sides = []
        for who, ids, tokenizer, generation_config, rows in (
            ("student", student, student_tokenizer, student_generation_config, student_head_rows),
            ("teacher", teacher, teacher_tokenizer, teacher_generation_config, teacher_head_rows),
        ):
            cut = _cut_to_head(who, ids, rows, ids.end)
            stops = _stops_inside(who, tokenizer, generation_config, cut)
            sides.append(Side(TokenBytes.of(tokenizer), tuple(sorted(stops)), cut))
        aligner = Aligner(sides[0], sides[1], alignment or DEFAULT)
        return SharedVocabulary(sides[0].size, sides[0].stop_ids, aligner=aligner)
    for who, ids, rows in (("student", student, student_head_rows), ("teacher", teacher, teacher_head_rows)):
        size = _cut_to_head(who, ids, rows, size)
    student_stops = _stops_inside("student", student_tokenizer, student_generation_config, size)
    teacher_stops = _stops_inside("teacher", teacher_tokenizer, teacher_generation_config, size)
    union = tuple(sorted(student_stops | teacher_stops))
    # What a model *declares* tells what it was trained to stop with. A base model inherits its family's chat template,
    # so by the template it would agree with an instruction-tuned teacher that in truth stops differently.
    differ = _declared(student_tokenizer, student_generation_config) != _declared(
        teacher_tokenizer, teacher_generation_config
    )
    # A class of one token is that token: there is nothing to sum.
    return SharedVocabulary(size, union, union if differ and len(union) > 1 else ())


def stop_ids(tokenizer: Any, generation_config: Any, vocabulary_limit: int) -> frozenset[int]:
    """Ids below `vocabulary_limit` that end a completion, by role.

    The generation config's EOS (one or several), the tokenizer's EOS, and the token with which the chat template ends
    an assistant turn. Padding and BOS are no stop tokens unless they have such a role too.
    """
    ids = _declared(tokenizer, generation_config) | {end_of_turn(tokenizer)}
    return frozenset(i for i in ids if i is not None and 0 <= i < vocabulary_limit)


def _declared(tokenizer: Any, generation_config: Any) -> set[int]:
    """The stop ids that generation config and tokenizer name."""
    eos = getattr(generation_config, "eos_token_id", None)
    ids = {*(eos if isinstance(eos, list | tuple) else [eos]), tokenizer.eos_token_id}
    return {int(i) for i in ids if i is not None}


def end_of_turn(tokenizer: Any) -> int | None:
    """The special or added token right after an assistant turn's content in the chat template, if there is one.

    It must be the same whether or not the conversation ends there, and the template must show the answer as it is,
    after the question: what follows something else ends something else.
    """
    if chat_template(tokenizer) is None:
        return None
    asked, answered = {"role": "user", "content": f"{PROBE}Q"}, {"role": "assistant", "content": f"{PROBE}A"}
    turns = [asked, answered, {"role": "user", "content": "x"}]
    firsts = []
    for text in apply_template(tokenizer, [(turns[:2], None), (turns, None)], add_generation_prompt=False):
        before, shown, after = str(text).rpartition(f"{PROBE}A")
        if shown and f"{PROBE}Q" in before and f"{PROBE}Q" not in after:
            firsts.append(tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][:1])
        elif not firsts:
            return None
    named = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    first = firsts[0] if all(ids == firsts[0] for ids in firsts) else []
    return first[0] if first and first[0] in named else None


@dataclass(frozen=True, slots=True)
class _Ids:
    """A tokenizer as id -> token. `base` is one past the last id that is not an added token."""

    tokens: Mapping[int, str]
    base: int

    @classmethod
    def of(cls, tokenizer: Any) -> _Ids:
        vocab = tokenizer.get_vocab()
        added = tokenizer.get_added_vocab()
        base = max((i for token, i in vocab.items() if token not in added), default=-1) + 1
        return cls({i: token for token, i in vocab.items()}, base)

    @property
    def end(self) -> int:
        # Not len(tokenizer): ids may have holes.
        return max(self.tokens, default=-1) + 1


def _common_prefix(student: _Ids, teacher: _Ids) -> int | None:
    """The largest n so that every id below n is the same token (or the same hole) in both; None where the base
    vocabularies differ."""
    ids = sorted({*student.tokens, *teacher.tokens})  # not a range: a malformed tokenizer may have ids up to 2**32
    differ = [i for i in ids if student.tokens.get(i) != teacher.tokens.get(i)]
    size = min(student.end, teacher.end, *differ[:1])
    return size if size >= max(student.base, teacher.base) else None


def _cut_to_head(who: str, ids: _Ids, rows: int, size: int) -> int:
    if rows >= size:
        return size
    if rows < ids.base:
        raise VocabularyError(
            f"the {who}'s output head has {rows:,} rows, but its tokenizer has {ids.base:,} base ids: the checkpoint "
            "and the tokenizer do not belong together; check the folder"
        )
    warnings.warn(
        f"the {who}'s output head has {rows:,} rows: {size - rows} added token(s) from {ids.tokens.get(rows)!r} on "
        "cannot be produced and are left out; resize the embeddings if they are needed",
        stacklevel=3,
    )
    return rows


def _stops_inside(who: str, tokenizer: Any, generation_config: Any, size: int) -> frozenset[int]:
    """The stop ids below `size`, with a word about those that the cut takes away."""
    everything = stop_ids(tokenizer, generation_config, 2**31)
    inside = frozenset(i for i in everything if i < size)
    lost = [f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in sorted(everything - inside)]
    if not everything:
        warnings.warn(
            f"the {who} names no stop token (generation config, tokenizer, chat template): "
            "completions always run to their full length; set eos_token_id in its generation config",
            stacklevel=3,
        )
    elif not inside and who == "student":
        raise VocabularyError(
            f"the student's stop token {', '.join(lost)} means something else (or nothing) to the teacher, whose "
            f"tokenizer agrees only on the ids below {size:,}: the student could never stop. Choose a teacher with the "
            "student's special tokens"
        )
    elif lost:
        warnings.warn(
            f"the {who}'s stop token {', '.join(lost)} is outside the {size:,} shared ids: it is cut away, so "
            f"stopping is learned and sampled from {sorted(inside) or 'no token of this model'} only",
            stacklevel=3,
        )
    return inside
