"""The worked example of `records.py`, to the letter."""

import pytest
import torch

from headstart.models.collate import collate, completion_text, token_texts
from headstart.records import Prompt, Rollout
from headstart.tasks.grading.thinking import answer_part
from headstart.testing import word_tokenizer
from real_tokenizers import real_tokenizer
from small_tokenizers import word_tokenizer as small_tokenizer

ROLLOUTS = [
    Rollout(Prompt(0, "p0", (5, 6, 7), (9, 5, 6, 7)), 0, (8, 2), stopped=True),
    Rollout(Prompt(1, "p1", (5, 6), (5,)), 0, (8, 9, 8, 9), stopped=False),
]


def test_the_worked_example_of_the_records() -> None:
    batch = collate(ROLLOUTS, "student", 0, torch.device("cpu"))
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8, 2, 0, 0], [0, 5, 6, 8, 9, 8, 9]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]]
    assert batch.completion_mask_BN.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.tokens_M.tolist() == [8, 2, 8, 9, 8, 9]
    assert batch.position_M.tolist() == [0, 1, 0, 1, 2, 3]
    assert batch.row_M.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.position_ids_BT[1].tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert batch.prompt_width == 3


def test_the_teacher_has_its_own_view_of_the_prompt_and_the_same_completion() -> None:
    batch = collate(ROLLOUTS, "teacher", 0, torch.device("cpu"))
    assert batch.input_ids_BT.tolist() == [[9, 5, 6, 7, 8, 2, 0, 0], [0, 0, 0, 5, 8, 9, 8, 9]]
    assert batch.tokens_M.tolist() == [8, 2, 8, 9, 8, 9]


def test_text_leaves_out_the_stop_token_only() -> None:
    tokenizer = word_tokenizer()
    prompt = Prompt(0, "p", (4,), (4,))
    ids = tuple(tokenizer("w3 w4")["input_ids"])
    assert completion_text(tokenizer, Rollout(prompt, 0, (*ids, 1), stopped=True)) == "w3 w4"
    assert completion_text(tokenizer, Rollout(prompt, 0, ids, stopped=False)) == "w3 w4"


def test_token_texts_join_to_the_text() -> None:
    text = "w3 w4 w5"
    assert token_texts(word_tokenizer(), word_tokenizer()(text)["input_ids"]) == ["w3", " w4", " w5"]
    for name in ("qwen3", "phi3_mini"):
        tokenizer = real_tokenizer(name)
        text = "Let us add 12 and\n\n30: 42 apples, naïve"
        assert "".join(token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])) == text


def said(tokenizer: object, prompt: list[int], completion: list[int], teacher: list[int] | None = None) -> str:
    views = Prompt(0, "p", tuple(prompt), tuple(prompt if teacher is None else teacher))
    return completion_text(tokenizer, Rollout(views, 0, tuple(completion), stopped=False))


@pytest.mark.parametrize("name", ["phi3_mini", "qwen3", "qwen2_5", "gpt2", "t5_small"])
@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    total = 0\n\treturn total",
        "a , b . don 't ? [ 1 ]",  # clean-up would take these spaces away
        "na\u00efve \U0001f389\U0001f389 \u65e5\u672c \u00e9",  # tokens that hold part of a character
        "   x\n\n   y",
        "\ufffd is \ufffd",
    ],
)
def test_a_completion_reads_as_it_does_behind_its_prompt(name: str, text: str) -> None:
    tokenizer = real_tokenizer(name)
    ids = tokenizer("so " * 30 + text, add_special_tokens=False)["input_ids"]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    whole = tokenizer.decode(ids, **options)
    for cut in range(1, len(ids)):
        before, found = tokenizer.decode(ids[:cut], **options), said(tokenizer, ids[:cut], ids[cut:])
        # Where the prompt ends inside a character, the completion has the whole of it.
        assert whole in (before + found, before.rstrip("\ufffd") + found)


def test_the_first_token_keeps_its_space_too() -> None:
    tokenizer = real_tokenizer("phi3_mini")
    prompt, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("so", "yes it is"))
    assert token_texts(tokenizer, ids, prompt) == [" yes", " it", " is"]
    assert token_texts(tokenizer, ids) == ["yes", " it", " is"]


def test_a_completion_without_a_prompt_or_after_special_tokens_alone() -> None:
    tokenizer = real_tokenizer("phi3_mini")
    ids = tokenizer("Hello  there", add_special_tokens=False)["input_ids"]
    for prompt in ([], [1], [1, 32001, 32007]):
        assert said(tokenizer, prompt, ids) == "Hello  there"
    asked = tokenizer("<|user|>\nHi<|end|>\n<|assistant|>\n", add_special_tokens=False)["input_ids"]
    assert said(tokenizer, asked, [*ids, 32007, 32000]).strip() == "Hello  there"


QWEN = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        (f"{QWEN}<think>\n", "<think>\n"),
        (f"{QWEN}<think>", "<think>"),
        (f"{QWEN}<reasoning>\n\n", "<reasoning>\n\n"),
        (f"{QWEN}[THINK]", "[THINK]"),
        ("User: 2+2?\nAssistant: <think>\n", "<think>\n"),
        (QWEN, ""),
        (f"{QWEN}<think>\n\n</think>\n\n", ""),  # Qwen3 without thinking
        (QWEN.replace("2+2?", "What does <think> mean? <think>"), ""),
        ("Put thoughts between <think> and </think>\nAnswer:", ""),
    ],
)
def test_a_thought_that_the_prompt_opens_is_put_back(prompt: str, opened: str) -> None:
    tokenizer = real_tokenizer("qwen3")
    ids = tokenizer(prompt)["input_ids"]
    cut, done = (tokenizer(text)["input_ids"] for text in ("Perhaps 5", "Perhaps 5\n</think>\n\n4"))
    assert said(tokenizer, ids, cut) == f"{opened}Perhaps 5"
    assert answer_part(said(tokenizer, ids, cut)) == ("" if opened else "Perhaps 5")
    assert answer_part(said(tokenizer, ids, done)).strip() == "4"


def test_a_thought_that_one_view_opens_is_not_put_back() -> None:
    tokenizer = real_tokenizer("qwen3")
    views = [tokenizer(text)["input_ids"] for text in (f"{QWEN}<think>\n", QWEN)]
    answer = tokenizer("4")["input_ids"]
    assert said(tokenizer, *views[:1], answer, views[1]) == said(tokenizer, views[1], answer, views[0]) == "4"


def test_tags_that_are_special_tokens_stay() -> None:
    tags = ("<think>", "</think>", "[THINK]", "[TOOL_CALLS]", "<tool_call>", "<|tool_call_start|>", "<|im_end|>")
    tokenizer = small_tokenizer(["two", "four"], special=tags)
    ids = tokenizer(" ".join(("two", *tags, "four")))["input_ids"]
    assert said(tokenizer, [3], ids) == " ".join(("two", *tags[:-1], "four"))
