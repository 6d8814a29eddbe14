"""A fake vLLM server on this machine: vLLM's protocol, answered by a transformers model on the CPU.

For tests of whatever talks to vLLM, without vLLM: the replies have its fields, its limits and its known traps, and
`Faults` adds what networks and servers do.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from headstart.testing.served_model import Completion, Faults, Level, Refused, ServedModel

__all__ = ["FakeServer", "Faults"]


class FakeServer:
    """`with FakeServer(model, tokenizer, name="m") as url:` serves `model` at `url` until the block ends.

    `level` is what the endpoint can give of a prompt: log-probabilities of ids chosen for each row (`per_row`), of the
    top k (`top_k`, an engine without the V2 model runner), or of the token that stands there (`sampled`: an
    OpenAI-style endpoint with `echo`, none of vLLM's other routes). `requests` holds (method, path, body) of all that
    came. `key` is the API key it asks for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "m",
        level: Level = "per_row",
        faults: Faults | None = None,
        max_model_len: int = 512,
        max_logprobs: int = 20,
        key: str | None = None,
    ) -> None:
        self.faults, self.key = faults or Faults(), key
        self.served = ServedModel(model, tokenizer, name, level, max_model_len, max_logprobs, self.faults)
        self.requests: list[tuple[str, str, Any]] = []
        self.last: dict[str, Any] = {}
        self.running, self.closing = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self.running.set()
        self._http: _Listener | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> str:
        """Listen (again), at the same URL as before; returns it."""
        self.closing.clear()
        self._http = _Listener(("127.0.0.1", self._port), _handler_of(self))
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self.url

    def stop(self) -> None:
        """Refuse connections from now on; the weights stay."""
        if self._http is not None:
            self.closing.set()
            self._http.shutdown()
            self._http.server_close()
            self._http.hang_up()
            self._http = None

    def restart(self) -> None:
        """What a process that died and was started again has: the weights it was first started with."""
        self.served.restart()
        self.running.set()

    def __enter__(self) -> str:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def asked(self, path: str) -> list[Any]:
        """The bodies of all requests to `path` so far."""
        return [body for _, to, body in self.requests if to == path]

    # --- replies ---

    def get(self, path: str) -> Any:
        """The reply to a GET request; None is an empty body."""
        served = self.served
        match path:
            case "/health":
                return None
            case "/v1/models":
                own: dict[str, Any] = {"id": served.name, "object": "model", "root": served.name, "parent": None}
                own |= {} if served.level == "sampled" else {"max_model_len": served.max_model_len}
                loaded = [{"id": n, "root": at, "parent": served.name} for n, (at, _) in served.adapters.items()]
                return {"object": "list", "data": [own, *loaded]}
            case "/version" if served.level != "sampled":
                return {"version": "0.33.0"}
            case "/weight_info" if served.level != "sampled":
                return {"weight_version": served.version}
            case "/is_paused" if served.level != "sampled":
                return {"is_paused": not self.running.is_set()}
        raise Refused(404, "Not Found")

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The reply to a POST request: JSON, or text as it is."""
        match path:
            case "/v1/completions":
                return self._once(lambda: self._completions(body))
            case _ if self.served.level == "sampled":
                raise Refused(404, "Not Found")
            case "/inference/v1/generate":
                return self._once(lambda: self._generate(body))
            case "/tokenize":
                ids = self.served.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
                return {"count": len(ids), "max_model_len": self.served.max_model_len, "tokens": list(ids)}
        with self.lock:
            return self._weights(path, body)

    def _once(self, answer: Any) -> dict[str, Any]:
        """The reply to a completion request, or the one before (a fault). Requests wait while the server is paused."""
        while not self.running.wait(0.02):
            if self.closing.is_set():
                raise Refused(503, "the engine is paused")
        with self.lock:
            if self.faults.duplicated > 0 and self.last:
                self.faults.duplicated -= 1
            else:
                self.last = answer()
            return self.last

    def _weights(self, path: str, body: Mapping[str, Any]) -> Any:
        served = self.served
        match path:
            case "/v1/load_lora_adapter":
                return served.load_adapter(body)
            case "/v1/unload_lora_adapter":
                return served.unload_adapter(body["lora_name"])
            case "/pause":
                self.running.clear()
                return {"status": "paused"}
            case "/resume":
                self.running.set()
                return {"status": "resumed"}
            case "/reset_prefix_cache":
                served.reset_cache()
                return {"success": True}
            case "/update_weight_version":
                served.version = body["new_version"]
                return {"success": True, "new_version": served.version}
            case "/collective_rpc":
                if body.get("method") != "reload_weights":
                    raise Refused(500, f"no method {body.get('method')}")
                served.reload(body["kwargs"]["weights_path"])
                return {"results": [None]}
        raise Refused(404, "Not Found")

    def _completions(self, body: Mapping[str, Any]) -> dict[str, Any]:
        served, prompts = self.served, body.get("prompt")
        batch = prompts if isinstance(prompts, list) and prompts and isinstance(prompts[0], list) else [prompts]
        choices = [self._choice(body, ids, index) for index, ids in enumerate(batch)]
        return {"object": "text_completion", "model": body.get("model", served.name), "choices": choices}

    def _choice(self, body: Mapping[str, Any], prompt: Any, index: int) -> dict[str, Any]:
        served, limit, echo = self.served, body.get("max_tokens", 16), bool(body.get("echo"))
        if limit < 1 and not echo:
            raise Refused(400, f"max_tokens must be at least 1, got {limit}.")
        ids, name = served.check(prompt, limit), body.get("model")
        count, k = served.wanted(body.get("logprobs"), "logprobs"), None
        if served.level != "sampled":
            k = served.wanted(body.get("prompt_logprobs"), "prompt logprobs")
        made = served.complete(name, ids, body, limit)
        shown, rows = made.ids, list(made.logprobs_NV)
        if echo:
            scored = [*served.score(name, ids)] if count is not None else [None] * (len(ids) - 1)
            shown, rows = [*ids, *made.ids], [None, *scored, *rows]
        choice: dict[str, Any] = {
            "index": index,
            "text": served.tokenizer.decode(shown),
            "finish_reason": made.finish_reason,
            "stop_reason": made.stop_reason,
            "logprobs": None,
        }
        if count is not None:
            as_ids = bool(body.get("return_tokens_as_token_ids"))
            choice["logprobs"] = served.openai_logprobs(shown, rows, count, as_ids)
        if served.level == "sampled":
            return choice
        if k is not None:
            choice["prompt_logprobs"] = served.prompt_logprobs(name, ids, k)
        if body.get("return_token_ids"):
            choice |= {"token_ids": made.ids, "prompt_token_ids": ids}
        if body.get("return_weight_versions"):
            choice["weight_versions"] = served.versions(made)
        return choice

    def _generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        served, params = self.served, body["sampling_params"]
        limit = params.get("max_tokens") or served.max_model_len - len(body["token_ids"])
        ids, name, rows = (
            served.check(body["token_ids"], limit),
            body.get("model"),
            params.get("prompt_logprob_token_ids"),
        )
        if rows is not None and served.level != "per_row":
            raise Refused(400, "prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1).")
        k = served.wanted(params.get("prompt_logprobs"), "prompt logprobs")
        made, start = served.complete(name, ids, params, limit), params.get("prompt_logprob_start") or 0
        return {
            "model": name or served.name,
            "prompt_logprobs": None if k is None else served.prompt_logprobs(name, ids, k),
            "prompt_token_id_logprobs": None if rows is None else served.per_row(name, ids, rows, start),
            "prompt_token_ids": ids if body.get("return_token_ids") else None,
            "choices": [self._generated(made, served.wanted(params.get("logprobs"), "logprobs"))],
        }

    def _generated(self, made: Completion, count: int | None) -> dict[str, Any]:
        content = None
        if count is not None:
            ranked = [
                self.served.ranked(row_V, token, count) for token, row_V in zip(made.ids, made.logprobs_NV, strict=True)
            ]
            named = [[{"token_id": i, "logprob": x, "rank": r} for i, x, r in row] for row in ranked]
            content = {"content": [{**row[0], "top_logprobs": row} for row in named]}
        return {
            "index": 0,
            "token_ids": made.ids,
            "logprobs": content,
            "finish_reason": made.finish_reason,
            "stop_reason": made.stop_reason,
            "weight_versions": self.served.versions(made),
        }


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*args)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def hang_up(self) -> None:
        """End the connections that clients keep open."""
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news in a test."""


def _handler_of(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer("GET", None)

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer("POST", json.loads(raw) if raw else {})

        def _answer(self, method: str, body: Any) -> None:
            path, faults = urlsplit(self.path).path, server.faults
            server.requests.append((method, path, body))
            time.sleep(faults.slow)
            if method == "POST" and faults.hanging > 0:
                faults.hanging -= 1
                server.closing.wait()
            if method == "POST" and faults.failing > 0:
                faults.failing -= 1
                return self._send(500, {"error": {"message": "EngineCore encountered an issue", "code": 500}})
            if server.key and path.startswith(("/v1", "/inference")) and not self._knows_key():
                return self._send(401, {"error": "Unauthorized"})
            try:
                reply = server.get(path) if method == "GET" else server.post(path, body)
            except Refused as error:
                status, message = error.args
                kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "InternalServerError")
                return self._send(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})
            return self._send(200, reply, cut=method == "POST" and faults.truncated > 0)

        def _knows_key(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {server.key}"

        def _send(self, status: int, reply: Any, cut: bool = False) -> None:
            text = reply if isinstance(reply, str) else "" if reply is None else json.dumps(reply)
            data = text.encode()
            self.send_response(status)
            if not isinstance(reply, str):  # vLLM does not say what kind its texts are
                self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if cut:
                server.faults.truncated -= 1
                self.close_connection = True
            self.wfile.write(data[: len(data) // 2] if cut else data)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are kept in `FakeServer.requests`, not printed."""

    return Handler
