"""Does a model decode and score here as it does alone? Tried on a few tokens when it is loaded.

The engine decodes prompts of different length side by side, lets rows leave and enter, and copies a prompt for its
samples. A layer that is not attention may let padding into its state, or keep a state where nobody moves it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from headstart.errors import ModelError, first_line
from headstart.models.causal import FAILURES, CausalModel
from headstart.models.lora import unwrap
from headstart.records import Prompt, Rollout
from headstart.rollout.decoding import Row, encoded

TOLERANCE = 1e-3
"""Share of its logits by which a text may differ in a batch, where its precision does not ask for more."""


def prove_decoding(model: CausalModel, name: str) -> None:
    """Set `model.caches`, by at most fifteen passes over a few tokens. What has a fast decoder has been tried already.

    Where rows in a cache have other logits than texts alone, rollouts do without one: UserWarning. ModelError where
    that does not help, and for what is no causal language model.
    """
    if model.fast is not None:
        return
    kind = type(unwrap(model.model)).__name__
    with model.sampling_mode():
        reason = _difference(model)
        if not reason:
            return
        model.caches = False
        final = _difference(model)
    if final:
        raise ModelError(f"{name}: {kind} can be neither sampled nor trained here: {final}")
    warnings.warn(f"{name}: {kind} samples without a cache, which is slower: {reason}", stacklevel=2)


def _difference(model: CausalModel) -> str:
    """How logits in a batch differ from those of a text alone; empty where they do not."""
    # On a GPU convolutions of float32 round to ten bits by default.
    strict = model.caches and model.device.type == "cpu"
    tolerance = max(TOLERANCE / 10 if strict else TOLERANCE, 16 * torch.finfo(model.dtype).eps)
    try:
        for when, found, own in _compared(model):
            # What all ids have in common does not matter.
            gap, size = (x - x.mean(dim=-1, keepdim=True) for x in (found - own, own))
            if not gap.norm() <= tolerance * size.norm():
                return f"{when}, its logits differ by {float((found - own).abs().max()):.3g} from those of a text alone"
    except FAILURES as error:
        return f"it fails in a batch ({first_line(error)})"
    return ""


def _compared(model: CausalModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """When logits `[B, V]` were made, these logits, and the model's own."""

    def alone(text: tuple[int, ...]) -> Tensor:
        logits_1TV: Tensor = model.model(input_ids=torch.tensor([text], device=model.device), use_cache=False).logits
        return logits_1TV[0, :, : model.vocabulary].float()

    # Prompts of 3 and 8 tokens, fewer and more than a short convolution sees, and what follows them.
    short, long = (tuple(token % model.vocabulary for token in range(*ends, 3)) for ends in ((7, 20), (23, 48)))
    a, b, (x, y), z = alone(short), alone(long), short[3:], long[8]
    yield "with other tokens behind", a[2:3], alone(short[:3])[-1:]
    prompts = [Prompt(0, "", text, text) for text in (short[:3], long[:8])]
    rows = [Row(prompt, 0, 9) for prompt in prompts]
    state = encoded(model, rows)
    yield "beside a longer prompt", state.logits_BV, torch.stack([a[2], b[7]])
    state.step(torch.tensor([x, z], device=model.device), [True, True])
    yield "after a decoding step", state.logits_BV, torch.stack([a[3], b[8]])
    state.put([1], encoded(model, rows[:1]))  # the long row leaves, and the short prompt enters once more
    state.keep([0, 1, 1])
    state.step(torch.tensor([y, x, x], device=model.device), [True, True, True])
    yield "after rows have left and entered", state.logits_BV, torch.stack([a[4], a[3], a[3]])
    done = [Rollout(prompts[0], 0, short[3:], False), Rollout(prompts[1], 0, long[8:], False)]
    scored_MV = model.head(model.completion_hidden(model.batch(done, "student")))
    yield "when rollouts are scored", scored_MV, torch.cat([a[2:4], b[7:8]])
