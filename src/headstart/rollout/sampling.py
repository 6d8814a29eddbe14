"""Drawing the next token: exact inverse-CDF sampling with temperature, top-k and top-p.

A row's token depends on that row's logits and its own uniform number only, never on the rows beside it. Two doors to
the same tokens: `sample_tokens` looks at the numbers on its way, which is quick on a CPU, and `draw_tokens` never lets
the host wait for the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from headstart.errors import NonFiniteError
from headstart.records import Sampling

# Nucleus candidates looked at before a full sort: of 16 x 151,936 logits they take 1.6 ms on one CPU core and the full
# sort 12 ms; language models at top-p 0.95 rarely need more, near-uniform ones always do.
_CANDIDATES = 1024
# Ids summed at once: a running sum over 151,936 ids takes three times as long as their exponentials on a CPU, and on a
# GPU it is a scan of a whole row by few threads.
_BLOCK = 64


@torch.no_grad()
def sample_tokens(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """One token id per row, int64 `[B]`, drawn with the uniform numbers `uniform_B` (float64, in [0, 1)).

    Temperature first, then top-k (every token at least as probable as the k-th stays, so ties with it stay too), then
    top-p: the smallest set of most probable tokens with mass >= top_p, ties taken in order of id, never empty.
    Temperature 0 is the most probable token, the lowest id among ties. The token is the first id whose cumulative
    probability (float64, over the ids that stayed, in order of id) exceeds the uniform number, so an id of probability
    zero is never drawn. Raises NonFiniteError on a row with NaN, +inf, or nothing but -inf.
    """
    logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    peak_B1 = require_finite(logits_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = _top_k(logits_BV, sampling.top_k)
    mass_BV = _mass(logits_BV, peak_B1, sampling.temperature)
    if sampling.top_p < 1:
        need_B1 = sampling.top_p * _sums(_blocks(mass_BV))[:, -1:]
        mass_BV.masked_fill_(~_nucleus(logits_BV, peak_B1, need_B1, sampling.temperature), 0.0)
    token_B1, alive_B1 = _inverted(mass_BV, uniform_B)
    if not bool(alive_B1.all()):
        token_B1 = torch.where(alive_B1, token_B1, mass_BV.argmax(-1, keepdim=True))
    return token_B1.squeeze(-1)


@torch.no_grad()
def draw_tokens(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling, *, complete: bool) -> tuple[Tensor, Tensor]:
    """The tokens of `sample_tokens` without a look at the device, and whether each row has one: int64, bool `[B]`.

    A row has none when its logits are not finite or, unless the draw is `complete`, when more ids are needed for top-p
    than are looked at before a full sort; what stands in its place is some id.
    """
    logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    peak_B1 = logits_BV.amax(-1, keepdim=True)
    drawn_B1 = peak_B1.isfinite()
    if sampling.temperature == 0:
        return logits_BV.argmax(-1), drawn_B1.squeeze(-1)
    logits_BV = _top_k(logits_BV, sampling.top_k)
    mass_BV = _mass(logits_BV, peak_B1, sampling.temperature)
    if sampling.top_p < 1:
        V = logits_BV.shape[-1]
        top_BC = logits_BV.topk(V if complete else min(_CANDIDATES, V)).values
        need_B1 = sampling.top_p * _sums(_blocks(mass_BV))[:, -1:]
        least_B1, size_B1, reached_B1 = _cut(top_BC, peak_B1, need_B1, sampling.temperature)
        above_BV, ties_BV = logits_BV > least_B1, logits_BV == least_B1
        room_B1 = size_B1 - above_BV.sum(-1, keepdim=True)
        last_tie_B1 = _first_beyond(ties_BV, (room_B1 - 0.5) / ties_BV.sum(-1, keepdim=True))
        id_V = torch.arange(V, device=logits_BV.device)
        mass_BV.masked_fill_(~(above_BV | (ties_BV & (id_V <= last_tie_B1))), 0.0)
        # The last candidate is enough where there are no more: rounding alone kept it short of the mass.
        drawn_B1 = drawn_B1 & (reached_B1 | (top_BC.shape[-1] == V))
    token_B1, alive_B1 = _inverted(mass_BV, uniform_B)
    token_B1 = torch.where(alive_B1, token_B1, mass_BV.argmax(-1, keepdim=True))
    return token_B1.squeeze(-1), drawn_B1.squeeze(-1)


def require_finite(logits_BV: Tensor) -> Tensor:
    """The largest logit of every row, `[B, 1]`. Raises NonFiniteError where that is NaN or infinite."""
    peak_B1 = logits_BV.amax(-1, keepdim=True)
    if not bool(peak_B1.isfinite().all()):
        row = int((~peak_B1.isfinite()).flatten().nonzero()[0])
        raise NonFiniteError(
            f"cannot sample: the largest logit of row {row} is {float(peak_B1[row])}; the model's weights or "
            "activations are not finite: lower the learning rate, or use dtype bfloat16 or float32 instead of float16"
        )
    return peak_B1


def _top_k(logits_BV: Tensor, k: int) -> Tensor:
    """-inf for every id less probable than the k-th; all as they are when k is 0."""
    if not 0 < k < logits_BV.shape[-1]:
        return logits_BV
    return logits_BV.masked_fill(logits_BV < logits_BV.topk(k, dim=-1).values[:, -1:], -torch.inf)


def _mass(logits_BV: Tensor, peak_B1: Tensor, temperature: float) -> Tensor:
    """Unnormalised probabilities; the most probable token has 1. Only sums need more than the logits' precision."""
    shifted_BV = logits_BV - peak_B1
    return (shifted_BV if temperature == 1 else shifted_BV.div_(temperature)).exp_()


def _inverted(mass_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first id whose cumulative mass exceeds its share `uniform_B`, and whether that id has any mass; `[B, 1]`.

    It may have none by an ulp at the end of a block, or by a GPU's parallel sums.
    """
    # u < 1 keeps u * total below total, so some cumulative mass exceeds it.
    share_B1 = uniform_B.to(mass_BV.device, torch.float64).clamp(0.0, 1.0 - 2.0**-53)[:, None]
    token_B1 = _first_beyond(mass_BV, share_B1)
    return token_B1, mass_BV.gather(-1, token_B1) > 0


def _first_beyond(values_BV: Tensor, share_B1: Tensor) -> Tensor:
    """First id at which the running sum of `values_BV` (none negative) exceeds its share of the total; `[B, 1]`.

    The running sum (float64) is taken over blocks, then within the one block that reaches the target.
    """
    V, blocks_BKS = values_BV.shape[-1], _blocks(values_BV)
    sum_BK = _sums(blocks_BKS)
    target_B1 = share_B1 * sum_BK[:, -1:]
    block_B1 = torch.searchsorted(sum_BK, target_B1, right=True).clamp_max_(sum_BK.shape[-1] - 1)
    own_BS = blocks_BKS.gather(1, block_B1[..., None].expand(-1, 1, _BLOCK)).squeeze(1)
    before_B1 = sum_BK.gather(-1, (block_B1 - 1).clamp_min_(0)) * (block_B1 > 0)
    place_B1 = torch.searchsorted(own_BS.cumsum(-1, dtype=torch.float64), target_B1 - before_B1, right=True)
    return (block_B1 * _BLOCK).add_(place_B1).clamp_max_(V - 1)


def _blocks(values_BV: Tensor) -> Tensor:
    B, V = values_BV.shape
    return (pad(values_BV, (0, -V % _BLOCK)) if V % _BLOCK else values_BV).view(B, -1, _BLOCK)


def _sums(blocks_BKS: Tensor) -> Tensor:
    """Running sum at the end of every block. Blocks are summed alike whatever the batch; a longer sum may be split over
    threads, and a lone row then rounds differently."""
    return blocks_BKS.sum(-1).cumsum(-1, dtype=torch.float64)


def _nucleus(logits_BV: Tensor, peak_B1: Tensor, need_B1: Tensor, temperature: float) -> Tensor:
    """Which ids stay: the smallest set of most probable ids whose mass reaches `need_B1`; bool `[B, V]`."""
    top_BC = _largest(logits_BV, min(_CANDIDATES, logits_BV.shape[-1]))
    least_B1, size_B1, reached_B1 = _cut(top_BC, peak_B1, need_B1, temperature)
    missed_R = (~reached_B1).flatten().nonzero().flatten()
    if missed_R.numel() and top_BC.shape[-1] < logits_BV.shape[-1]:
        every_RV = _largest(logits_BV[missed_R], logits_BV.shape[-1])
        found = _cut(every_RV, peak_B1[missed_R], need_B1[missed_R], temperature)
        least_B1[missed_R], size_B1[missed_R] = found[0], found[1]
    stays_BV = logits_BV >= least_B1
    crowded_R = (stays_BV.count_nonzero(-1) > size_B1.squeeze(-1)).nonzero().flatten()
    if crowded_R.numel():  # more ids tie at the edge than are needed: keep the first of them
        row_RV, edge_R1 = logits_BV[crowded_R], least_B1[crowded_R]
        above_RV, ties_RV = row_RV > edge_R1, row_RV == edge_R1
        room_R1 = size_B1[crowded_R] - above_RV.sum(-1, keepdim=True)
        stays_BV[crowded_R] = above_RV | (ties_RV & (ties_RV.cumsum(-1) <= room_R1))
    return stays_BV


def _cut(sorted_BC: Tensor, peak_B1: Tensor, need_B1: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest logit that stays, how many stay, and whether these (descending) logits reach the mass; `[B, 1]` each."""
    cdf_BC = _mass(sorted_BC, peak_B1, temperature).cumsum(-1, dtype=torch.float64)
    short_B1 = (cdf_BC < need_B1).sum(-1, keepdim=True)
    last_B1 = short_B1.clamp_max(sorted_BC.shape[-1] - 1)
    return sorted_BC.gather(-1, last_B1), last_B1 + 1, short_B1 < sorted_BC.shape[-1]


def _largest(logits_RV: Tensor, count: int) -> Tensor:
    """The `count` largest logits of every row, the largest first."""
    if logits_RV.device.type != "cpu":
        return logits_RV.topk(count, dim=-1).values
    # numpy selects and sorts values without indices: torch's topk takes 6 to 16 times as long.
    top_RC = np.partition(logits_RV.detach().numpy(), -count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(top_RC, axis=-1)[:, ::-1].copy())
