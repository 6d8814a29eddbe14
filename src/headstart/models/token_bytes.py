"""The exact bytes of every token of a tokenizer, and text encoded so that its bytes come back.

Two tokenizers are compared on bytes, never on decoded text: `decode` repairs, strips and joins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from headstart.errors import VocabularyError
from headstart.models.collate import TAG

ANCHORS = ("\n", ".", "a")
"""Texts put in front of a completion so that a tokenizer which adds a space to the start of a text adds it there."""


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The bytes that each id of one tokenizer stands for.

    `bytes_V` holds each id's bytes, None for ids without any (special tokens, holes). `special` are the special tokens
    by id. Tags of thoughts and calls are text on both sides, so they have bytes even where a tokenizer calls them
    special.
    """

    bytes_V: tuple[bytes | None, ...]
    special: Mapping[int, str]
    backend: Any

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBytes:
        """Raises VocabularyError, naming the kind, for a tokenizer whose tokens have no exact bytes."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise VocabularyError(
                f"{_name(tokenizer)} is a {type(tokenizer).__name__}, whose tokens have no bytes to compare: two "
                "tokenizers must both come as tokenizer.json (byte-level BPE, or SentencePiece with byte fallback)"
            )
        kind = _Kind.of(json.loads(backend.to_str()), _name(tokenizer))
        added = tokenizer.added_tokens_decoder
        vocabulary = tokenizer.get_vocab()
        found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, i in vocabulary.items():
            if i not in added:
                found[i] = kind.bytes(token)
        special = {}
        for i, token in added.items():
            if token.special and not TAG.fullmatch(token.content):
                special[i] = token.content
            elif i < len(found):
                found[i] = token.content.encode()
        backend = deepcopy(backend)
        backend.encode_special_tokens = True  # "<|im_end|>" in a text is ordinary text
        if kind.name == "byte_level":
            backend.normalizer = None  # Qwen's NFC would give other bytes back
        backend.no_truncation()
        backend.no_padding()
        return cls(tuple(found), special, backend)

    def join(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`; ids without bytes add nothing."""
        return b"".join(self.at(i) or b"" for i in ids)

    def at(self, token: int) -> bytes | None:
        """The bytes of one id; None too for ids that only the head's padding has."""
        return self.bytes_V[token] if token < len(self.bytes_V) else None

    def encode(self, text: str) -> tuple[int, ...] | None:
        """The ids a text has behind a prompt, without special tokens; None where their bytes are not the text's.

        That happens with tokenizers that normalise (Unicode forms, repeated spaces).
        """
        wanted = text.encode()
        for anchor in ("", *ANCHORS):
            before = self.nearest(anchor) if anchor else ()
            ids = self.nearest(anchor + text)
            if ids[: len(before)] == before and self.join(ids[len(before) :]) == wanted:
                return ids[len(before) :]
        return None

    def nearest(self, text: str) -> tuple[int, ...]:
        """The ids that the tokenizer gives a text, whether or not its bytes come back."""
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True, slots=True)
class _Kind:
    """How tokens stand for bytes: `byte_level` (GPT-2), `fallback` (SentencePiece), `words` (each behind a space)."""

    name: str

    @classmethod
    def of(cls, state: Mapping[str, Any], path: str) -> _Kind:
        model = state["model"]
        steps = [step["type"] for key in ("pre_tokenizer", "decoder") for step in _steps(state.get(key))]
        if model["type"] == "BPE" and "ByteLevel" in steps:
            return cls("byte_level")
        normal = [step["type"] for step in _steps(state.get("normalizer"))]
        if model.get("byte_fallback") and "Precompiled" not in normal:
            return cls("fallback")
        if model["type"] == "WordLevel" and state.get("decoder") is None and steps == ["WhitespaceSplit"]:
            return cls("words")
        raise VocabularyError(
            f"{path}: a {model['type']} tokenizer ({', '.join(steps) or 'no pre-tokenizer'}; byte_fallback "
            f"{bool(model.get('byte_fallback'))}) does not keep the exact bytes of a text, so its tokens cannot be "
            "compared with another tokenizer's; choose a model with byte-level BPE (GPT-2, Qwen, Llama 3) or "
            "SentencePiece with byte fallback (Llama 2, Gemma, Phi-3)"
        )

    def bytes(self, token: str) -> bytes | None:
        if self.name == "byte_level":
            table = _byte_of_character()
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        if self.name == "words":
            return f" {token}".encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode() or None


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A component of a tokenizer.json and, of a sequence, its parts."""
    if step is None:
        return
    parts = [part for key in ("pretokenizers", "decoders", "normalizers") for part in step.get(key, ())]
    yield from (inner for part in parts for inner in _steps(part)) if parts else (step,)


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")
