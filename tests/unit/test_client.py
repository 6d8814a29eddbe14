"""Requests to model servers: retries, a deadline, round robin, and errors that say what to do."""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from headstart.errors import ConfigError, ServerError
from headstart.serving import client as client_module
from headstart.serving.client import Client, decode_npy
from headstart.testing import FakeServer, random_model, word_tokenizer

BODY = {"model": "m", "prompt": [6, 7], "max_tokens": 2, "temperature": 0, "logprobs": 0, "return_token_ids": True}


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PAUSES", (0.01, 0.02))


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama", len(word_tokenizer()), seed=3)


@pytest.fixture
def servers(model: Any) -> Iterator[list[FakeServer]]:
    made = [FakeServer(model, word_tokenizer()) for _ in range(2)]
    for server in made:
        server.start()
    yield made
    for server in made:
        server.stop()


def ids(reply: Any) -> list[int]:
    return list(reply["choices"][0]["token_ids"])


def test_requests_go_round(servers: list[FakeServer]) -> None:
    client = Client([server.url + "/v1/" for server in servers])
    replies = [client.post("/v1/completions", BODY) for _ in range(6)]
    assert [len(server.asked("/v1/completions")) for server in servers] == [3, 3]
    assert len({tuple(ids(reply)) for reply in replies}) == 1
    assert client.get("/health", url=servers[1].url) == ""
    assert client.get("/version")["version"]
    assert [reply["status"] for reply in client.each("/pause", {})] == ["paused", "paused"]
    assert [len(server.asked("/pause")) for server in servers] == [1, 1]


def test_what_may_pass_is_tried_again_elsewhere(servers: list[FakeServer]) -> None:
    client, want = Client([server.url for server in servers]), None
    for fault in ("failing", "truncated"):
        setattr(servers[0].faults, fault, 1)
        found = [ids(client.post("/v1/completions", BODY)) for _ in range(2)]
        assert getattr(servers[0].faults, fault) == 0
        assert found[0] == found[1] == (want or found[0])
        want = found[0]
    servers[0].stop()
    assert [ids(client.post("/v1/completions", BODY)) for _ in range(4)] == [want] * 4


def test_one_server_is_tried_until_it_is_back(servers: list[FakeServer]) -> None:
    client = Client([servers[0].url], deadline=20)
    want = ids(client.post("/v1/completions", BODY))
    servers[0].stop()
    waiting = client.submit("/v1/completions", BODY)
    time.sleep(0.1)
    assert not waiting.done()
    servers[0].start()
    assert ids(waiting.result(10)) == want


def test_a_server_that_is_down_ends_at_the_deadline_in_words(servers: list[FakeServer]) -> None:
    client = Client([servers[0].url], deadline=0.1)
    servers[0].stop()
    with pytest.raises(ServerError, match=re.escape(f"POST {servers[0].url}/v1/completions failed: ConnectError")) as e:
        client.post("/v1/completions", BODY)
    assert "tries" in str(e.value)
    assert "check that the server runs" in str(e.value)


def test_a_server_that_hangs_is_left_after_the_timeout(servers: list[FakeServer]) -> None:
    servers[0].faults.hanging = 1
    client = Client([server.url for server in servers], timeout=0.3)
    start = time.monotonic()
    assert ids(client.post("/v1/completions", BODY))
    assert 0.25 < time.monotonic() - start < 5
    servers[0].faults.hanging = 1
    with pytest.raises(ServerError, match=r"no reply within 0.3 s \(ReadTimeout\) \(1 try"):
        client.post("/v1/completions", BODY, url=servers[0].url, retry=False)


def test_a_slow_server_is_waited_for(servers: list[FakeServer]) -> None:
    servers[0].faults.slow = 0.3
    assert ids(Client([servers[0].url], timeout=5).post("/v1/completions", BODY))
    assert len(servers[0].asked("/v1/completions")) == 1


def test_a_500_without_end_says_what_the_server_said(servers: list[FakeServer]) -> None:
    servers[0].faults.failing = 1000
    with pytest.raises(ServerError, match="status 500: EngineCore encountered an issue") as error:
        Client([servers[0].url], deadline=0.1).post("/v1/completions", BODY)
    assert error.value.status == 500


def test_a_refusal_is_not_tried_again(servers: list[FakeServer]) -> None:
    with pytest.raises(ServerError, match=r"refused with status 404: The model `x` does not exist\.; check the") as e:
        Client([servers[0].url]).post("/v1/completions", BODY | {"model": "x"})
    assert e.value.status == 404
    assert len(servers[0].asked("/v1/completions")) == 1


def test_nan_is_no_log_probability(servers: list[FakeServer]) -> None:
    servers[0].faults.nan = True
    with pytest.raises(ServerError, match="holds NaN, which is no log-probability"):
        Client([servers[0].url]).post("/v1/completions", BODY)


def test_the_key_comes_from_the_environment(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer(model, word_tokenizer(), key="secret") as url:
        with pytest.raises(ServerError, match=r"401: Unauthorized; put the server's key into .* HEADSTART_API_KEY"):
            Client([url]).post("/v1/completions", BODY)
        monkeypatch.setenv("HEADSTART_API_KEY", "secret")
        assert ids(Client([url]).post("/v1/completions", BODY))


def test_submitted_requests_overlap_and_a_closed_client_gives_up(servers: list[FakeServer]) -> None:
    client = Client([servers[0].url], concurrent=8)
    servers[0].faults.slow = 0.3
    start = time.monotonic()
    futures = [client.submit("/v1/completions", BODY) for _ in range(8)]
    assert len({tuple(ids(f.result(10))) for f in futures}) == 1
    assert time.monotonic() - start < 8 * 0.3
    servers[0].stop()
    waiting = client.submit("/v1/completions", BODY)
    client.close()
    assert isinstance(waiting.exception(10), ServerError)


def test_threads_without_work_end_and_come_back(servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "IDLE", 0.05)
    client = Client([servers[0].url], concurrent=4)
    for _ in range(3):
        futures = [client.submit("/v1/completions", BODY) for _ in range(6)]
        assert len({tuple(ids(f.result(10))) for f in futures}) == 1
        deadline = time.monotonic() + 5
        while client._workers and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client._workers == 0


@pytest.mark.parametrize("urls", [(), ("localhost:8000",), ("http://ok", "ftp://no")])
def test_urls_that_are_none(urls: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="give them as http"):
        Client(urls)


def test_arrays_travel_as_npy() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[1.5, -np.inf]], dtype=np.float32))
    text = base64.b64encode(buffer.getvalue()).decode()
    np.testing.assert_array_equal(decode_npy(text, "u"), [[1.5, -np.inf]])
    for broken in (None, "", "!!", text[:40], base64.b64encode(b"no array").decode()):
        with pytest.raises(ServerError, match="the reply of u holds no array"):
            decode_npy(broken, "u")
