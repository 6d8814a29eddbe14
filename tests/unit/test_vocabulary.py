import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.errors import VocabularyError
from headstart.models.vocabulary import SharedVocabulary, end_of_turn, shared_vocabulary, stop_ids
from real_tokenizers import real_tokenizer
from small_tokenizers import CHATML, GEMMA_LIKE, word_tokenizer

MARKS = ("<|im_start|>", "<|im_end|>")
BASE = len(word_tokenizer())


def ends_with(*ids: int) -> Any:
    return SimpleNamespace(eos_token_id=ids[0] if len(ids) == 1 else list(ids))


def pair(student: Any, teacher: Any, student_rows: int = 10**6, teacher_rows: int = 10**6) -> SharedVocabulary:
    return shared_vocabulary(student, teacher, None, None, student_rows, teacher_rows)


@pytest.mark.parametrize(
    ("name", "declared", "expected"),
    [
        ("qwen3", ends_with(151645, 151643), {151645, 151643}),
        ("qwen3", None, {151645}),
        ("qwen2_5", ends_with(151643), {151643, 151645}),  # a base model with a chat template
        ("phi3_mini", ends_with(32000), {32000, 32007}),  # <|end|> is known from the template only
        ("gpt2", ends_with(50256), {50256}),
        ("gpt2", SimpleNamespace(eos_token_id=None), {50256}),
    ],
)
def test_stop_ids_are_found_by_role(name: str, declared: Any, expected: set[int]) -> None:
    assert stop_ids(real_tokenizer(name), declared, 200_000) == expected


def test_stop_ids_end_at_the_limit() -> None:
    assert stop_ids(real_tokenizer("qwen3"), ends_with(151645, 151643), 151645) == {151643}


def test_end_of_turn_comes_from_the_template_and_padding_does_not_count() -> None:
    special = ("<start_of_turn>", "<end_of_turn>", "<pad>")
    tokenizer = word_tokenizer(special=special, template=GEMMA_LIKE, pad_token="<pad>")
    assert stop_ids(tokenizer, None, 100) == {2, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    plain = word_tokenizer(template="{% for m in messages %}{{ m.role + ' ' + m.content + ' user ' }}{% endfor %}")
    assert stop_ids(plain, None, 100) == {2}
    single = word_tokenizer(template="{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}")
    assert stop_ids(single, None, 100) == {2}


TURN = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
ONLY = TURN.replace("%}<", "%}{% if SHOWN %}<", 1).replace("<end> ", "<end> {% endif %}")
ASKS = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURN + ASKS, "<end>"),
        (TURN.replace("m.content", "m.content | trim") + ASKS, "<end>"),
        (TURN + "<assistant>", "<end>"),
        (TURN.replace("<end> {%", "{% if m.role == 'assistant' %}<end>{% endif %}{%") + ASKS, "<end>"),
        (ONLY.replace("SHOWN", "m.role != 'assistant' or loop.last") + ASKS, "<end>"),
        # Nothing shows how an answer ends:
        (TURN.replace("in messages", "in messages if m.role != 'assistant'") + ASKS, None),
        (ONLY.replace("SHOWN", "m.role == 'user' and loop.last") + ASKS, None),
        (ONLY.replace("SHOWN", "m.role == 'user'") + ASKS, None),
        (TURN.replace("m.content", "m.content | upper") + ASKS, None),
        (TURN.replace("m.content", "m.content[:5]") + ASKS, None),
        (TURN.replace("m.content", "m.content | reverse") + ASKS, None),
        (TURN.replace("in messages", "in messages | reverse").replace(" <end>", "") + ASKS, None),
        (TURN.replace(" <end>", "") + "<assistant>", None),  # the next generation prompt follows, or the next question
        (TURN.replace(" <end>", "") + ASKS, None),
        ("{{ messages[0].content }} <end> " + ASKS, None),
        ("{% for m in messages %}{{ m.nothing.content }}{% endfor %}", None),
    ],
)
def test_the_end_of_turn_is_not_guessed(template: str, end: str | None) -> None:
    tokenizer = word_tokenizer(special=("<user>", "<assistant>", "<end>"), template=template)
    found = end_of_turn(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end


def test_qwen_pair_shares_the_ids_of_the_smaller_tokenizer() -> None:
    student, teacher = real_tokenizer("qwen2_5"), real_tokenizer("qwen3")
    both = ends_with(151645, 151643)
    # 1.5B and 7B heads are padded differently; both are wider than the tokenizers.
    vocabulary = shared_vocabulary(student, teacher, both, both, 151_936, 152_064)
    assert vocabulary == SharedVocabulary(151_665, (151643, 151645), ())
    assert shared_vocabulary(teacher, student, both, both, 152_064, 151_936) == vocabulary


def test_stop_classes_are_merged_only_when_they_differ() -> None:
    student, teacher = real_tokenizer("qwen2_5"), real_tokenizer("qwen3")
    vocabulary = shared_vocabulary(student, teacher, ends_with(151645), ends_with(151645, 151643), 151_936, 151_936)
    assert vocabulary.stop_ids == vocabulary.merge_ids == (151643, 151645)


@pytest.mark.parametrize("other", ["phi3_mini", "gpt2"])
def test_other_families_are_aligned_on_bytes(other: str) -> None:
    vocabulary = shared_vocabulary(
        real_tokenizer(other), real_tokenizer("qwen3"), ends_with(2), ends_with(151645), 50_304, 151_936
    )
    assert vocabulary.aligner is not None
    assert vocabulary.size == vocabulary.aligner.student.size < 50_304
    assert (vocabulary.teacher_size, vocabulary.teacher_stop_ids) == (151_669, (151_645,))


def test_a_tokenizer_without_exact_bytes_is_refused_with_its_kind() -> None:
    with pytest.raises(VocabularyError, match=r"a Unigram tokenizer \(.*\) does not keep the exact bytes"):
        shared_vocabulary(real_tokenizer("t5_small"), real_tokenizer("qwen3"), None, None, 32_128, 151_936)


def test_one_different_base_token_makes_two_tokenizers() -> None:
    words = ["a", "b", "c", "d"]
    assert pair(word_tokenizer(words), word_tokenizer(words)).aligner is None
    assert pair(word_tokenizer(words), word_tokenizer(["a", "b", "x", "d"])).aligner is not None
    assert pair(word_tokenizer(words), word_tokenizer([*words, "e"])).aligner is not None


@given(st.integers(0, 4), st.integers(0, 4))
def test_added_tokens_are_shared_as_far_as_they_agree(ours: int, theirs: int) -> None:
    marks = [f"<m{i}>" for i in range(4)]
    student, teacher = word_tokenizer(special=marks[:ours]), word_tokenizer(special=marks[:theirs])
    assert pair(student, teacher).size == BASE + min(ours, theirs)
    renamed = word_tokenizer(special=[*marks[:theirs], "<other>"])
    assert pair(word_tokenizer(special=marks), renamed).size == BASE + theirs


def test_holes_in_the_ids() -> None:
    ids = {"<unk>": 0, "<bos>": 1, "<eos>": 2, "a": 3, "b": 6}
    filled = ids | {"c": 5}
    assert pair(word_tokenizer(vocab=ids), word_tokenizer(vocab=ids)).size == 7  # not len(tokenizer), which is 5
    assert pair(word_tokenizer(vocab=ids), word_tokenizer(vocab=filled)).aligner is not None


def test_narrow_heads() -> None:
    tokenizer = word_tokenizer(special=("<m0>", "<m1>"))
    assert pair(tokenizer, tokenizer, BASE + 2, BASE + 50).size == BASE + 2
    with pytest.warns(UserWarning, match=rf"teacher's output head has {BASE + 1} rows: 1 added token\(s\) from '<m1>'"):
        assert pair(tokenizer, tokenizer, BASE + 2, BASE + 1).size == BASE + 1
    with pytest.raises(VocabularyError, match=rf"student's output head has {BASE - 1} rows, .* {BASE} base ids"):
        pair(tokenizer, tokenizer, BASE - 1, BASE + 2)


def test_a_cut_that_takes_the_stop_token_is_said() -> None:
    plain, turned = word_tokenizer(), word_tokenizer(special=MARKS, template=CHATML)
    end = turned.convert_tokens_to_ids("<|im_end|>")
    with pytest.warns(
        UserWarning, match=rf"teacher's stop token {end} \('<\|im_end\|>'\) is outside the {BASE} shared"
    ):
        vocabulary = pair(plain, turned)
    assert vocabulary == SharedVocabulary(BASE, (2,), ())
    lost = word_tokenizer(special=MARKS, eos_token="<|im_end|>")
    with pytest.raises(VocabularyError, match="the student could never stop"):
        pair(lost, plain)


def test_a_pair_without_any_stop_token_is_said() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.warns(UserWarning, match="names no stop token"):
        assert pair(tokenizer, tokenizer).stop_ids == ()


def test_one_sided_stop_token_needs_no_class() -> None:
    silent = word_tokenizer()
    silent.eos_token = None
    with pytest.warns(UserWarning, match="teacher names no stop token"):
        assert pair(word_tokenizer(), silent) == SharedVocabulary(BASE, (2,), ())


def test_equal_pairs_say_nothing() -> None:
    tokenizer = word_tokenizer(special=MARKS, template=CHATML)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vocabulary = pair(tokenizer, tokenizer)
    assert vocabulary.size == BASE + 2
    assert vocabulary.merge_ids == ()
