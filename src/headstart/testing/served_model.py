"""What a FakeServer computes: vLLM's replies to completion, scoring and weight requests, from a transformers model."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headstart.models.quiet import quiet
from headstart.records import Sampling
from headstart.rollout.sampling import sample_tokens

Level = Literal["per_row", "top_k", "sampled"]
FLOOR = -9999.0
"""What vLLM sends in JSON for a log-probability of minus infinity."""


class Refused(Exception):
    """A request that gets an error reply; `args` are the HTTP status and the message."""


@dataclass(slots=True)
class Faults:
    """What a FakeServer does wrong; may be changed while it runs. The first four count requests: each such reply takes
    one off. They spare GET requests."""

    failing: int = 0
    """Replies with status 500."""
    hanging: int = 0
    """Requests that get no reply until the server closes."""
    truncated: int = 0
    """Replies that end in the middle of their body."""
    duplicated: int = 0
    """Completion requests that get the reply of the one before."""
    slow: float = 0.0
    """Seconds before every reply."""
    nan: bool = False
    """Log-probabilities are NaN."""
    missing_row: bool = False
    """The last row of prompt log-probabilities is left out."""
    stale_version: bool = False
    """Replies carry the weight version `default` whatever was set."""
    stale_cache: bool = False
    """`/reset_prefix_cache` claims success and does nothing."""
    keeps_head: bool = False
    """A reload keeps the old output head, as vLLM's CPU build does for tied embeddings."""
    ignores_weights: bool = False
    """A reload or an adapter claims success and changes nothing."""
    outside: int | None = None
    """An id that every completion starts with, such as one beyond the tokenizer."""


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled ids, the raw log-probabilities `[n, V]` they were sampled from, and vLLM's words for how it ended."""

    ids: list[int]
    logprobs_NV: Tensor
    finish_reason: str
    stop_reason: int | None


@dataclass(slots=True)
class ServedModel:
    """A model with vLLM's state around it: adapters by name, a weight version, and a prefix cache that outlives the
    weights it was made with until it is reset. Holds copies: training the original changes nothing here."""

    original: Any
    tokenizer: Any
    name: str
    level: Level
    max_model_len: int
    max_logprobs: int
    faults: Faults
    base: Any = field(init=False)
    adapters: dict[str, tuple[str, Any]] = field(init=False)
    version: str = field(init=False)
    prefixes: dict[tuple[str, str, tuple[int, ...]], Any] = field(init=False)

    def __post_init__(self) -> None:
        self.original = copy.deepcopy(self.original).eval().requires_grad_(False)
        self.restart()

    def restart(self) -> None:
        """Back to the weights the server was started with, without adapters, versions and caches."""
        self.base, self.adapters, self.version, self.prefixes = self.original, {}, "default", {}

    def served(self, name: str | None) -> Any:
        """The model that goes by `name`; the base model without one."""
        if name in (None, self.name):
            return self.base
        if name not in self.adapters:
            raise Refused(404, f"The model `{name}` does not exist.")
        return self.adapters[name][1]

    # --- weights ---

    def load_adapter(self, body: Mapping[str, Any]) -> str:
        """`/v1/load_lora_adapter`: a peft folder on the base model."""
        from peft import PeftModel

        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters and not body.get("load_inplace"):
            raise Refused(400, f"The lora adapter '{name}' has already been loaded. Set 'load_inplace' to True.")
        if not (Path(path) / "adapter_model.safetensors").exists():
            raise Refused(404, f"No adapter found for {path}")
        if not (self.faults.ignores_weights and name in self.adapters):
            with quiet():
                self.adapters[name] = (path, PeftModel.from_pretrained(copy.deepcopy(self.base), path).eval())
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload_adapter(self, name: str) -> str:
        if self.adapters.pop(name, None) is None:
            raise Refused(404, f"The lora adapter '{name}' cannot be found.")
        return f"Success: LoRA adapter '{name}' removed successfully."

    def reload(self, path: str) -> None:
        """`reload_weights` from a complete safetensors checkpoint; the prefix cache stays as it was."""
        if not any(Path(path).glob("*.safetensors")):
            raise Refused(500, f"Cannot find any model weights with `{path}`")
        if self.faults.ignores_weights:
            return
        with quiet():
            new = type(self.base).from_pretrained(path, dtype=self.base.dtype).eval().requires_grad_(False)
        if self.faults.keeps_head:
            new.set_output_embeddings(copy.deepcopy(self.base.get_output_embeddings()))
        self.base = new

    def reset_cache(self) -> None:
        if not self.faults.stale_cache:
            self.prefixes.clear()

    # --- tokens ---

    @torch.no_grad()
    def complete(self, name: str | None, ids: list[int], params: Mapping[str, Any], limit: int) -> Completion:
        """Up to `limit` tokens after `ids`; of a prefix seen before only the last token is computed again."""
        model, rng = self.served(name), np.random.default_rng(params.get("seed"))
        defaults: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        sampling = Sampling(**{k: x if params.get(k) is None else params[k] for k, x in defaults.items()})
        stops = set(params.get("stop_token_ids") or ())
        if not params.get("ignore_eos"):
            eos = model.generation_config.eos_token_id
            stops |= set(eos if isinstance(eos, list) else [eos])
        past, last = self._prefix(name or self.name, model, ids), ids[-1]
        out: list[int] = []
        rows: list[Tensor] = []
        while len(out) < limit:
            made = model(torch.tensor([[last]]), past_key_values=past, use_cache=True)
            past, logits_1V = made.past_key_values, made.logits[:, -1].float()
            rows.append(logits_1V.log_softmax(-1))
            for token, bias in (params.get("logit_bias") or {}).items():
                logits_1V[0, int(token)] += bias
            last = int(sample_tokens(logits_1V, torch.tensor([rng.random()], dtype=torch.float64), sampling)[0])
            last = last if out or self.faults.outside is None else self.faults.outside
            out.append(last)
            if last in stops:
                break
        stopped = bool(out) and out[-1] in stops
        rows_NV = torch.cat(rows) if rows else torch.zeros(0, model.config.vocab_size)
        return Completion(out, rows_NV, "stop" if stopped else "length", out[-1] if stopped else None)

    def _prefix(self, name: str, model: Any, ids: list[int]) -> Any:
        """The key-value cache of all but the last token, kept by the adapter's name and path as vLLM does."""
        key = (name, self.adapters.get(name, ("",))[0], tuple(ids[:-1]))
        if len(ids) > 1 and key not in self.prefixes:
            self.prefixes[key] = model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
        return copy.deepcopy(self.prefixes.get(key))

    @torch.no_grad()
    def score(self, name: str | None, ids: list[int]) -> Tensor:
        """Log-probabilities `[len(ids) - 1, V]`: row i predicts token i + 1. The prefix cache is not read."""
        logits_TV: Tensor = self.served(name)(torch.tensor([ids])).logits[0, :-1]
        return logits_TV.float().log_softmax(-1)

    def check(self, ids: Any, limit: int) -> list[int]:
        """`ids` as a prompt. Raises Refused as vLLM does."""
        rows = len(self.base.get_input_embeddings().weight)
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise Refused(400, "Either prompt or prompt_embeds must be provided and non-empty.")
        if not all(0 <= i < rows for i in ids):
            raise Refused(400, f"Token id {max(ids)} is out of vocabulary")
        if len(ids) + limit > self.max_model_len:
            raise Refused(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        return ids

    def wanted(self, count: int | None, what: str) -> int | None:
        """`count` log-probabilities, -1 for all of them. Raises Refused above `max_logprobs`."""
        if count is None:
            return None
        rows = int(self.base.config.vocab_size)
        count = rows if count == -1 else count
        if self.max_logprobs != -1 and count > self.max_logprobs:
            raise Refused(400, f"Requested {what} of {count}, which is greater than max allowed: {self.max_logprobs}")
        return min(count, rows)

    # --- replies ---

    def ranked(self, row_V: Tensor, token: int, k: int) -> list[tuple[int, float, int]]:
        """(id, log-probability, rank) of `token`, then of the k most probable ids."""
        top = row_V.topk(k)
        pairs = [(token, float(row_V[token])), *zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        rank = 1 + int((row_V > row_V[token]).sum())
        ranks = [rank, *range(1, k + 1)]
        unique = {i: (i, self._sent(x), r) for (i, x), r in reversed([*zip(pairs, ranks, strict=True)])}
        return [unique[i] for i in dict.fromkeys(i for i, _ in pairs)]

    def _sent(self, value: float) -> float:
        return float("nan") if self.faults.nan else max(value, FLOOR)

    def prompt_logprobs(self, name: str | None, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: nothing for the first token, then the actual one and the k most probable."""
        found: list[dict[str, Any] | None] = [None]
        for row_V, token in zip(self.score(name, ids), ids[1:], strict=True):
            ranked = self.ranked(row_V, token, k)
            found.append({str(i): {"logprob": x, "rank": r, "decoded_token": self._text(i)} for i, x, r in ranked})
        return found[:-1] if self.faults.missing_row else found

    def per_row(self, name: str | None, ids: list[int], rows: Sequence[Sequence[int]], start: int) -> str:
        """vLLM's `prompt_token_id_logprobs`: base64 of a float32 `.npy` `[rows, K]`."""
        if len(rows) != len(ids) - 1 - start:
            raise Refused(400, f"prompt_logprob_token_ids has {len(rows)} rows, the prompt {len(ids) - 1 - start}")
        wide = max(map(len, rows))
        self.wanted(wide, "token ids per row")
        ids_RK = torch.tensor([[*row, *[-1] * (wide - len(row))] for row in rows])
        found_RK = self.score(name, ids)[start:].gather(-1, ids_RK.clamp_min(0)).masked_fill(ids_RK < 0, -torch.inf)
        found_RK = torch.full_like(found_RK, torch.nan) if self.faults.nan else found_RK
        buffer = io.BytesIO()
        np.save(buffer, found_RK[: len(rows) - self.faults.missing_row].numpy(), allow_pickle=False)
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    def versions(self, made: Completion) -> list[dict[str, Any]]:
        version = "default" if self.faults.stale_version else self.version
        return [{"version": version, "start": 0, "end": len(made.ids)}]

    def openai_logprobs(
        self, ids: list[int], rows: Sequence[Tensor | None], k: int, as_ids: bool
    ) -> dict[str, list[Any]]:
        """The `logprobs` object of `/v1/completions`; a row of None (the first of an echo) has none."""
        say: Callable[[int], str] = (lambda i: f"token_id:{i}") if as_ids else self._text
        ranked = [None if row is None else self.ranked(row, i, k) for i, row in zip(ids, rows, strict=True)]
        return {
            "tokens": [say(i) for i in ids],
            "token_logprobs": [None if r is None else r[0][1] for r in ranked],
            "top_logprobs": [None if r is None else {say(i): x for i, x, _ in r} for r in ranked],
            "text_offset": [0] * len(ids),
        }

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token])) if token < len(self.tokenizer) else ""
