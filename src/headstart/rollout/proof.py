"""Does a model decode and score here as it does alone? Tried on a few tokens when it is loaded.

The engine decodes prompts of different length side by side, lets rows leave and enter, and copies a prompt for its
samples. A layer that is not attention may let padding into its state, or keep a state where nobody moves it. A model
that decodes right from a cache does so; one that does not has its texts computed anew for every token, which is slower;
one that gives other logits even then is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from headstart.errors import ModelError
from headstart.models.causal import FAILURES, CausalModel, first_line
from headstart.models.lora import unwrap
from headstart.records import Prompt, Rollout
from headstart.rollout.decoding import Row, encoded

Text = tuple[int, ...]
SHORT, LONG = 3, 8
"""Tokens of the prompts: fewer and more than a short convolution (of 4) sees."""
LEAST = 1e-3
"""Share of the logits that a text in a batch may differ by, whatever the precision."""


def prove_decoding(model: CausalModel, name: str) -> None:
    """Set `model.caches`, from at most a dozen passes over a few tokens. What decodes fast has been tried already.

    Warns where rollouts must do without a cache. Raises ModelError where a batch changes logits even so, and where
    the tokens behind do: it is no causal language model then.
    """
    if model.fast is not None:
        return
    ids = [token % model.vocabulary for token in range(7, 7 + 3 * (SHORT + LONG + 3), 3)]
    short, long = tuple(ids[: SHORT + 2]), tuple(ids[SHORT + 2 :])
    with model.sampling_mode():
        own = {text: _alone(model, text) for text in (short, long)}
        if not _agree(model, _alone(model, short[:SHORT])[-1], own[short][SHORT - 1], LEAST):
            raise ModelError(
                f"{name}: {_kind(model)} is no causal language model: its logits change with the tokens behind, so it "
                "cannot be sampled token by token. Give a decoder (of an encoder, one with is_decoder in config.json)"
            )
        # On a GPU convolutions of float32 round to ten bits by default.
        reason = _reason(model, own, LEAST if model.device.type == "cuda" else LEAST / 10)
        if reason:
            model.caches = False
            warnings.warn(f"{name}: rollouts are decoded without a cache, which is slower: {reason}", stacklevel=2)
            reason = _reason(model, own, LEAST)
    if reason:
        raise ModelError(f"{name}: {reason}, so it can be neither sampled nor trained in batches: it is unsupported")


def _reason(model: CausalModel, own: Mapping[Text, Tensor], tolerance: float) -> str:
    """Why logits in batches are not `own`; empty where they are."""
    try:
        for what, found_BV, wanted in _in_batches(model, own):
            if not _agree(model, found_BV, torch.stack(wanted), tolerance):
                gap = float((found_BV - torch.stack(wanted)).abs().max())
                return f"{what}, logits of {_kind(model)} differ by {gap:.3g} from those of a text alone"
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"a batch of {_kind(model)} fails ({first_line(error)})"
    return ""


def _in_batches(model: CausalModel, own: Mapping[Text, Tensor]) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """What is done, the logits that it gives, and those of the texts alone."""
    (short, a), (long, b) = own.items()
    rows = [Row(Prompt(n, "", text[:P], text[:P]), 0, 9) for n, text, P in ((0, short, SHORT), (1, long, LONG))]
    state = encoded(model, rows)
    yield "beside a longer prompt", state.logits_BV, [a[SHORT - 1], b[LONG - 1]]
    token_B = torch.tensor([short[SHORT], long[LONG]], device=model.device)
    state.step(token_B, [True, True])
    yield "after a decoding step", state.logits_BV, [a[SHORT], b[LONG]]
    state.put([1], encoded(model, rows[:1]))  # the long row leaves, and the short prompt enters once more
    state = state.taken([0, 1, 1])
    state.step(torch.tensor([short[SHORT + 1], short[SHORT], short[SHORT]], device=model.device), [True] * 3)
    yield "after rows have left and entered", state.logits_BV, [a[SHORT + 1], a[SHORT], a[SHORT]]
    done = [
        Rollout(row.prompt, 0, text[len(row.prompt.token_ids) :], False) for row, text in zip(rows, own, strict=True)
    ]
    scored_MV = model.head(model.completion_hidden(model.batch(done, "student")))
    yield "when rollouts are scored", scored_MV, [*a[SHORT - 1 : -1], *b[LONG - 1 : -1]]


def _alone(model: CausalModel, text: Text) -> Tensor:
    """The model's own logits `[T, V]`, without batch, cache and padding."""
    logits_1TV: Tensor = model.model(input_ids=torch.tensor([text], device=model.device), use_cache=False).logits
    return logits_1TV[0, :, : model.vocabulary].float()


def _agree(model: CausalModel, found: Tensor, own: Tensor, tolerance: float) -> bool:
    """Whether logits differ by rounding only, as a share of what sets the ids apart."""
    found, own = (x.float() - x.float().mean(dim=-1, keepdim=True) for x in (found, own))
    eps = torch.finfo(next(model.model.parameters()).dtype).eps
    return bool((found - own).norm() <= max(tolerance, 16 * eps) * own.norm())


def _kind(model: CausalModel) -> str:
    return type(unwrap(model.model)).__name__
