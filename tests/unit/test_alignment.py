"""Alignment on bytes and divergences over common events, against references in plain Python."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from headstart.config.schema import Alignment, DivergenceConfig, ForwardKL, GeneralizedJSD, ReverseKL, TopKSupport
from headstart.errors import VocabularyError
from headstart.losses.chunked import MOST_LEFT_OUT, Head, weighted_divergence
from headstart.losses.divergence import SKEW, divergence_rows, inside_rows
from headstart.losses.events import Events, join
from headstart.models.alignment import Aligner, Side, common_events, shared_starts
from headstart.models.token_bytes import TokenBytes
from headstart.records import Aligned, Prompt, Rollout
from headstart.testing import word_tokenizer
from real_tokenizers import real_data, real_tokenizer
from small_tokenizers import piece_tokenizer

REAL = ("qwen2_5", "qwen3", "gpt2", "phi3_mini")
PROMPT = Prompt(0, "p", (1,), (2,))
TEXTS = [
    " Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    "def f(x):\n    if x > 10:\n\t\treturn 1_000\n\n\n    return [i for i in range(12345)]\n",
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call>',
    "日本語のテキスト、混ぜて emoji 😀👍🏽 and Ω≈ç√ \u0301e",
    "  leading and trailing  ",
    "<|im_end|> is text here, so is <s> and <think>",
    "\r\n\t \u00a0",
    "",
]


@cache
def side(name: str, stop: int | None = None) -> Side:
    tokenizer = real_tokenizer(name)
    stops = (tokenizer.eos_token_id if stop is None else stop,)
    return Side(TokenBytes.of(tokenizer), stops, max(tokenizer.get_vocab().values()) + 1)


def byte_bpe(tokens: Sequence[str], special: Sequence[str] = ("<end>",)) -> PreTrainedTokenizerFast:
    """Byte-level tokens with these texts on top of the 256 bytes; merges are made so that each can be reached."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [encode.pre_tokenize_str(text)[0][0] for text in tokens]
    ids = {token: i for i, token in enumerate(dict.fromkeys([*special, *alphabet, *pieces]))}
    merges = []
    for piece in pieces:  # character by character
        for k in range(1, len(piece)):
            ids.setdefault(piece[: k + 1], len(ids))
            merges.append((piece[:k], piece[k]))
    backend = Tokenizer(models.BPE(ids, list(dict.fromkeys(merges))))
    backend.pre_tokenizer = encode
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0])


def small_side(tokens: Sequence[str]) -> Side:
    tokenizer = byte_bpe(tokens)
    return Side(TokenBytes.of(tokenizer), (tokenizer.eos_token_id,), len(tokenizer))


def rollout(owner: Side, text: str, *, stopped: bool = False) -> Rollout:
    ids = owner.tokens.encode(text)
    assert ids is not None
    return Rollout(PROMPT, 0, (*ids, owner.stop_ids[0]) if stopped else ids, stopped)


def aligned(aligner: Aligner, r: Rollout) -> Aligned:
    found = aligner.align(r).aligned
    assert found is not None
    return found


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_bytes_come_back(name: str) -> None:
    tokens = side(name).tokens
    for text in TEXTS:
        ids = tokens.encode(text)
        assert ids is not None, text
        assert tokens.join(ids) == text.encode()


@pytest.mark.parametrize("name", REAL)
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_the_bytes_of_any_text_come_back(name: str, text: str) -> None:
    tokens = side(name).tokens
    ids = tokens.encode(text)
    assert ids is not None
    assert tokens.join(ids) == text.encode()


@pytest.mark.parametrize("name", REAL)
def test_all_bytes_but_the_special_tokens_are_spelled(name: str) -> None:
    tokens = side(name).tokens
    assert {bytes([b]) for b in range(256)} - set(tokens.bytes_V) <= {bytes([b]) for b in range(0xC0, 256)}
    assert all(tokens.at(i) is None for i in tokens.special)
    assert tokens.at(10**7) is None


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = byte_bpe(["ab"])
    tokenizer.add_tokens(["\n\n\n", "<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>", "<mask>"]})
    tokens = TokenBytes.of(tokenizer)
    assert tokens.at(tokenizer.convert_tokens_to_ids("\n\n\n")) == b"\n\n\n"
    assert tokens.at(tokenizer.convert_tokens_to_ids("</think>")) == b"</think>"  # a tag is text on both sides
    assert tokens.special == {0: "<end>", tokenizer.convert_tokens_to_ids("<mask>"): "<mask>"}
    assert tokens.join(tokens.encode("x\n\n\n<think>y<mask>") or ()) == b"x\n\n\n<think>y<mask>"


def test_words_stand_behind_a_space() -> None:
    tokens = TokenBytes.of(word_tokenizer())
    assert tokens.join(tokens.encode(" w1 w2") or ()) == b" w1 w2"
    assert tokens.encode("w1  w2") is None


def test_kinds_without_exact_bytes_are_named() -> None:
    with pytest.raises(VocabularyError, match="Unigram tokenizer"):
        TokenBytes.of(real_tokenizer("t5_small"))
    with pytest.raises(VocabularyError, match="WordPiece tokenizer"):
        TokenBytes.of(piece_tokenizer())
    with pytest.raises(VocabularyError, match=r"is a int, whose tokens have no bytes"):
        TokenBytes.of(3)


# --- alignment -------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=30), st.data())
def test_shared_starts_are_those_of_a_reference(text: bytes, data: st.DataObject) -> None:
    def cut() -> list[bytes]:
        places = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1))))) if len(text) > 1 else []
        ends = [0, *places, len(text)] if text else [0]
        return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]

    a, b = cut(), cut()
    starts = [[sum(map(len, x[:k])) for k in range(len(x) + 1)] for x in (a, b)]
    expected = [(i, starts[1].index(s)) for i, s in enumerate(starts[0]) if s in starts[1]]
    assert shared_starts(a, b) == expected
    assert shared_starts(a, b)[0] == (0, 0)


def test_of_tokens_without_bytes_the_first_is_paired() -> None:
    assert shared_starts([b"a", b"", b"b"], [b"a", b"b"]) == [(0, 0), (1, 1), (3, 2)]


@pytest.mark.parametrize("teacher", REAL)
@pytest.mark.parametrize("student", REAL)
def test_real_texts_are_aligned_each_way(student: str, teacher: str) -> None:
    coarse = Aligner(side(student), side(teacher), "coarse")
    kinds: tuple[Alignment, ...] = ("strict", "other", "byte")
    strict, other, byte = (replace(coarse, kind=kind) for kind in kinds)
    for text in TEXTS:
        r = rollout(coarse.student, text, stopped=True)
        found = aligned(coarse, r)
        assert not found.dropped
        assert coarse.teacher.tokens.join(found.ids) == text.encode()
        assert aligned(other, r).rows[0] == 0
        assert (found.rows[-1], found.teacher_rows[-1]) == (len(r.completion_ids) - 1, len(found.ids) - 1)
        for i, j in zip(found.rows, found.teacher_rows, strict=True):
            before = coarse.student.tokens.join(r.completion_ids[:i])
            assert before == coarse.teacher.tokens.join(found.ids[:j])
        ones = aligned(strict, r)
        for i, j in zip(ones.rows, ones.teacher_rows, strict=True):
            assert coarse.student.tokens.at(r.completion_ids[i]) == coarse.teacher.tokens.at(found.ids[j])
        assert set(ones.rows) <= set(found.rows) <= set(aligned(byte, r).rows)
        assert set(found.rows) <= set(aligned(other, r).rows)
        if student == teacher:
            assert found == aligned(strict, r)
            assert list(found.rows) == list(range(len(r.completion_ids)))


@pytest.mark.parametrize("data", ["gsm8k/test.jsonl", "mbpp/mbpp.jsonl"])
@pytest.mark.parametrize(("student", "teacher"), [("qwen2_5", "phi3_mini"), ("phi3_mini", "gpt2")])
def test_benchmarks_come_back_whole(student: str, teacher: str, data: str) -> None:
    aligner = Aligner(side(student), side(teacher), "coarse")
    for line in real_data(data).read_text(encoding="utf-8").splitlines()[:100]:
        row = json.loads(line)
        r = rollout(aligner.student, row.get("answer") or row["code"], stopped=True)
        found = aligned(aligner, r)
        assert aligner.teacher.tokens.join(found.ids) == aligner.student.tokens.join(r.completion_ids)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50_256), max_size=30))
def test_any_sampled_ids_are_aligned_or_left_unscored(ids: list[int]) -> None:
    """Non-canonical tokens, halves of characters, bytes that are no text."""
    aligner = Aligner(side("gpt2"), side("phi3_mini"), "coarse")
    r = Rollout(PROMPT, 0, tuple(ids), False)
    found = aligned(aligner, r)
    written = aligner.student.tokens.join(ids)
    assert written.startswith(aligner.teacher.tokens.join(found.ids if ids else ()))
    for i, j in zip(found.rows, found.teacher_rows, strict=True):
        assert aligner.student.tokens.join(ids[:i]) == aligner.teacher.tokens.join(found.ids[:j])


def test_bytes_that_no_text_has_end_what_is_scored() -> None:
    aligner = Aligner(small_side(["ab"]), small_side(["b"]), "coarse")
    odd = next(i for i in range(aligner.student.size) if aligner.student.tokens.at(i) == b"\xff")
    ab = rollout(aligner.student, "ab").completion_ids
    found = aligned(aligner, Rollout(PROMPT, 0, (*ab, odd, *ab, 0), True))
    assert aligner.teacher.tokens.join(found.ids) == b"ab"
    assert found.rows == (0,)


def test_a_window_that_ends_inside_a_character_leaves_its_rows_unscored() -> None:
    aligner = Aligner(side("gpt2"), side("qwen2_5"), "coarse")
    whole = rollout(aligner.student, "good 👍🏽")
    cut = replace(whole, completion_ids=whole.completion_ids[:-1])
    full, short = aligned(aligner, whole), aligned(aligner, cut)
    assert short.ids == full.ids[: len(short.ids)]
    assert set(short.rows) < set(full.rows) | {1}
    assert max(short.rows) < len(cut.completion_ids) - 1


def test_a_window_that_ends_inside_a_token_of_the_teacher_changes_nothing_before() -> None:
    student, teacher = small_side(["ab", "cd"]), small_side(["abc", "def"])
    aligner = Aligner(student, teacher, "coarse")
    whole, cut = rollout(student, "ababcdef"), rollout(student, "ababc")
    assert aligned(aligner, cut).rows == tuple(i for i in aligned(aligner, whole).rows if i < 2)


def test_stops_are_scored_and_the_horizon_is_not() -> None:
    aligner = Aligner(side("phi3_mini", 32007), side("qwen2_5", 151645), "coarse")
    stopped, cut = rollout(aligner.student, " so 4.", stopped=True), rollout(aligner.student, " so 4.")
    found = aligned(aligner, stopped)
    assert found.ids[-1] == 151645
    assert found.rows[-1] == len(stopped.completion_ids) - 1
    assert aligned(aligner, cut).rows == found.rows[:-1]


def test_another_prompt_changes_nothing_in_the_completion() -> None:
    aligner = Aligner(side("gpt2"), side("phi3_mini"), "coarse")
    r = rollout(aligner.student, " so 4.", stopped=True)
    other = replace(r, prompt=Prompt(1, "q", (5, 6), (7, 8, 9)))
    assert aligned(aligner, other) == aligned(aligner, r)


def test_special_tokens_inside_are_not_text() -> None:
    aligner = Aligner(side("qwen2_5"), side("gpt2"), "coarse")
    one, two = (aligner.student.tokens.encode(text) or () for text in (" a", " b"))
    r = Rollout(PROMPT, 0, (*one, 151644, *two), False)
    found = aligned(aligner, r)
    assert aligner.teacher.tokens.join(found.ids) == b" a b"
    assert found.rows == (0,)  # at the special token and behind it the two have read different things


def test_special_tokens_of_both_stay_where_they_stand() -> None:
    aligner = Aligner(side("qwen2_5", 151645), side("qwen3", 151645), "strict")
    one, two = (aligner.student.tokens.encode(text) or () for text in (" a", " b"))
    r = Rollout(PROMPT, 0, (*one, 151644, *two, 151645), True)
    found = aligned(aligner, r)
    assert found.ids == r.completion_ids
    assert found.rows == found.teacher_rows == (0, 1, 2, 3)


def test_a_completion_that_does_not_come_back_is_dropped() -> None:
    student, teacher = side("gpt2"), TokenBytes.of(word_tokenizer(("the", "cat")))
    aligner = Aligner(student, Side(teacher, (1,), 8), "coarse")
    found = aligned(aligner, rollout(student, "the  cat"))
    assert found == Aligned((0,), (), (), dropped=True)
    assert aligned(aligner, rollout(student, " the cat")).rows == (0, 1)


def test_prefixes_are_cut_back_to_where_a_token_of_the_teacher_begins() -> None:
    student, teacher = small_side(["a", "b"]), small_side(["abc"])
    aligner = Aligner(student, teacher, "coarse")
    r = rollout(student, "xabcabc")
    for length, text in ((0, b""), (1, b"x"), (2, b"x"), (3, b"x"), (4, b"xabc"), (7, b"xabcabc")):
        own, theirs = aligner.begin(r, length)
        assert student.tokens.join(own) == teacher.tokens.join(theirs) == text
    emoji = rollout(side("gpt2"), "👍 ok")
    own, theirs = Aligner(side("gpt2"), side("phi3_mini"), "coarse").begin(emoji, 1)
    assert (own, theirs) == ((), ())


def test_what_the_teacher_wrote_in_the_students_tokens() -> None:
    aligner = Aligner(side("qwen2_5", 151645), side("gpt2"), "coarse")
    ids = aligner.teacher.tokens.encode(" 12345 👍") or ()
    own = aligner.translate((*ids, 50256), stopped=True)
    assert own[-1] == 151645
    assert aligner.student.tokens.join(own) == " 12345 👍".encode()
    assert aligner.student.tokens.join(aligner.translate(ids[:-1], stopped=False)) == b" 12345 "


def test_rows_where_the_teacher_splits_a_token_that_it_has_are_left_out() -> None:
    """Both have "ab", but behind "x" the teacher merges "xa" first: it can only write "xa", "b" there."""
    student, teacher = small_side(["ab"]), small_side(["xa", "ab"])
    aligner = Aligner(student, teacher, "coarse")
    found = aligned(aligner, rollout(student, "yab"))
    assert (found.rows, found.teacher_rows) == ((0, 1), (0, 1))
    odd = Rollout(PROMPT, 0, rollout(student, "ab").completion_ids, False)
    assert aligned(Aligner(student, no_merge(teacher, b"ab"), "coarse"), odd).rows == ()


def no_merge(owner: Side, token: bytes) -> Side:
    """The same tokenizer with a piece that keeps `token` apart, though it stays in the vocabulary."""
    state = json.loads(owner.tokens.backend.to_str())
    state["model"]["merges"] = [m for m in state["model"]["merges"] if "".join(m).encode() != token]
    tokens = replace(owner.tokens, backend=Tokenizer.from_str(json.dumps(state)))
    return replace(owner, tokens=tokens)


# --- events ----------------------------------------------------------------------------------------------------------


def reference(a: Side, b: Side, p: Sequence[float], q: Sequence[float]) -> float:
    """KL of the coarse distributions, from dictionaries."""

    def name(owner: Side, i: int, shared: set[Any]) -> Any:
        event = owner.events[i]
        if event in shared:
            return event
        prefixes = [event[:k] for k in range(len(event), 0, -1)] if isinstance(event, bytes) else []
        return next((prefix for prefix in prefixes if prefix in shared), "rest")

    shared = set(a.events) & set(b.events) - {None}
    sums: list[dict[Any, float]] = []
    for owner, x in ((a, p), (b, q)):
        sums.append({})
        for i in range(owner.size):
            key = name(owner, i, shared)
            sums[-1][key] = sums[-1].get(key, 0.0) + x[i]
    return sum(v * math.log(v / sums[1][k]) for k, v in sums[0].items() if v > 0)


def draw(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compare(
    config: DivergenceConfig, events: tuple[Events | None, Events | None], student: Tensor, teacher: Tensor
) -> Tensor:
    both = [join(e, x) for e, x in zip(events, (student, teacher), strict=True)]
    return divergence_rows(config, *both, torch.zeros(len(student), dtype=torch.int64)).value_M


SMALL = [["12", "345", "ab"], ["1", "34", "abc", "ab"], ["    ", "  ", "ab"], []]


@pytest.mark.parametrize("theirs", SMALL)
@pytest.mark.parametrize("ours", SMALL)
def test_the_coarse_divergence_is_that_of_a_reference(ours: list[str], theirs: list[str]) -> None:
    a, b = small_side(ours), small_side(theirs)
    student, teacher = draw(1, 4, a.size), draw(2, 4, b.size)
    found = compare(ReverseKL(), common_events(a, b, "coarse"), student, teacher)
    p, q = student.softmax(-1), teacher.softmax(-1)
    expected = [reference(a, b, p[i].tolist(), q[i].tolist()) for i in range(4)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert bool((found >= 0).all())


def test_one_vocabulary_is_the_plain_divergence() -> None:
    tokenizer = byte_bpe(["12", "abc"])
    own = Side(TokenBytes.of(tokenizer), (0,), len(tokenizer))
    for kind in ("coarse", "strict", "other", "byte"):
        assert common_events(own, own, kind) == (None, None)


def test_permuted_ids_give_the_same_numbers_to_the_bit() -> None:
    base = byte_bpe(["12", "abc"])
    size = len(base)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    state = json.loads(base.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: order[i] for token, i in state["model"]["vocab"].items()}
    state["added_tokens"][0]["id"] = order[0]
    permuted = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<end>")
    a = Side(TokenBytes.of(base), (0,), size)
    b = Side(TokenBytes.of(permuted), (order[0],), size)
    events = common_events(a, b, "coarse")
    assert events[0] is None
    student, teacher = draw(3, 3, size).float(), draw(4, 3, size).float()
    theirs = torch.empty_like(teacher)
    theirs[:, order] = teacher
    assert torch.equal(join(events[1], theirs), teacher)
    assert torch.equal(
        compare(ReverseKL(), events, student, theirs), compare(ReverseKL(), (None, None), student, teacher)
    )


def test_added_tokens_without_probability_change_nothing() -> None:
    a, b = small_side(["12"]), small_side(["12", "ab"])
    more = small_side(["12", "ab", "zzz"])
    student, teacher = draw(5, 3, a.size), draw(6, 3, b.size)
    wider = torch.cat([teacher, torch.full((3, more.size - b.size), -200.0, dtype=torch.float64)], -1)
    one, two = compare(ReverseKL(), common_events(a, b, "coarse"), student, teacher), None
    two = compare(ReverseKL(), common_events(a, more, "coarse"), student, wider)
    torch.testing.assert_close(one, two)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**16), st.data())
def test_joining_never_raises_the_divergence(V: int, seed: int, data: st.DataObject) -> None:
    student, teacher = draw(seed, 2, V), draw(seed + 1, 2, V)
    parts = data.draw(st.lists(st.integers(0, 3), min_size=V, max_size=V))
    number = {part: k for k, part in enumerate(dict.fromkeys(parts))}
    events = Events.of(torch.tensor([number[part] for part in parts]), len(number))
    config: DivergenceConfig
    for config in (ReverseKL(), ForwardKL(), GeneralizedJSD()):
        plain = compare(config, (None, None), student, teacher)
        coarse = compare(config, (events, events), student, teacher)
        assert bool((coarse <= plain + 1e-12).all())
        assert bool((coarse >= 0).all())
    probabilities = join(events, student).softmax(-1).sum(-1)
    torch.testing.assert_close(probabilities, torch.ones(2, dtype=torch.float64))
    assert compare(ReverseKL(), (events, events), student, student).abs().max() < 1e-14


def test_models_that_agree_have_no_divergence_where_digits_are_split() -> None:
    """The student writes 123 as one token, the teacher digit by digit; both mean 123 with .9 and 7 with .1."""
    a, b = small_side(["123"]), small_side([])
    student, teacher = torch.full((1, a.size), -1e9).double(), torch.full((1, b.size), -1e9).double()
    ids = [next(i for i in range(s.size) if s.tokens.at(i) == text) for s, text in ((a, b"123"), (b, b"1"))]
    sevens = [next(i for i in range(s.size) if s.tokens.at(i) == b"7") for s in (a, b)]
    for x, i, seven in zip((student, teacher), ids, sevens, strict=True):
        x[0, i], x[0, seven] = math.log(0.9), math.log(0.1)
    assert compare(ReverseKL(), common_events(a, b, "coarse"), student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert compare(ReverseKL(), common_events(b, a, "coarse"), teacher, student).item() == pytest.approx(0, abs=1e-12)
    apart = compare(ReverseKL(), common_events(a, b, "other"), student, teacher)
    assert apart.item() > 1


def test_a_teacher_that_stops_more_is_nearer_to_a_student_that_stops() -> None:
    a, b = small_side(["ab"]), small_side(["abc"])
    b = replace(b, stop_ids=(0, 5))
    student, teacher = draw(7, 1, a.size), draw(8, 1, b.size)
    student[0, 0] = 9.0
    values = []
    for logit in (-2.0, 0.0, 2.0, 4.0):
        teacher[0, 5] = logit
        values.append(compare(ReverseKL(), common_events(a, b, "coarse"), student, teacher).item())
    assert values == sorted(values, reverse=True)


def test_rest_is_one_event_where_both_sides_have_it() -> None:
    a, b = byte_bpe(["ab"], ["<end>", "<x>"]), byte_bpe(["ab"], ["<end>", "<y>"])
    sides = [Side(TokenBytes.of(t), (0,), len(t)) for t in (a, b)]
    ours, theirs = common_events(sides[0], sides[1], "coarse")
    assert ours is not None
    assert theirs is not None
    assert ours.rest == theirs.rest == ours.size - 1
    assert ours.event_V[1] == theirs.event_V[1] == ours.rest
    assert ours.ids(torch.tensor([ours.rest, 0])).tolist() == [-1, 0]
    plain = common_events(small_side(["ab"]), sides[1], "coarse")  # only the teacher has a token of its own: no part
    assert plain[1] is not None
    assert (plain[1].rest, int(plain[1].event_V[1])) == (None, -1)


def test_nothing_in_common_is_refused() -> None:
    words = Side(TokenBytes.of(word_tokenizer()), (1,), 46)
    with pytest.raises(VocabularyError, match="not a single token in common"):
        common_events(words, small_side([]), "coarse")


def test_sums_that_vanish_beside_the_rows_maximum_are_still_right() -> None:
    events = Events.of(torch.tensor([0, 1, 1]), 2)
    logits = torch.tensor([[200.0, -3.0, -4.0]])
    expected = torch.logsumexp(logits[:, 1:].double(), -1)
    torch.testing.assert_close(join(events, logits)[:, 1].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", [ReverseKL(), ForwardKL(), GeneralizedJSD(), ReverseKL(support=TopKSupport(k=3))])
def test_gradients_flow_through_the_events(config: DivergenceConfig) -> None:
    a, b = Events.of(torch.tensor([0, 1, 1, 2, -1]), 3), Events.of(torch.tensor([2, 0, 1]), 3)
    teacher = join(b, draw(9, 2, 3))

    def loss(student: Tensor) -> Tensor:
        return divergence_rows(config, join(a, student), teacher, torch.zeros(2, dtype=torch.int64)).surrogate_M

    assert torch.autograd.gradcheck(loss, (draw(10, 2, 5).requires_grad_(),))


class Scores:
    def __init__(self, logits_MC: Tensor) -> None:
        self.logits_MC = logits_MC

    def logits(self, rows: slice | Tensor) -> Tensor:
        return self.logits_MC[rows].clone()


@pytest.mark.parametrize("kind", ["coarse", "strict", "other"])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("config", [ReverseKL(), ForwardKL(), GeneralizedJSD()])
def test_chunks_give_the_loss_and_gradient_of_the_whole(config: DivergenceConfig, bare: bool, kind: Alignment) -> None:
    a, b = small_side(["12", "345"]), small_side(["1234", "ab"])
    ours, theirs = common_events(a, b, kind)
    assert ours is not None
    hidden, weight = draw(11, 9, 6).requires_grad_(), (draw(12, a.size, 6) / 4).requires_grad_()
    teacher, weights = join(theirs, draw(13, 9, b.size) / 4), torch.rand(9, dtype=torch.float64)
    head = Head(lambda h: h @ weight.T, [weight], weight if bare else None, ours)
    tokens = torch.zeros(9, dtype=torch.int64)
    found = weighted_divergence(config, hidden, head, Scores(teacher), tokens, weights, chunk=4)
    student, other = join(ours, hidden @ weight.T), teacher
    if ours.rest is not None:
        assert found.rest_M2 is not None
        rest = torch.stack([x.softmax(-1)[:, ours.rest] for x in (student, other)], -1)
        torch.testing.assert_close(found.rest_M2, rest.detach())
        if kind == "strict":
            weights = weights * (rest.detach() <= MOST_LEFT_OUT).all(-1)
            kept = [i for i in range(ours.size) if i != ours.rest]
            student, other = student[:, kept], other[:, kept]
    expected = (weights * divergence_rows(config, student, other, tokens).surrogate_M).sum()
    torch.testing.assert_close(found.loss, expected)
    for x, y in zip(
        torch.autograd.grad(found.loss, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_no_rows_give_no_loss() -> None:
    events = Events.of(torch.tensor([0, 1, 1]), 2)
    hidden, weight = torch.zeros(0, 4).requires_grad_(), torch.ones(3, 4).requires_grad_()
    head = Head(lambda h: h @ weight.T, [weight], weight, events)
    none = torch.zeros(0, dtype=torch.int64)
    found = weighted_divergence(ReverseKL(), hidden, head, Scores(torch.zeros(0, 2)), none, torch.zeros(0), chunk=4)
    assert float(found.loss) == 0
    assert torch.autograd.grad(found.loss, weight)[0].abs().max() == 0


# --- inside a teacher's token ----------------------------------------------------------------------------------------


def test_what_the_teacher_still_says_inside_its_token() -> None:
    """The teacher may write "abc", "abd" or "b"; after the student's "a" only the first two remain."""
    student, teacher = small_side(["a", "b"]), small_side(["abc", "abd"])
    aligner = Aligner(student, teacher, "byte")
    found = aligned(aligner, rollout(student, "abc"))
    assert (found.rows, found.teacher_rows, found.inside) == ((0, 1, 2), (0, 0, 0), (b"", b"a", b"ab"))
    ids, events = aligner.remainders(b"ab")
    said = {teacher.tokens.at(int(i)): int(e) for i, e in zip(ids, events, strict=True)}
    number = {student.tokens.at(i): i for i in range(student.size)}
    assert said == {b"abc": number[b"c"], b"abd": number[b"d"]}


def test_white_space_and_tokens_over_the_end_are_left_out() -> None:
    student, teacher = small_side(["bc"]), small_side(["ab", "   "])
    aligner = Aligner(student, teacher, "byte")
    assert aligned(aligner, rollout(student, "abc")).rows == (0,)  # "bc" runs over the end of "ab"
    assert aligned(aligner, rollout(student, "   x")).rows == (0, 3)


def test_the_skewed_divergence_is_finite_and_has_its_own_gradient() -> None:
    student, teacher = draw(14, 3, 5).requires_grad_(), draw(15, 3, 5)
    teacher[1, 2:] = -1e30
    inside, tokens = torch.tensor([False, True, False]), torch.zeros(3, dtype=torch.int64)
    found = inside_rows(ReverseKL(), student, teacher, tokens, inside)
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    m = (1 - SKEW) * q + SKEW * p
    expected = (p * (p / m).log()).sum(-1)
    assert found.value_M[1].item() == pytest.approx(expected[1].item())
    assert float(found.value_M.max()) < -math.log(SKEW)
    assert torch.equal(found.value_M[::2], divergence_rows(ReverseKL(), student, teacher, tokens).value_M[::2])

    def loss(x: Tensor) -> Tensor:
        return inside_rows(ReverseKL(), x, teacher, tokens, inside).surrogate_M[1]

    assert torch.autograd.gradcheck(loss, (student,))
