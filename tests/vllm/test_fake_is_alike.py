"""The fake server answers as the real one does: the same fields, kinds, statuses and numbers, for what we send."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from real_server import RealServer
from references import LONG, local

from headstart.testing import FakeServer, byte_tokenizer

IDS = list(LONG[:12])
ASK = {"model": "student", "prompt": IDS, "max_tokens": 4, "temperature": 0.0, "return_token_ids": True}
GREEDY = ASK | {"ignore_eos": True, "return_tokens_as_token_ids": True}
DIRECT: dict[str, Any] = {"model": "student", "token_ids": IDS, "return_token_ids": True}
OWN = {"id", "created", "request_id", "root", "text", "text_offset", "message", "version"}
"""Fields whose values are each server's own: only their kind is compared."""
IGNORED = {"decoded_token", "param", "weight_versions"}
"""What nobody reads, and what the fake server, which is a 0.33, sends on `/v1/completions` where 0.32 does not."""
REQUESTS: dict[str, tuple[str, Any]] = {
    "models": ("/v1/models", None),
    "version": ("/version", None),
    "weight_info": ("/weight_info", None),
    "is_paused": ("/is_paused", None),
    "tokenize": ("/tokenize", {"model": "student", "prompt": "2 + 2 is 4", "add_special_tokens": False}),
    "greedy": ("/v1/completions", GREEDY | {"logprobs": 0}),
    "top": ("/v1/completions", GREEDY | {"logprobs": 3}),
    "stop": ("/v1/completions", GREEDY | {"logprobs": 1, "max_tokens": 200, "stop_token_ids": list(range(1, 60))}),
    "versions": ("/v1/completions", GREEDY | {"return_weight_versions": True}),
    "batch": ("/v1/completions", GREEDY | {"prompt": [IDS, IDS[:5]]}),
    "plain prompt": ("/v1/completions", GREEDY | {"prompt_logprobs": 0, "max_tokens": 1}),
    "top of the prompt": ("/v1/completions", GREEDY | {"prompt_logprobs": 5, "max_tokens": 1}),
    "all of the prompt": ("/v1/completions", GREEDY | {"prompt_logprobs": -1, "max_tokens": 1}),
    "echo": ("/v1/completions", GREEDY | {"echo": True, "logprobs": 1, "max_tokens": 1}),
    "generate": ("/inference/v1/generate", DIRECT | {"sampling_params": {"max_tokens": 3, "temperature": 0.0}}),
    "generate top": (
        "/inference/v1/generate",
        DIRECT | {"sampling_params": {"max_tokens": 3, "temperature": 0.0, "logprobs": 4, "ignore_eos": True}},
    ),
    "generate prompt": (
        "/inference/v1/generate",
        DIRECT | {"sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 2, "detokenize": False}},
    ),
    "rows on a CPU": (
        "/inference/v1/generate",
        DIRECT | {"sampling_params": {"max_tokens": 1, "prompt_logprob_token_ids": [[1]] * 11}},
    ),
    "unknown model": ("/v1/completions", GREEDY | {"model": "other"}),
    "id outside": ("/v1/completions", GREEDY | {"prompt": [5, 262]}),
    "too long": ("/v1/completions", GREEDY | {"prompt": [5] * 512, "max_tokens": 1}),
    "no tokens": ("/v1/completions", GREEDY | {"max_tokens": 0}),
    "no adapter": ("/v1/load_lora_adapter", {"lora_name": "p", "lora_path": "/none", "load_inplace": True}),
    "not loaded": ("/v1/unload_lora_adapter", {"lora_name": "p"}),
    "pause": ("/pause?mode=wait", {}),
    "resume": ("/resume", {}),
    "reset": ("/reset_prefix_cache", {}),
    "set version": ("/update_weight_version", {"new_version": "default"}),
}


@pytest.fixture(scope="module")
def fake(server: RealServer, checkpoints: tuple[Path, Path]) -> Iterator[httpx.Client]:
    """The fake server with the real one's model and limits."""
    server.unload_adapters()
    made = FakeServer(local(checkpoints[0]), byte_tokenizer(), name="student", level="top_k", max_logprobs=-1)
    with made as url, httpx.Client(base_url=url, timeout=20) as http:
        yield http


def unlike(fake: Any, real: Any, at: str = "", field: str = "") -> list[str]:
    """Where a fake reply says something else than the real one. What only the real one says does not count."""
    kinds = [type(x) if not isinstance(x, float | int) or isinstance(x, bool) else float for x in (fake, real)]
    if kinds[0] is not kinds[1]:
        return [f"{at}: fake {fake!r}, real {real!r}"]
    match fake:
        case dict():
            lacking = [f"{at}.{key}: only the fake has it" for key in fake.keys() - real.keys() - IGNORED]
            return lacking + [
                x for k in (fake.keys() & real.keys()) - IGNORED for x in unlike(fake[k], real[k], f"{at}.{k}", k)
            ]
        case list():
            if len(fake) != len(real):
                return [f"{at}: fake has {len(fake)}, real {len(real)}"]
            return [
                x for i, pair in enumerate(zip(fake, real, strict=True)) for x in unlike(*pair, f"{at}[{i}]", field)
            ]
        case float() | int() if field not in OWN:
            return [] if fake == pytest.approx(real, abs=1e-4) else [f"{at}: fake {fake}, real {real}"]
        case _:
            return [] if field in OWN or fake == real else [f"{at}: fake {fake!r}, real {real!r}"]


@pytest.mark.parametrize("name", REQUESTS)
def test_the_fake_server_answers_alike(server: RealServer, fake: httpx.Client, name: str) -> None:
    path, body = REQUESTS[name]
    said, meant = (http.get(path) if body is None else http.post(path, json=body) for http in (fake, server.http))
    assert said.status_code == meant.status_code, f"fake {said.text}, real {meant.text}"
    if meant.headers.get("content-type") == "application/json":
        assert unlike(said.json(), meant.json()) == []
    if name == "all of the prompt":
        assert len(meant.json()["choices"][0]["prompt_logprobs"][1]) == 262


def test_unlike_sees_a_difference() -> None:
    assert unlike({"a": [1.0, None]}, {"a": [1.00001, None], "b": 2}) == []
    for other in ({"a": [1.1, None]}, {"a": [1.0]}, {"a": [1.0, 0.0]}, {"b": 1}, [1]):
        assert unlike({"a": [1.0, None]}, other)
