"""What each token's divergence counts for in the loss of a step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def loss_weights(
    row_M: Tensor,
    rows: int,
    denominator: Literal["trajectory", "token", "sum"],
    *,
    total_tokens: int,
    total_rollouts: int,
    selected_M: Tensor | None = None,
    factor_M: Tensor | None = None,
) -> Tensor:
    """Coefficient of each token's surrogate, float32 `[M]`: the loss of a step is the plain sum of the products.

    `row_M` says which of this micro-batch's `rows` rollouts a token belongs to; a rollout is never split over
    micro-batches. The totals count the whole step over all ranks, so neither micro-batches nor ranks change the
    gradient. `trajectory` (arXiv 2605.27028): mean over a rollout's tokens, then over rollouts, 1 / (length *
    total_rollouts); `token`: mean over all tokens; `sum`: sum over a rollout's tokens, then mean over rollouts.

    With `selected_M` (bool) "tokens" means selected tokens throughout, `total_tokens` included; the others get 0. A
    rollout of which none is selected adds nothing to the sum and still counts among the rollouts. `factor_M` multiplies
    the coefficients; the denominators stay what they are.
    """
    if factor_M is not None:
        weights_M = loss_weights(
            row_M, rows, denominator, total_tokens=total_tokens, total_rollouts=total_rollouts, selected_M=selected_M
        )
        return weights_M * factor_M
    if selected_M is not None:
        weights_M = torch.zeros(len(row_M), device=row_M.device)
        weights_M[selected_M] = loss_weights(
            row_M[selected_M], rows, denominator, total_tokens=total_tokens, total_rollouts=total_rollouts
        )
        return weights_M
    match denominator:
        case "trajectory":
            length_B = torch.bincount(row_M, minlength=rows).double()
            weights_M = 1.0 / (length_B[row_M] * max(total_rollouts, 1))
        case "token":
            weights_M = torch.full_like(row_M, 1.0 / max(total_tokens, 1), dtype=torch.float64)
        case "sum":
            weights_M = torch.full_like(row_M, 1.0 / max(total_rollouts, 1), dtype=torch.float64)
    return weights_M.float()
