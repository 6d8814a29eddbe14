"""The student's weights on their way to rollout servers, and the proof that they have arrived.

A server says 200 to a reload that kept its old output head, and answers from a prefix cache of the weights before. So
after every transfer a fixed text is scored there and here, once past the prefix cache and once through it.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from headstart.errors import ConfigError, HeadstartError, ServerError
from headstart.files import atomic_folder
from headstart.models.causal import CausalModel
from headstart.models.export import exportable, save_weights
from headstart.models.lora import save_adapter
from headstart.models.sharded import alone
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt, Rollout
from headstart.serving.client import Client

ADAPTER = "headstart"
"""The name of the student's adapter on a server."""
PROBE_TOKENS, PROBE_STEPS = 160, 8
"""Tokens of the probe text, more than a block of vLLM's prefix cache (16 on a GPU, 128 on a CPU), and tokens greedily
generated after it."""
TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.02, torch.bfloat16: 0.08}
"""Mean difference (nats) between the two log-probabilities of the probe's tokens that rounding explains. A head that
was kept costs about 1, a stale prefix cache about 0.2."""
RESETS = 20
"""Tries to reset a prefix cache, which fails while a request still holds blocks; a quarter of a second between them."""


class WeightSync:
    """Gives every replica the weights of `student` before they are sampled from, as an adapter's folder or a whole
    checkpoint's under `folder`, a path that the servers see too.

    `version` is the label that servers carry now, unlike that of any other run; `name` the model to ask for.
    """

    def __init__(
        self,
        client: Client,
        student: CausalModel,
        runtime: Runtime,
        folder: Path,
        form: Literal["adapter", "checkpoint"],
        prompts: Sequence[Prompt],
        longest: int,
    ) -> None:
        """`longest` is how many tokens prompt and completion have together. Raises ServerError or ConfigError when the
        servers cannot do what will be asked of them."""
        self._client, self._student, self._runtime, self._form = client, student, runtime, form
        self._step: int | None = None
        self.version = ""
        base, context = self._runtime.on_main(lambda: _look(client, longest))
        self.name = ADAPTER if form == "adapter" else base
        self._folder = Path(folder).absolute() / self._runtime.on_main(lambda: f"run-{uuid.uuid4().hex[:12]}")
        room = min(x for x in (context, student.max_positions, PROBE_TOKENS + PROBE_STEPS) if x is not None)
        self._text = probe_text(prompts, max(room - PROBE_STEPS, 2))

    def sync(self, step: int) -> None:
        """See `RolloutEngine.sync`. Raises ServerError where a replica has not taken the weights."""
        if step == self._step:
            return
        path, version = self._folder / f"step-{step:06d}", f"{self._folder.name}/{step}"
        self._write(path)
        replies = self._runtime.on_main(lambda: [self._replace(url, path, version) for url in self._client.urls])
        self._step, self.version = step, version
        with alone(self._student):
            for url, rollouts in zip(self._client.urls, replies, strict=True):
                self._runtime.together(partial(self._compare, url, rollouts))
        if self._runtime.is_main:  # a server may still read the one before when an adapter is evicted and comes back
            for old in sorted(self._folder.glob("step-*"))[:-2]:
                shutil.rmtree(old, ignore_errors=True)

    def check_versions(self) -> None:
        """Raise ServerError when a replica carries another version than the last one it was given."""
        for url in self._client.urls:
            found = self._client.get("/weight_info", url=url)["weight_version"]
            if found != self.version:
                self.refuse_version(found, url)

    def refuse_version(self, found: str, url: str = "a rollout server") -> NoReturn:
        raise ServerError(
            f"{url} samples from weights {found!r}, and this step trains {self.version!r}",
            "it was restarted, or another run gives it weights; with --resume it gets those of the last checkpoint",
        )

    def _write(self, path: Path) -> None:
        """The weights as files, gathered where they are sharded; the folder appears when it is whole."""
        model = exportable(self._student.model, "adapter" if self._form == "adapter" else "merged")
        save = save_adapter if self._form == "adapter" else save_weights

        def write() -> None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with atomic_folder(path) as unfinished:
                    save(model, unfinished)
            except OSError as error:
                raise ServerError(
                    f"the weights cannot be written to {path}: {error}", "free space there, or set rollout.sync_dir"
                ) from error

        self._runtime.on_main(write)

    def _replace(self, url: str, path: Path, version: str) -> list[Rollout]:
        """Replace the weights of one replica; the probe's rollouts from it."""
        if self._step is None and self._form == "checkpoint":
            self._continued(url)  # so that a prefix cache that is not reset shows at the first transfer already
        self._client.post("/pause?mode=wait", {}, url=url)
        try:
            if self._form == "adapter":
                body = {"lora_name": ADAPTER, "lora_path": str(path), "load_inplace": True}
                self._client.post("/v1/load_lora_adapter", body, url=url)
            else:
                body = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
                # vLLM's engine does not outlive a reload that fails, so a second try would wait for a dead server.
                self._client.post("/collective_rpc", body, url=url, retry=False)
            self._reset_cache(url)
            self._client.post("/update_weight_version", {"new_version": version}, url=url)
        except HeadstartError:
            with suppress(ServerError):
                self._client.post("/resume", {}, url=url, retry=False)
            raise
        self._client.post("/resume", {}, url=url)
        return self._probe(url)

    def _reset_cache(self, url: str) -> None:
        for _ in range(RESETS):
            if self._client.post("/reset_prefix_cache", {}, url=url)["success"]:
                return
            time.sleep(0.25)
        raise ServerError(
            f"{url} does not reset its prefix cache, in which other requests hold blocks",
            "let this run alone use the server",
        )

    def _ask(self, url: str, **more: Any) -> Any:
        body = {"model": self.name, "prompt": list(self._text), "temperature": 0.0, "ignore_eos": True, **more}
        return self._client.post("/v1/completions", body, url=url)["choices"][0]

    def _continued(self, url: str) -> Any:
        """The probe text continued greedily. Reads the prefix cache, unlike a request for prompt log-probs."""
        more = {"max_tokens": PROBE_STEPS, "logprobs": 0, "return_token_ids": True}
        return self._ask(url, **more)

    def _probe(self, url: str) -> list[Rollout]:
        """The probe text scored, and continued through the prefix cache: rollouts with engine log-probs."""
        try:
            said = self._continued(url)  # before the text is scored, which would put it into the cache
            rows = self._ask(url, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
            own = [row[str(token)]["logprob"] for row, token in zip(rows[1:], self._text[1:], strict=True)]
            ids, logprobs = said["token_ids"], said["logprobs"]["token_logprobs"]
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise ServerError(
                f"{url} does not score a text of {len(self._text)} tokens as vLLM does ({error!r})",
                "serve with vLLM >= 0.32",
            ) from error
        head, whole = (Prompt(0, "probe", text, text) for text in (self._text[:1], self._text))
        # An id beyond the vocabulary has no log-probability here; the rollouts' own check refuses it.
        kept = [token for token in ids if token < self._student.vocabulary][: len(logprobs)]
        return [
            Rollout(head, 0, self._text[1:], False, engine_logprobs=np.array(own)),
            Rollout(whole, 0, tuple(kept), False, engine_logprobs=np.array(logprobs[: len(kept)])),
        ]

    def _compare(self, url: str, rollouts: Sequence[Rollout]) -> None:
        """Raise ServerError when the engine's log-probabilities are not the trainer's."""
        dtype = self._student.dtype
        tolerance = TOLERANCE[dtype]
        for way, rollout in zip(("scores", "samples"), rollouts, strict=True):
            if not rollout.completion_ids:
                continue
            gap = np.abs(self._student.logprobs([rollout]).cpu().numpy() - rollout.engine_logprobs).mean()
            if not gap <= tolerance:
                raise ServerError(
                    f"{url} {way} with other weights than it was given: its log-probabilities of a fixed text are "
                    f"{gap:.3g} nats from the trainer's on average ({str(dtype).removeprefix('torch.')} explains "
                    f"{tolerance:g})",
                    "it kept its old output head (tied embeddings on a CPU), a stale prefix cache, or serves another "
                    "base model or precision: see docs/how-to/rollout-server.md",
                )


def probe_text(prompts: Sequence[Prompt], length: int) -> tuple[int, ...]:
    """`length` token ids from the prompts, one after the other and again from the first."""
    ids = [token for prompt in prompts[:length] for token in prompt.token_ids]
    return tuple((ids * (length // max(len(ids), 1) + 1))[:length])


def _look(client: Client, longest: int) -> tuple[str, int | None]:
    """The base model's name, the same on all replicas, and the smallest context among them."""
    names: set[str] = set()
    contexts: list[int | None] = []
    for url in client.urls:
        models: list[dict[str, Any]] = client.get("/v1/models", url=url)["data"]
        base = next((model for model in models if not model.get("parent")), {})
        names.add(str(base.get("id")))
        contexts.append(base.get("max_model_len"))
        client.get("/weight_info", url=url)  # one of the routes that only a server in dev mode has
    if len(names) != 1:
        raise ConfigError(f"rollout.urls: the replicas serve different models ({', '.join(sorted(names))}); serve one")
    context = min((c for c in contexts if c), default=None)
    if context is not None and longest > context:
        raise ConfigError(
            f"rollout.urls: the servers take {context:,} tokens (max_model_len), but the longest prompt and response "
            f"have {longest:,}; serve with --max-model-len {longest} or more, or shorten them"
        )
    return names.pop(), context
