"""Door to httpx: requests to model servers by URL, with retries, a deadline, and errors in words.

Every request here may be sent twice: completions carry seeds, and setting weights again sets the same weights. So
whatever may pass (a refused connection, a timeout, a 5xx, half a reply) is tried again, at the next URL where there are
several, until the deadline.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from headstart.errors import ConfigError, ServerError

KEY = "HEADSTART_API_KEY"
"""Environment variable with the API key: never in a configuration, which is written into run folders."""
CONNECT = 10.0
"""Seconds to wait for a connection."""
PAUSES = (0.25, 0.5, 1.0, 2.0, 5.0)
"""Seconds between rounds of tries; the last one repeats."""
IDLE = 5.0
"""Seconds after which a thread without work ends."""
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""


class Client:
    """Requests to one or several replicas of a model server, round robin; safe to use from many threads.

    `timeout` (seconds) is what one try may take, and no try begins `deadline` seconds after the first. `concurrent` is
    how many submitted requests are on their way at once.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float = 60.0,
        deadline: float = 300.0,
        key: str | None = None,
        concurrent: int = 64,
    ) -> None:
        """Raises ConfigError when there is no URL, or one that is not http(s)."""
        self.urls = tuple(url.rstrip("/").removesuffix("/v1") for url in urls)
        bad = [url for url in self.urls if not _usable(url)]
        if bad or not self.urls:
            raise ConfigError(f"server URLs: found {bad or 'none'}; give them as http://host:port")
        self.timeout, self.deadline, self.concurrent = timeout, deadline, concurrent
        key = key or os.environ.get(KEY)
        self._http = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(CONNECT, timeout), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrent),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._turn = itertools.count()
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._workers, self._lock = 0, threading.Lock()
        self._closed = threading.Event()
        self.received = 0
        """Bytes of all replies so far."""

    def post(self, path: str, body: Any, *, url: str | None = None, retry: bool = True) -> Any:
        """The reply to `body` as JSON (what is not said to be JSON stays text), from `url` or the next replica.

        Raises ServerError when the server refuses, or has given no whole reply by the deadline.
        """
        return self._asked("POST", path, body, url, retry)

    def get(self, path: str, *, url: str | None = None) -> Any:
        """Like `post`, without a body."""
        return self._asked("GET", path, None, url, True)

    def each(self, path: str, body: Any) -> list[Any]:
        """The replies of all replicas to `body`, one call each, in the order of `urls`."""
        return [self.post(path, body, url=url) for url in self.urls]

    def submit(self, path: str, body: Any) -> Future[Any]:
        """`post` in another thread. Its threads end with the process, whatever they still wait for."""
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self.post(path, body))
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self._work.put(work)
            if self._workers < self.concurrent:
                self._workers += 1
                threading.Thread(target=self._serve, daemon=True).start()
        return future

    def close(self) -> None:
        """Give up: no further tries."""
        self._closed.set()
        self._http.close()

    def _serve(self) -> None:
        """Do submitted work, and end when there has been none for a while."""
        while True:
            try:
                self._work.get(timeout=IDLE)()
            except Empty:
                with self._lock:
                    if self._work.empty():
                        self._workers -= 1
                        return

    def _asked(self, method: str, path: str, body: Any, url: str | None, retry: bool) -> Any:
        urls = (url,) if url else self.urls
        start, first = time.monotonic(), next(self._turn)
        for tries in itertools.count(1):
            at = urls[(first + tries - 1) % len(urls)]
            try:
                return self._once(method, at, path, body)
            except _Passing as error:
                spent, pause = time.monotonic() - start, 0.0
                if tries % len(urls) == 0:  # all of them failed: another replica needs no pause
                    pause = PAUSES[min(tries // len(urls), len(PAUSES)) - 1]
                if not retry or spent + pause >= self.deadline or self._closed.wait(pause):
                    raise ServerError(
                        f"{method} {at}{path} failed: {error} ({tries} {'try' if tries == 1 else 'tries'} in "
                        f"{spent:.0f} s)",
                        "check that the server runs and can be reached from here; its own log says why it failed",
                        status=error.status,
                    ) from error.__cause__
        raise AssertionError

    def _once(self, method: str, url: str, path: str, body: Any) -> Any:
        try:
            reply = self._http.request(method, url + path, json=body)
        except httpx.TimeoutException as error:
            raise _Passing(f"no reply within {self.timeout:g} s ({type(error).__name__})") from error
        except (httpx.TransportError, httpx.DecodingError, RuntimeError) as error:
            # RuntimeError: the client was closed while this request was on its way.
            raise _Passing(f"{type(error).__name__}: {error}") from error
        self.received += len(reply.content)
        if reply.status_code in TRANSIENT:
            raise _Passing(f"status {reply.status_code}: {_message(reply)}", reply.status_code)
        if not reply.is_success:
            raise ServerError(
                f"{method} {url}{path} was refused with status {reply.status_code}: {_message(reply)}",
                _remedy(reply.status_code),
                status=reply.status_code,
            )
        # vLLM's adapter routes send text without a content type.
        if "json" not in reply.headers.get("content-type", "") or not reply.content:
            return reply.text
        try:
            return json.loads(reply.content, parse_constant=_refuse_constant)
        except _NotFinite as error:
            raise ServerError(
                f"the reply of {url}{path} holds {error}, which is no log-probability",
                "the model's weights or activations are not finite on the server; serve it in bfloat16 or float32",
            ) from error
        except ValueError as error:
            raise _Passing(f"the reply is no JSON ({error}): {reply.text[:80]!r}") from error


def decode_npy(text: Any, url: str) -> npt.NDArray[Any]:
    """The array in a base64 `.npy` file, as vLLM sends one. Raises ServerError when it is none; `url` says whose."""
    try:
        with io.BytesIO(base64.b64decode(text, validate=True)) as buffer:
            array: npt.NDArray[Any] = np.load(buffer, allow_pickle=False)
            return array
    except (TypeError, ValueError, EOFError, binascii.Error) as error:
        raise ServerError(
            f"the reply of {url} holds no array where one was asked for: found {str(text)[:40]!r} ({error})",
            "check that it is vLLM 0.32 or newer",
        ) from error


def _usable(url: str) -> bool:
    """Whether `url` is http(s) with a host and, where it names one, a port."""
    try:
        return httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        return False


class _Passing(Exception):
    """A failure after which the same request may succeed."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class _NotFinite(ValueError):
    """NaN or infinity in JSON."""


def _refuse_constant(text: str) -> Any:
    raise _NotFinite(text)


def _message(reply: httpx.Response) -> str:
    """What the server says is wrong, on one line."""
    try:
        found = reply.json()
        error = found.get("error") or found.get("detail") or found
        text = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = reply.text
    return " ".join(str(text).split())[:300] or reply.reason_phrase


def _remedy(status: int) -> str:
    match status:
        case 401 | 403:
            return f"put the server's key into the environment variable {KEY}, or see which flag opens this route"
        case 404:
            return "check the model's name, and that the server was started with this route (docs: rollout server)"
        case _:
            return "change the request's setting that it names, or how the server was started"
