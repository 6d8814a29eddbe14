"""Word-level tokenizers made on the spot, with chat templates like those of real families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from headstart import testing

GEMMA_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think> </think> ' }}{% endif %}{% endif %}"
)
WORDS = (
    "system",
    "user",
    "assistant",
    "model",
    "be",
    "brief",
    "what",
    "is",
    "two",
    "plus",
    "four",
    "<think>",
    "</think>",
)


def word_tokenizer(
    words: Sequence[str] = WORDS,
    *,
    special: Sequence[str] = (),
    template: str | None = None,
    adds: str = "$A",
    vocab: dict[str, int] | None = None,
    **named: str,
) -> Any:
    """A tokenizer of white-space words: `<unk> <bos> <eos>`, then `words`, then `special` as added tokens at the end.

    `adds` is the post-processor's pattern, such as "<bos> $A" or "$A <eos>"; `named` sets pad_token and the like.
    """
    ids = vocab or {word: i for i, word in enumerate(("<unk>", "<bos>", "<eos>", *words))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[(name, ids[name]) for name in ("<bos>", "<eos>") if name in ids]
    )
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"} | named
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)} if special else {})
    tokenizer.chat_template = template
    return tokenizer


def piece_tokenizer() -> Any:
    """BERT's kind of tokenizer, whose tokens have no exact bytes; `testing.word_tokenizer`'s words in another order."""
    ids = {token: i for i, token in enumerate([*testing.SPECIALS, *testing.WORDS[::-1]])}
    backend = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = testing.CHAT
    return tokenizer
