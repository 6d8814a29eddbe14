"""The in-process rollout engine: batched sampling with a key-value cache, from the very weights that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headstart.models.causal import CausalModel
from headstart.numerics.sampling import sample_tokens
from headstart.numerics.streams import uniforms
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout.cache import reserving_cache


class InProcessEngine:
    """Samples from `model`; a rollout ends at a stop token (kept in the completion) or at its horizon.

    Each prompt is encoded once for all its samples. Finished rows leave the batch once half of it has finished.
    """

    def __init__(self, model: CausalModel, stop_ids: Sequence[int]) -> None:
        self.model = model
        self._stop_set = frozenset(stop_ids)
        self._stop_ids = torch.tensor(sorted(stop_ids), device=model.device)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int,
        sampling: Sampling,
        key: tuple[int, str, int],
        batch_size: int | None = None,
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        group = max(1, (batch_size or len(prompts) * samples) // samples)
        rollouts: list[Rollout] = []
        with self.model.sampling_mode():
            for start in range(0, len(prompts), group):
                part = prompts[start : start + group]
                rows = [(p, s) for p in part for s in range(samples)]
                uniform_BN = torch.from_numpy(uniforms(key, [(p.index, s) for p, s in rows], 0, max_tokens))
                completions = self._decode(part, samples, uniform_BN.to(self.model.device), sampling)
                for (prompt, sample), ids in zip(rows, completions, strict=True):
                    rollouts.append(Rollout(prompt, sample, tuple(ids), stopped=ids[-1] in self._stop_set))
        return rollouts

    def _decode(
        self, prompts: Sequence[Prompt], samples: int, uniform_BN: Tensor, sampling: Sampling
    ) -> list[list[int]]:
        """Completions of `samples` rows per prompt, prompt-major; row b draws its token t with `uniform_BN[b, t]`."""
        state = _Decoding.prefill(self.model, prompts, samples)
        B, N = uniform_BN.shape
        token_BN = torch.zeros((B, N), dtype=torch.int64, device=self.model.device)
        length_B = torch.full((B,), N, dtype=torch.int64, device=self.model.device)
        alive = torch.arange(B, device=self.model.device)
        for t in range(N):
            token = sample_tokens(state.logits, uniform_BN[alive, t], sampling)
            # Rows that finished earlier but have not left the batch yet keep drawing; their length is already fixed.
            token_BN[alive, t] = token
            stopped = torch.isin(token, self._stop_ids)
            length_B[alive] = torch.where(stopped & (length_B[alive] == N), t + 1, length_B[alive])
            running = length_B[alive] == N
            left = int(running.sum())
            if left == 0 or t == N - 1:
                break
            if left <= len(alive) // 2:
                keep = running.nonzero()[:, 0]
                state.select(keep)
                alive, token = alive[keep], token[keep]
            state.step(self.model, token)
        return [token_BN[b, :n].tolist() for b, n in enumerate(length_B.tolist())]


class _Decoding:
    """Cache, masks and next-token logits of the rows still in the batch."""

    def __init__(self, cache: Any, mask_BT: Tensor, logits_BV: Tensor) -> None:
        self._cache = cache
        self._mask_BT = mask_BT
        self.logits = logits_BV

    @classmethod
    def prefill(cls, model: CausalModel, prompts: Sequence[Prompt], samples: int) -> _Decoding:
        P = max(len(p.token_ids) for p in prompts)
        ids = torch.full((len(prompts), P), model.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(prompts), P), dtype=torch.int64)
        for b, prompt in enumerate(prompts):
            ids[b, P - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[b, P - len(prompt.token_ids) :] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        cache = reserving_cache(model.backbone.config)
        output = model.backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
        )
        logits = model.head(output.last_hidden_state[:, -1])
        if samples > 1:
            cache.batch_repeat_interleave(samples)
            mask, logits = mask.repeat_interleave(samples, dim=0), logits.repeat_interleave(samples, dim=0)
        return cls(cache, mask, logits)

    def select(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask_BT = self._mask_BT[rows]

    def step(self, model: CausalModel, token_B: Tensor) -> None:
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._mask_BT[:, :1])], dim=1)
        output = model.backbone(
            input_ids=token_B[:, None],
            attention_mask=self._mask_BT,
            position_ids=self._mask_BT.sum(dim=1, keepdim=True) - 1,
            past_key_values=self._cache,
            use_cache=True,
        )
        self.logits = model.head(output.last_hidden_state[:, -1])
