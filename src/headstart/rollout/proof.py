"""Does a model decode and score here as it does alone? Tried on a few tokens when it is loaded.

The engine decodes prompts of different length side by side, lets rows leave and enter, and copies a prompt for its
samples. A layer that is not attention may let padding into its state, or keep a state where nobody moves it.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from headstart.errors import ModelError, first_line
from headstart.models.causal import FAILURES, CausalModel
from headstart.models.image_text import ImageTextModel
from headstart.models.lora import unwrap
from headstart.models.templates import Reading, View
from headstart.pictures import Picture
from headstart.records import Message, Problem, Prompt, Rollout
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
    kind, text = type(unwrap(model.model)).__name__, [i for i in range(model.vocabulary) if i not in model.never]
    # Prompts of 3 and 8 tokens: fewer and more than a short convolution sees.
    texts = [Reading(tuple(text[i % len(text)] for i in range(*ends, 3))) for ends in ((7, 16), (23, 47))]
    with model.sampling_mode():
        reason = _difference(model, texts)
        if not reason:
            return
        model.caches = False
        final = _difference(model, texts)
    if final:
        raise ModelError(f"{name}: {kind} can be neither sampled nor trained here: {final}")
    warnings.warn(f"{name}: {kind} samples without a cache, which is slower: {reason}", stacklevel=2)


def prove_images(model: ImageTextModel, tokenizer: Any, name: str) -> None:
    """Raise ModelError unless two prompts with images of different size, and one without, have the logits in a batch
    that the model's own forward gives them alone; while sampling as in scoring."""
    kind, asked = type(unwrap(model.model)).__name__, Message(role="user", content="what is two")
    shown = [tuple(map(_checkered, sizes)) for sizes in (((40, 90),), ((120, 60), (50, 50)), ())]
    problems = [Problem("probe", (asked,), images=images) for images in shown]
    reason = "its texts cannot be computed again without a cache" if not model.caches else ""
    with model.sampling_mode():
        reason = reason or _difference(model, View(tokenizer).readings(problems))
    if reason:
        raise ModelError(f"{name}: {kind} cannot be shown images here: {reason}")


def _checkered(size: tuple[int, int]) -> Picture:
    from PIL import Image

    (width, height), file = size, io.BytesIO()
    pixels = bytes((40 * x + 90 * y + 70 * c) % 256 for y in range(height) for x in range(width) for c in range(3))
    Image.frombytes("RGB", size, pixels).save(file, "png")
    return Picture(hashlib.sha256(file.getvalue()).hexdigest()[:16], file.getvalue(), "probe")


def _difference(model: CausalModel, read: Sequence[Reading]) -> str:
    """How logits in a batch differ from those of a text alone; empty where they do not."""
    # On a GPU convolutions of float32 round to ten bits by default.
    strict = model.caches and model.device.type == "cpu"
    tolerance = max(TOLERANCE / 10 if strict else TOLERANCE, 16 * torch.finfo(model.dtype).eps)
    try:
        for when, found, own in _compared(model, read):
            # What all ids have in common does not matter.
            gap, size = (x - x.mean(dim=-1, keepdim=True) for x in (found - own, own))
            if not gap.norm() <= tolerance * size.norm():
                return f"{when}, its logits differ by {float((found - own).abs().max()):.3g} from those of a text alone"
    except FAILURES as error:
        return f"it fails in a batch ({first_line(error)})"
    return ""


def _compared(model: CausalModel, read: Sequence[Reading]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Prompts in a batch, each with two more tokens behind it: when logits `[B, V]` were made, these logits, and the
    model's own."""
    text = [i for i in range(model.vocabulary) if i not in model.never]
    tails = [tuple(text[(16 + 31 * k + 3 * n) % len(text)] for n in range(2)) for k in range(len(read))]

    def alone(reading: Reading, tail: tuple[int, ...]) -> Tensor:
        """Logits of the last prompt token and of those behind it, by the model's own forward."""
        shown, inputs = reading.images, dict[str, Any]()
        if shown is not None:
            kinds = {n: torch.cat([k, k.new_zeros(len(tail))])[None] for n, k in shown.kinds.items()}
            inputs = {n: x.to(model.device) for n, x in {**shown.pixels, **kinds}.items()}
        ids_1T = torch.tensor([(*reading.ids, *tail)], device=model.device)
        logits_1TV = model.model(input_ids=ids_1T, use_cache=False, **inputs).logits
        return cast(Tensor, logits_1TV[0, len(reading.ids) - 1 :, : model.vocabulary].float())

    own = [alone(*both) for both in zip(read, tails, strict=True)]
    yield "with other tokens behind", own[0][:1], alone(read[0], ())
    prompts = [Prompt(n, "", r.ids, r.ids, r.images, r.images) for n, r in enumerate(read)]
    rows = [Row(prompt, 0, 9) for prompt in prompts]
    state = encoded(model, rows)
    yield "beside other prompts", state.logits_BV, torch.stack([logits[0] for logits in own])
    state.step(torch.tensor([tail[0] for tail in tails], device=model.device), [True] * len(rows))
    yield "after a decoding step", state.logits_BV, torch.stack([logits[1] for logits in own])
    state.put([1], encoded(model, rows[:1]))  # the second row leaves, and the first prompt enters once more
    state.keep([0, 1, 1])
    x, y = tails[0]
    state.step(torch.tensor([y, x, x], device=model.device), [True, True, True])
    yield "after rows have left and entered", state.logits_BV, own[0][[2, 1, 1]]
    done = [Rollout(prompt, 0, tail, False) for prompt, tail in zip(prompts, tails, strict=True)]
    scored_MV = model.head(model.completion_hidden(model.batch(done, "student")))
    yield "when rollouts are scored", scored_MV, torch.cat([logits[:-1] for logits in own])
