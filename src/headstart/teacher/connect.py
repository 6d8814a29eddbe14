"""Finding out, before a run starts, what the endpoints at a teacher's URLs serve and can give."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headstart.errors import ConfigError, ServerError, VocabularyError
from headstart.serving.client import Client
from headstart.teacher.endpoint import (
    COMPLETIONS,
    GENERATE,
    PLAIN,
    Endpoint,
    echo_body,
    per_row_body,
    read_echo,
    read_rows,
    read_top,
    top_body,
)
from headstart.teacher.scorers import Capabilities

TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs; 2024-07-31, 3.14159.",
    "def f(x):\n    return [x ** 2 for x in range(10)]\n",
    "na\u00efve caf\u00e9 \u2014 \u6570\u5b66 \u2211 x\u00b2 \U0001f642",
    "  two  spaces\t\n\nand lines",
)
"""Texts that tokenizers split differently. One more is made of the tokenizer's own tokens."""
OWN = 64
"""Tokens of the tokenizer's own text."""
REPLY = 64 * 2**20
"""Bytes of JSON for 100 tokens up to which the whole vocabulary is asked for; an entry takes ENTRY bytes."""
ENTRY = 70
LACKING, UNAUTHORIZED = 404, 401


def connect(client: Client, model: str | None, tokenizer: Any, width: int) -> Endpoint:
    """The scorer of the teacher that all of the client's URLs serve; `width` ids are wanted per row.

    `tokenizer` is the one its ids are meant in. Raises ServerError where a URL gives nothing, ConfigError where it
    does not serve `model`, gives no log-probabilities of prompts or serves something else than the others, and
    VocabularyError where it splits text otherwise.
    """
    found = [_Probe(client, url, tokenizer, width).capabilities(model) for url in client.urls]
    for url, one in zip(client.urls, found, strict=True):
        if replace(one, version=found[0].version) != replace(found[0], version=found[0].version):
            raise ConfigError(
                f"teacher.urls: {url} serves {one}, but {client.urls[0]} serves {found[0]}; serve one model"
            )
    return Endpoint(client, found[0])


def split(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """The texts of the check and how `tokenizer` splits each, without special tokens."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    plain = [i for i in range(len(tokenizer)) if i not in special]
    own = tokenizer.decode([plain[k * len(plain) // OWN] for k in range(OWN)]) if plain else ""
    return [(text, list(tokenizer.encode(text, add_special_tokens=False))) for text in (*TEXTS, own)]


def digest_of(split_texts: list[list[int]]) -> str:
    """The hash that says how a tokenizer splits the texts."""
    return hashlib.sha256(repr(split_texts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Probe:
    """Questions to one URL."""

    client: Client
    url: str
    tokenizer: Any
    width: int

    def capabilities(self, model: str | None) -> Capabilities:
        name, context = self._model(model)
        texts = split(self.tokenizer)
        ids = max((ids for _, ids in texts), key=len)[:8]
        version = self._optional(lambda: str(self.client.get("/version", url=self.url)["version"]))
        found = replace(self._level(name, ids), max_positions=context, version=version)
        return replace(found, tokenizer=self._tokenizer(found, texts, ids))

    def _model(self, wanted: str | None) -> tuple[str, int | None]:
        """The served model's name and its context."""
        listed = self.client.get("/v1/models", url=self.url)
        served = {str(m["id"]): m for m in (listed.get("data") if isinstance(listed, Mapping) else None) or []}
        base = [name for name, m in served.items() if m.get("parent") is None]
        name = base[0] if wanted is None and len(base) == 1 else wanted
        if name is None or name not in served:
            raise ConfigError(
                f"teacher.model: found {wanted}, but {self.url} serves {', '.join(served) or 'no model'}; name one of "
                "these"
            )
        context = served[name].get("max_model_len")
        return name, int(context) if context else None

    def _level(self, name: str, ids: list[int]) -> Capabilities:
        """The best way to ask that works; notes say why the better ones do not."""
        notes: list[str] = []
        for attempt in (self._per_row, self._whole, self._top, self._echo):
            try:
                return replace(attempt(name, ids), notes=tuple(notes))
            except ServerError as error:
                if not _lacking(error):
                    raise
                notes.append(error.problem)
        raise ConfigError(
            f"teacher.urls: {self.url} gives no log-probabilities of prompts ({'; '.join(notes)}); serve the teacher "
            "with vLLM"
        )

    def _per_row(self, name: str, ids: list[int]) -> Capabilities:
        # As many ids as a run will want, so that --max-logprobs is met here and not in the first step.
        asked = np.tile(np.arange(self.width, dtype=np.int64) % len(self.tokenizer), (len(ids) - 1, 1))
        reply = self.client.post(GENERATE, per_row_body(name, ids, asked, 0), url=self.url)
        if "prompt_token_id_logprobs" not in reply:
            raise ServerError(f"{self.url}{GENERATE} takes no ids per row (older than vLLM 0.32)", status=LACKING)
        read_rows(reply, ids, asked)
        return Capabilities("per_row", name)

    def _whole(self, name: str, ids: list[int]) -> Capabilities:
        size = len(self.tokenizer) * 100 * ENTRY
        if size > REPLY:
            raise ServerError(
                f"the whole vocabulary as JSON is {size / 2**30:.1f} GiB per 100 tokens, so it is not asked for",
                status=LACKING,
            )
        found = Capabilities("full", name)
        self._read_top(found, ids)
        return found

    def _top(self, name: str, ids: list[int]) -> Capabilities:
        refusal: ServerError | None = None
        for width in sorted({4 * self.width, 2 * self.width, self.width, 20, 5, 1}, reverse=True):
            try:
                found = Capabilities("top_k", name, min(width, len(self.tokenizer)))
                self._read_top(found, ids)
                return found
            except ServerError as error:
                if not _lacking(error):
                    raise
                refusal = error
        assert refusal is not None
        raise refusal

    def _read_top(self, found: Capabilities, ids: list[int]) -> None:
        asked = np.array(ids[1:], dtype=np.int64)[:, None]
        reply = self.client.post(COMPLETIONS, top_body(found.model, ids, found), url=self.url)
        if "prompt_logprobs" not in reply["choices"][0]:
            raise ServerError(f"{self.url}{COMPLETIONS} knows no prompt_logprobs", status=LACKING)
        read_top(reply, ids, asked, 0, found.width)

    def _echo(self, name: str, ids: list[int]) -> Capabilities:
        asked = np.array(ids[1:], dtype=np.int64)[:, None]
        read_echo(self.client.post(COMPLETIONS, echo_body(name, ids), url=self.url), ids, asked, 0)
        return Capabilities("sampled", name, 1)

    def _tokenizer(self, found: Capabilities, texts: list[tuple[str, list[int]]], ids: list[int]) -> str | None:
        """The digest of how the server splits text; None where it does not say. Raises VocabularyError where it is
        another tokenizer than ours."""
        theirs = self._optional(lambda: [self._tokens(found.model, text) for text, _ in texts])
        if theirs is None:
            self._echoed_text(found, ids)
            return None
        for (text, ours), other in zip(texts, theirs, strict=True):
            if ours != other:
                raise VocabularyError(
                    f"teacher.tokenizer: {self.url} splits {text[:30]!r} into {len(other)} tokens "
                    f"({str(other[:6])[1:-1]} ...), the tokenizer here into {len(ours)} ({str(ours[:6])[1:-1]} ...): "
                    "ids would mean other tokens there. Set teacher.tokenizer to the folder or hub name of the served "
                    "model"
                )
        return digest_of(theirs)

    def _tokens(self, name: str, text: str) -> list[int]:
        body = {"model": name, "prompt": text, "add_special_tokens": False}
        return list(self.client.post("/tokenize", body, url=self.url)["tokens"])

    def _echoed_text(self, found: Capabilities, ids: list[int]) -> None:
        """Without /tokenize: the text that the server makes of our ids must be ours."""
        body = {"model": found.model, "prompt": ids, **PLAIN, "echo": True}
        reply = self._optional(lambda: self.client.post(COMPLETIONS, body, url=self.url)["choices"][0]["text"])
        ours = self.tokenizer.decode(ids).strip()
        if isinstance(reply, str) and not reply.strip().startswith(ours):
            raise VocabularyError(
                f"teacher.tokenizer: {self.url} reads our ids of {ours[:30]!r} as {reply[:30]!r}; set "
                "teacher.tokenizer to the folder or hub name of the served model"
            )

    def _optional(self, question: Callable[[], Any]) -> Any:
        """The answer, or None where the endpoint has none."""
        try:
            return question()
        except ServerError as error:
            if not _lacking(error):
                raise
        except (KeyError, TypeError, IndexError):
            pass
        return None


def _lacking(error: ServerError) -> bool:
    """Whether a server refused a request as one that it does not know, or does not allow."""
    return error.status is not None and 400 <= error.status < 500 and error.status != UNAUTHORIZED
