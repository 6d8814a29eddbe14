"""The rollout engine that lives elsewhere: token ids to vLLM servers with the student's weights, token ids back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from headstart.errors import ServerError
from headstart.interfaces import RolloutEngine
from headstart.models.causal import CausalModel
from headstart.models.lora import unwrap
from headstart.progress import doing
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout.decoding import token_limits
from headstart.rollout.sync import WeightSync
from headstart.serving.client import Client
from headstart.streams import derive_seed

COMPLETIONS = "/v1/completions"
BIASED = 1024
"""Ids that vLLM takes in one request's `logit_bias`."""
PLAIN = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "return_weight_versions": True,
}
"""What vLLM would otherwise take from the model's generation_config.json, and what a reply must say."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request: a sample of a prompt, at most `limit` tokens long."""

    prompt: Prompt
    sample: int
    limit: int


class ServedEngine(RolloutEngine):
    """Samples from the servers behind `client`, which `sync` gives the weights of `student`.

    One request per rollout, with a seed that follows from what the rollout is for: replicas, order and retries change
    nothing. Draws are the server's own, so they are others than the in-process engine's at the same seed.
    """

    def __init__(self, client: Client, student: CausalModel, stop_ids: Sequence[int], sync: WeightSync) -> None:
        self.stop_ids = frozenset(stop_ids)
        self._client, self._vocabulary, self._weights = client, student.vocabulary, sync
        outside = range(student.vocabulary, unwrap(student.model).config.get_text_config().vocab_size)
        # Rows of a padded head are no tokens; a draw of one could never be trained on.
        self._bias = {str(token): -100 for token in outside} if 0 < len(outside) <= BIASED else None

    def sync(self, step: int) -> None:
        """See `RolloutEngine.sync`."""
        self._weights.sync(step)

    @doing("waiting for the rollout servers")
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int | Sequence[int],
        sampling: Sampling,
        key: tuple[int, str, int],
        batch_size: int | None = None,
        finished: Callable[[Rollout], None] = lambda rollout: None,
        candidates: int = 0,
        prefill: Any = None,
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`. Raises ServerError for a reply that cannot be trained on, such as one sampled
        from other weights."""
        limits = token_limits(max_tokens, prompts)
        pairs = zip(prompts, limits, strict=True)
        asked = [_Asked(prompt, sample, limit) for prompt, limit in pairs for sample in range(samples)]
        found: dict[int, Rollout] = {}
        waiting, running = deque(enumerate(asked)), dict[Future[Any], int]()
        versioned = True
        try:
            while waiting or running:
                while waiting and len(running) < (batch_size or len(asked)):
                    index, one = waiting.popleft()
                    body = self._request(one, sampling, key, candidates)
                    running[self._client.submit(COMPLETIONS, body)] = index
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    choice = _only_choice(future.result(), asked[index])
                    versioned = self._check_version(choice) and versioned
                    found[index] = self._rollout(asked[index], choice, candidates)
                    finished(found[index])
        finally:
            for future in running:
                future.cancel()
        if not versioned:
            self._weights.check_versions()
        return [found[index] for index in range(len(asked))]

    def _request(self, one: _Asked, sampling: Sampling, key: tuple[int, str, int], candidates: int) -> dict[str, Any]:
        body = {
            **PLAIN,
            "model": self._weights.name,
            "prompt": list(one.prompt.token_ids),
            "max_tokens": one.limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": derive_seed(*key, one.prompt.index, one.sample),
            "stop_token_ids": sorted(self.stop_ids),
            "logprobs": max(candidates - 1, 0),
        }
        return body | ({"logit_bias": self._bias} if self._bias else {})

    def _check_version(self, choice: Mapping[str, Any]) -> bool:
        """Whether the reply names the weights it was sampled from, as vLLM 0.33 does. Raises ServerError for others."""
        spans = choice.get("weight_versions")
        for span in spans or ():
            if span["version"] != self._weights.version:
                self._weights.refuse_version(span["version"])
        return bool(spans)

    def _rollout(self, one: _Asked, choice: Mapping[str, Any], candidates: int) -> Rollout:
        ids, end = choice["token_ids"], choice.get("finish_reason")
        stops = [place for place, token in enumerate(ids) if token in self.stop_ids]
        stopped = stops == [len(ids) - 1]
        if outside := [token for token in ids if not 0 <= token < self._vocabulary]:
            _refuse(f"holds id {outside[0]}, and the tokenizer ends at {self._vocabulary - 1}", "serve the same model")
        if not ids or len(ids) > one.limit or (stops and not stopped) or (not stopped and len(ids) < one.limit):
            _refuse(
                f"has {len(ids)} tokens and ended with {end!r}, where at most {one.limit} were asked for and stop ids "
                f"are {sorted(self.stop_ids)}",
                "see that nobody else pauses or aborts requests on this server",
            )
        tops, logprobs = choice["logprobs"]["top_logprobs"], np.array(choice["logprobs"]["token_logprobs"], np.float32)
        if len(logprobs) != len(ids) or len(tops) != len(ids) or not (logprobs <= 1e-3).all():
            _refuse(
                f"has {len(logprobs)} log-probabilities for {len(ids)} tokens, or one above 0",
                "start the server with --logprobs-mode raw_logprobs",
            )
        chosen = candidate_ids(ids, tops, candidates, self._vocabulary) if candidates else None
        return Rollout(one.prompt, one.sample, tuple(ids), stopped, candidate_ids=chosen, engine_logprobs=logprobs)


def candidate_ids(
    ids: Sequence[int], tops: Sequence[Mapping[str, float]], width: int, vocabulary: int
) -> npt.NDArray[np.int64]:
    """`Rollout.candidate_ids` from `top_logprobs`: for each token up to `width - 1` ids with their log-probabilities,
    the sampled one among them or beside them. Ids outside the vocabulary are left out."""
    ids_NK = np.full((len(ids), width), -1, dtype=np.int64)
    for row_K, token, top in zip(ids_NK, ids, tops, strict=True):
        pairs = {int(name.removeprefix("token_id:")): value for name, value in top.items()}
        if len(pairs) >= width:  # the sampled token was not among the most probable
            del pairs[token]
        best = sorted((i for i in pairs if i < vocabulary), key=lambda i: (-pairs[i], i))[: width - 1]
        row_K[: len(best)] = best
        row_K[-1] = token
    return ids_NK


def _only_choice(reply: Any, one: _Asked) -> Mapping[str, Any]:
    """The choice in a reply to `one`. Raises ServerError where the reply is to something else, or is no choice."""
    try:
        (choice,) = reply["choices"]
        prompt, ids, logprobs = choice["prompt_token_ids"], choice["token_ids"], choice["logprobs"]
        whole = all(isinstance(token, int) for token in ids) and {"top_logprobs", "token_logprobs"} <= set(logprobs)
    except (TypeError, KeyError, ValueError):
        whole, prompt = False, None
    if not whole:
        _refuse(
            f"is not one choice with token ids and log-probabilities: {str(reply)[:120]}", "serve with vLLM >= 0.32"
        )
    if prompt != list(one.prompt.token_ids):
        _refuse(
            f"is to another prompt than was asked (problem {one.prompt.problem_id}, sample {one.sample})",
            "see whether a proxy or a cache stands before the server",
        )
    return choice  # type: ignore[no-any-return]


def _refuse(what: str, remedy: str) -> NoReturn:
    raise ServerError(f"a rollout server's reply {what}", remedy)
