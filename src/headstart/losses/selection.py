"""Which sampled tokens are trained, and what each one's divergence counts for in the loss of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headstart.config.schema import AllTokens, FormatTokens, PlacedTokens, Selection, TopTokens
from headstart.records import Rollout
from headstart.streams import uniforms


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


Array = npt.NDArray[Any]
TokenClass = Literal["number", "word", "symbol", "space", "stop"]
CLASSES: tuple[TokenClass, ...] = ("number", "word", "symbol", "space", "stop")
"""Classes of tokens by what their text is made of; a class is written as its place in this tuple."""


def token_class(text: str) -> TokenClass:
    """`word` holds a letter, `number` a digit but no letter, `space` nothing visible, `symbol` is all the rest."""
    if any(character.isalpha() for character in text):
        return "word"
    if any(character.isdigit() for character in text):
        return "number"
    return "symbol" if text.strip() else "space"


def chosen(rule: Selection, uniform_N: Array, signals: Mapping[str, Array], class_N: Array | None) -> Array:
    """Which of one rollout's N tokens `rule` trains: bool `[N]`, at most `tokens` of them true.

    `uniform_N` are the rollout's own draws in [0, 1): `random` takes the tokens with the smallest draws, `window`
    starts where the first draw falls; `format` takes the smallest draws within its classes. `middle` is centred, half a
    token to the left when it must be. `top` multiplies the signals named in `rule.by` (`[N]` each) and takes the
    largest, the earlier one of equals. `class_N` holds places in CLASSES.
    """
    N = len(uniform_N)
    match rule:
        case AllTokens():
            return np.ones(N, dtype=bool)
        case FormatTokens(classes=classes, tokens=wanted):
            assert class_N is not None
            members = np.flatnonzero(np.isin(class_N, [CLASSES.index(name) for name in classes]))
            places = members[np.argsort(uniform_N[members], kind="stable")[:wanted]]
        case TopTokens(by=by, tokens=tokens):
            score_N = np.prod([signals[name].astype(np.float64) for name in by], axis=0)
            places = np.argsort(-score_N, kind="stable")[:tokens]
        case PlacedTokens(type=kind, tokens=tokens):
            k = min(tokens, N)
            free = N - k
            draw = float(uniform_N[0]) if N else 0.0
            start = {"first": 0, "last": free, "middle": free // 2, "window": int(draw * (free + 1)), "random": 0}[kind]
            places = np.argsort(uniform_N, kind="stable")[:k] if kind == "random" else np.arange(start, start + k)
    mask_N = np.zeros(N, dtype=bool)
    mask_N[places] = True
    return mask_N


@dataclass(frozen=True, slots=True)
class Selector:
    """`chosen` for whole micro-batches. `class_V` holds the class of every vocabulary id (format rules only)."""

    rule: Selection
    seed: int = 0
    class_V: Array | None = None

    def counts(self, rollouts: Sequence[Rollout]) -> list[int]:
        """How many tokens of each rollout will be trained; known before any score is."""
        lengths = [len(r.rows) for r in rollouts]
        match self.rule:
            case AllTokens():
                return lengths
            case PlacedTokens(tokens=tokens) | TopTokens(tokens=tokens):
                return [min(tokens, length) for length in lengths]
            case FormatTokens():
                masks = [chosen(self.rule, np.zeros(len(r.rows)), {}, self._classes(r)) for r in rollouts]
                return [int(mask_N.sum()) for mask_N in masks]

    def mask(self, rollouts: Sequence[Rollout], step: int, signals: Mapping[str, Tensor]) -> Tensor | None:
        """Bool `[M]` over the tokens of `rollouts` in row order, on the CPU; None when all are trained.

        `signals` (`[M]` each, any device) are read by `top` rules only. The draws of a rollout are keyed by (seed,
        "selection", step), its prompt's index, its sample and the position: micro-batches and ranks never change them.
        (Signals carry the rounding of the batch they were computed in, so `top` may break a tie in the last digit
        differently.)
        """
        if isinstance(self.rule, AllTokens):
            return None
        arrays = {name: signals[name].detach().cpu().numpy() for name in getattr(self.rule, "by", ())}
        parts, end = [np.zeros(0, dtype=bool)], 0
        for rollout in rollouts:
            start, end = end, end + len(rollout.rows)
            place = (rollout.prompt.index, rollout.sample_index)
            uniform_1N = uniforms((self.seed, "selection", step), [place], 0, end - start)
            own = {name: array[start:end] for name, array in arrays.items()}
            parts.append(chosen(self.rule, uniform_1N[0], own, self._classes(rollout)))
        return torch.from_numpy(np.concatenate(parts))

    def _classes(self, rollout: Rollout) -> Array | None:
        return None if self.class_V is None else self.class_V[np.asarray(rollout.completion_ids)[list(rollout.rows)]]


EVERY_TOKEN = Selector(AllTokens())
"""No selection at all."""
