"""The worked example of `records.py`, to the letter."""

import torch

from headstart.models.collate import collate, completion_text, token_texts
from headstart.records import Prompt, Rollout
from headstart.testing import word_tokenizer
from real_tokenizers import real_tokenizer

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
