"""A teacher behind HTTP: vLLM, or any OpenAI-style completions endpoint that returns prompt log-probabilities.

The three ways to ask, best first. vLLM's `/inference/v1/generate` takes ids for each row and sends them back as one
array. `prompt_logprobs` of `/v1/completions` sends, as JSON, the most probable ids and the actual token. `echo` with
`logprobs` sends the actual token's alone. `connect` finds out which one an endpoint has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.errors import ServerError
from headstart.serving.client import Client, decode_npy
from headstart.teacher.scorers import Array, CandidateScorer, Capabilities, actual

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
LEAST = -9999.0
"""What vLLM writes into JSON for minus infinity."""
PLAIN = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0}
"""One token must be asked for; what it is does not matter."""
TRIES = 3
"""Replies without scores (vLLM sends some after a preemption) before it is an error."""


@dataclass(frozen=True)
class Endpoint(CandidateScorer):
    """The replicas of one served teacher."""

    client: Client
    found: Capabilities

    def capabilities(self) -> Capabilities:
        return self.found

    def received(self) -> int:
        return self.client.received

    def close(self) -> None:
        self.client.close()

    def begin(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], candidate_ids: Array, start: int = 0
    ) -> Callable[[], Array]:
        rows = len(candidate_ids)
        if not rows:
            return lambda: np.zeros(candidate_ids.shape, dtype=np.float32)
        ids = [*map(int, prompt_ids), *map(int, completion_ids[: start + rows])]
        first = len(prompt_ids) + start - 1
        match self.found.level:
            case "per_row":
                path, body = GENERATE, per_row_body(self.found.model, ids, candidate_ids, first)
            case "full" | "top_k":
                path, body = COMPLETIONS, top_body(self.found.model, ids, self.found)
            case "sampled":
                path, body = COMPLETIONS, echo_body(self.found.model, ids)
        future = self.client.submit(path, body)
        return lambda: self._read(path, body, future, candidate_ids, first)

    def _read(self, path: str, body: dict[str, Any], future: Future[Any], asked: Array, first: int) -> Array:
        reply = future.result()
        if self.found.level == "per_row":
            for _ in range(TRIES - 1):
                if not isinstance(reply, Mapping) or reply.get("prompt_token_id_logprobs") is not None:
                    break
                reply = self.client.post(path, body)
            scored = read_rows(reply, body["token_ids"], asked)
        elif self.found.level == "sampled":
            scored = read_echo(reply, body["prompt"], asked, first)
        else:
            scored = read_top(reply, body["prompt"], asked, first, self.found.width)
        return _checked(scored, asked)


def per_row_body(model: str, ids: list[int], candidate_ids: Array, first: int) -> dict[str, Any]:
    """Ids for each row, without the padding behind them."""
    rows = [[int(i) for i in row if i >= 0] or [-1] for row in candidate_ids]
    sampling = {"prompt_logprob_token_ids": rows, "prompt_logprob_start": first, "detokenize": False}
    return {"model": model, "token_ids": ids, "return_token_ids": True, "sampling_params": {**PLAIN, **sampling}}


def top_body(model: str, ids: list[int], found: Capabilities) -> dict[str, Any]:
    """The most probable ids of every row; all of them without a width."""
    wanted = -1 if found.width is None else found.width
    return {"model": model, "prompt": ids, **PLAIN, "prompt_logprobs": wanted, "return_token_ids": True}


def echo_body(model: str, ids: list[int]) -> dict[str, Any]:
    """The prompt back with its log-probabilities, where there is nothing else."""
    return {"model": model, "prompt": ids, **PLAIN, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}


def read_rows(reply: Any, ids: list[int], asked: Array) -> Array:
    """Scores `[rows, K]` of a reply of `/inference/v1/generate`."""
    sent = reply.get("prompt_token_id_logprobs") if isinstance(reply, Mapping) else None
    if sent is None:
        raise ServerError(
            f"the teacher's reply has no prompt_token_id_logprobs after {TRIES} tries",
            "serve it without KV transfer and with room for whole prompts (--max-num-batched-tokens)",
        )
    _same_tokens(reply.get("prompt_token_ids"), ids)
    given_RK = asked >= 0
    count_R = given_RK.sum(1)
    array = decode_npy(sent, GENERATE)
    shape = (len(asked), max(1, int(count_R.max())))
    if array.shape != shape:
        raise _wrong_rows(f"{array.shape[0] if array.ndim else 0} rows x {array.shape[1:]}", f"{shape[0]} x {shape[1]}")
    scored = np.full(asked.shape, -np.inf, dtype=np.float32)
    scored[given_RK] = array[np.arange(shape[1]) < count_R[:, None]]
    return scored


def read_top(reply: Any, ids: list[int], asked: Array, first: int, width: int | None) -> Array:
    """Scores `[rows, K]` of a reply with `prompt_logprobs`; NaN for ids that are not in it.

    An id that is there only because it is the actual token, beyond the most probable ones, counts for the last place of
    its row alone: which ids are in the support must not depend on the token that was sampled.
    """
    choice = _choice(reply)
    _same_tokens(choice.get("prompt_token_ids"), ids)
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(ids):
        raise _wrong_rows(f"{len(rows) if isinstance(rows, list) else 'no'} rows of prompt_logprobs", str(len(ids)))
    last_RK = actual(asked)
    scored = np.where(asked < 0, -np.inf, np.nan).astype(np.float32)
    for row, (said, token) in enumerate(zip(rows[first + 1 :], ids[first + 1 :], strict=True)):
        if not isinstance(said, Mapping) or str(token) not in said:
            raise _no_token(row, token)
        for k in np.flatnonzero(asked[row] >= 0):
            entry = said.get(str(asked[row, k]))
            if entry is not None and (last_RK[row, k] or width is None or int(entry["rank"] or 0) <= width):
                scored[row, k] = _number(entry["logprob"])
    return scored


def read_echo(reply: Any, ids: list[int], asked: Array, first: int) -> Array:
    """Scores `[rows, K]` of an echoed prompt: NaN for all but the actual tokens."""
    said = _choice(reply).get("logprobs") or {}
    values, tokens = said.get("token_logprobs"), said.get("tokens")
    if not isinstance(values, list) or not isinstance(tokens, list) or len(values) - len(ids) not in (0, 1):
        count = len(values) if isinstance(values, list) else "no"
        raise _wrong_rows(f"{count} echoed log-probabilities", f"{len(ids)} and those of one more token")
    named = [int(t.removeprefix("token_id:")) for t in tokens[: len(ids)] if str(t).startswith("token_id:")]
    if named:
        _same_tokens(named, ids)
    last_RK = actual(asked)
    scored = np.where(asked < 0, -np.inf, np.nan).astype(np.float32)
    for row, value in enumerate(values[first + 1 : len(ids)]):
        if value is None:
            raise _no_token(row, ids[first + 1 + row])
        scored[row, last_RK[row]] = _number(value)
    return scored


def _choice(reply: Any) -> Mapping[str, Any]:
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise ServerError(
            f"the teacher's reply is no completion: found {str(reply)[:80]!r}", "check teacher.urls and teacher.model"
        )
    return choices[0]


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise ServerError(
            f"the teacher sent {str(value)[:40]!r} as a log-probability", "check what runs at teacher.urls"
        )
    return -np.inf if value <= LEAST else float(value)


def _checked(scored: Array, asked: Array) -> Array:
    """`scored`, where it can be what it should be."""
    told_RK = ~np.isnan(scored)
    if not told_RK[actual(asked)].all():
        raise ServerError(
            f"the teacher sent NaN for {int((~told_RK[actual(asked)]).sum())} sampled tokens",
            "the model's weights or activations are not finite on the server: serve it in bfloat16 or float32",
        )
    if told_RK.any() and (largest := float(scored[told_RK].max())) > 1e-3:
        raise ServerError(
            f"the teacher sent {largest:.3g} as a log-probability, which is above 0",
            "serve it with --logprobs-mode raw_logprobs (these are logits)",
        )
    return scored


def _same_tokens(said: Any, ids: list[int]) -> None:
    if said != ids:
        raise ServerError(
            f"the teacher's reply is about other tokens than were sent: found {str(said)[:60]} for {str(ids)[:60]}",
            "check that nothing between here and the server stores or mixes up replies, and that it returns token ids",
        )


def _no_token(row: int, token: int) -> ServerError:
    return ServerError(
        f"the teacher's reply lacks the token that was sampled (id {token}, row {row})",
        "check that it returns log-probabilities of the prompt's own tokens, as vLLM does",
    )


def _wrong_rows(found: str, expected: str) -> ServerError:
    return ServerError(
        f"the teacher's reply has {found}, where {expected} were asked for",
        "check that the server is vLLM 0.32 or newer, and that nothing between here and it cuts replies",
    )
