"""The fake server answers as vLLM does: ids in, ids out, log-probabilities that are the model's own."""

from __future__ import annotations

import base64
import copy
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headstart.testing import FakeServer, random_model, word_tokenizer, write_checkpoint

IDS = [6, 7, 8, 9]


def ask(url: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=10) as reply:
        raw = reply.read()
    return json.loads(raw) if reply.headers["Content-Type"] == "application/json" and raw else raw.decode()


def refused(url: str, path: str, body: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url, path, body)
    return error.value.code, json.loads(error.value.read())["error"]["message"]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama", len(word_tokenizer()) + 2, seed=3)


@pytest.fixture
def server(model: Any) -> Iterator[FakeServer]:
    made = FakeServer(model, word_tokenizer())
    with made:
        yield made


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    out: list[int] = []
    for _ in range(count):
        out.append(int(logprobs(model, [*ids, *out])[-1].argmax()))
    return out


def complete(server: FakeServer, **more: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": IDS, "max_tokens": 5, "temperature": 0, "ignore_eos": True} | more
    return ask(server.url, "/v1/completions", body | {"return_token_ids": True})["choices"][0]


def test_greedy_completions_are_the_models_own(server: FakeServer, model: Any) -> None:
    want = greedy(model, IDS, 5)
    choice = complete(server, logprobs=1, return_tokens_as_token_ids=True, return_weight_versions=True)
    assert choice["token_ids"] == want
    assert choice["prompt_token_ids"] == IDS
    assert choice["finish_reason"] == "length"
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": 5}]
    rows = logprobs(model, [*IDS, *want])[len(IDS) - 1 : -1]
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], rows.amax(-1).numpy(), atol=1e-5)
    assert [list(row) for row in choice["logprobs"]["top_logprobs"]] == [[f"token_id:{i}"] for i in want]
    stopped = complete(server, stop_token_ids=[want[2]])
    assert (stopped["token_ids"], stopped["finish_reason"], stopped["stop_reason"]) == (want[:3], "stop", want[2])


def test_draws_follow_the_seed(server: FakeServer) -> None:
    drawn = [tuple(complete(server, temperature=1, seed=seed, max_tokens=12)["token_ids"]) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_prompt_logprobs_are_of_the_token_that_stands_there_and_of_the_top_k(server: FakeServer, model: Any) -> None:
    want = logprobs(model, IDS)[:-1]
    for k in (0, 2):
        rows = complete(server, prompt_logprobs=k, max_tokens=1)["prompt_logprobs"]
        assert rows[0] is None
        for row, token, lp_V in zip(rows[1:], IDS[1:], want, strict=True):
            ids = dict.fromkeys([token, *lp_V.topk(k).indices.tolist()])
            assert [int(i) for i in row] == list(ids)
            for i, entry in row.items():
                assert entry["logprob"] == pytest.approx(float(lp_V[int(i)]), abs=1e-5)
                assert entry["rank"] == 1 + int((lp_V > lp_V[int(i)]).sum())
    assert refused(server.url, "/v1/completions", {"prompt": IDS, "prompt_logprobs": 21})[0] == 400


def test_ids_of_each_row_are_scored(server: FakeServer, model: Any) -> None:
    params = {"max_tokens": 1, "prompt_logprob_token_ids": [[5, 9], [7]], "prompt_logprob_start": 1}
    reply = ask(server.url, "/inference/v1/generate", {"token_ids": IDS, "sampling_params": params})
    found = np.load(io.BytesIO(base64.b64decode(reply["prompt_token_id_logprobs"])), allow_pickle=False)
    lp = logprobs(model, IDS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[lp[1, 5], lp[1, 9]], [lp[2, 7], -np.inf]], atol=1e-5)
    params["prompt_logprob_start"] = 0
    code, words = refused(server.url, "/inference/v1/generate", {"token_ids": IDS, "sampling_params": params})
    assert (code, "2 rows" in words) == (400, True)


def test_lesser_endpoints(model: Any) -> None:
    rows = {"max_tokens": 1, "prompt_logprob_token_ids": [[5]] * 3}
    with FakeServer(model, word_tokenizer(), level="top_k") as url:
        assert "V2 model" in refused(url, "/inference/v1/generate", {"token_ids": IDS, "sampling_params": rows})[1]
    locked = FakeServer(model, word_tokenizer(), level="sampled", key="k")
    with locked as url, pytest.raises(urllib.error.HTTPError, match="401"):
        ask(url, "/v1/completions", {"prompt": IDS})
    with FakeServer(model, word_tokenizer(), level="sampled") as url:
        body = {"prompt": IDS, "max_tokens": 0, "echo": True, "logprobs": 0}
        choice = ask(url, "/v1/completions", body)["choices"][0]
        want = logprobs(model, IDS)[:-1].gather(-1, torch.tensor(IDS[1:])[:, None])[:, 0]
        assert choice["logprobs"]["token_logprobs"][0] is None
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][1:], want, atol=1e-5)
        assert "max_model_len" not in ask(url, "/v1/models")["data"][0]
        assert refused(url, "/tokenize", {"prompt": "w1", "add_special_tokens": False})[0] == 404


def test_tokenizer_and_limits(server: FakeServer) -> None:
    reply = ask(server.url, "/tokenize", {"prompt": "w0 w1", "add_special_tokens": False})
    assert reply == {"count": 2, "max_model_len": 512, "tokens": [6, 7]}
    assert ask(server.url, "/health") == ""
    assert ask(server.url, "/v1/models")["data"][0]["id"] == "m"
    assert refused(server.url, "/v1/completions", {"prompt": [999]})[0] == 400
    assert refused(server.url, "/v1/completions", {"prompt": IDS, "max_tokens": 509})[0] == 400
    assert refused(server.url, "/v1/completions", {"prompt": IDS, "model": "other"})[0] == 404


def changed(model: Any, seed: int = 0) -> Any:
    """`model` with other weights everywhere, the head included."""
    new = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return new


def reload(server: FakeServer, folder: Path) -> None:
    ask(server.url, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})


def first_row(server: FakeServer) -> float:
    return float(complete(server, max_tokens=1, logprobs=0)["logprobs"]["token_logprobs"][0])


def test_a_reload_and_its_traps(server: FakeServer, model: Any, tmp_path: Path) -> None:
    before = first_row(server)
    new = changed(model)
    write_checkpoint(tmp_path / "new", new, word_tokenizer())
    after = float(logprobs(new, IDS)[-1].max())
    reload(server, tmp_path / "new")
    stale = first_row(server)
    assert abs(stale - after) > 1e-3  # the prompt's keys and values are of the old weights
    assert abs(stale - before) > 1e-3
    ask(server.url, "/reset_prefix_cache", {})
    assert first_row(server) == pytest.approx(after, abs=1e-5)
    server.restart()
    assert first_row(server) == pytest.approx(before, abs=1e-5)
    server.faults.keeps_head = True
    reload(server, tmp_path / "new")
    ask(server.url, "/reset_prefix_cache", {})
    assert abs(first_row(server) - after) > 1e-3


def test_an_adapter_is_served_under_its_name(server: FakeServer, model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    body = {"lora_name": "a", "lora_path": str(tmp_path)}
    assert "added" in ask(server.url, "/v1/load_lora_adapter", body)
    assert refused(server.url, "/v1/load_lora_adapter", body)[0] == 400
    ask(server.url, "/v1/load_lora_adapter", body | {"load_inplace": True})
    assert complete(server, model="a")["token_ids"] == greedy(tuned.eval(), IDS, 5)
    assert complete(server)["token_ids"] == greedy(model, IDS, 5)
    assert [m["id"] for m in ask(server.url, "/v1/models")["data"]] == ["m", "a"]
    ask(server.url, "/v1/unload_lora_adapter", {"lora_name": "a"})
    assert refused(server.url, "/v1/completions", {"prompt": IDS, "model": "a"})[0] == 404


def test_a_paused_server_answers_when_it_resumes(server: FakeServer) -> None:
    ask(server.url, "/pause", {})
    asked = threading.Thread(target=complete, args=(server,), daemon=True)
    asked.start()
    asked.join(0.2)
    assert asked.is_alive()
    ask(server.url, "/update_weight_version", {"new_version": "7"})
    ask(server.url, "/resume", {})
    asked.join(10)
    assert not asked.is_alive()
    assert ask(server.url, "/weight_info") == {"weight_version": "7"}


def test_faults(server: FakeServer) -> None:
    server.faults.failing = 1
    assert refused(server.url, "/v1/completions", {"prompt": IDS})[0] == 500
    server.faults.truncated = 1
    with pytest.raises(Exception, match="IncompleteRead"):
        complete(server)
    first = complete(server)
    server.faults.duplicated = 1
    assert complete(server, prompt=[7, 7]) == first
    server.faults.missing_row = True
    assert len(complete(server, prompt_logprobs=0)["prompt_logprobs"]) == len(IDS) - 1
    server.faults.outside = len(word_tokenizer()) + 1
    assert complete(server)["token_ids"][0] == len(word_tokenizer()) + 1
    server.stop()
    with pytest.raises(OSError, match="refused"):
        complete(server)
    server.faults.outside = None
    server.start()
    assert complete(server)["token_ids"] == first["token_ids"]
