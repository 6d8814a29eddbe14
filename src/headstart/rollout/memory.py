"""How many rows decode at once: the batch size of an evaluation, from the memory that is free."""

from __future__ import annotations

from collections.abc import Sequence

from headstart.models.causal import CausalModel
from headstart.models.memory import CAPTURED, COPIED, LARGEST, SHARE, SORTED, copies, free_bytes, grown
from headstart.models.passes import Passes
from headstart.records import Prompt
from headstart.rollout.cache import ReservingLayer, states
from headstart.rollout.decoding import Decoding


def fitting_batch(model: CausalModel, prompts: Sequence[Prompt], max_tokens: int, free: int | None = None) -> int:
    """Rows (1 to LARGEST) that decode at once in `free` bytes, by default what is free on the model's device now.

    The cache is measured on the shortest prompt: whatever the architecture keeps per token and per row counts. Without
    a cache whole texts pass through the model.
    """
    shortest = min(prompts, key=lambda prompt: len(prompt.token_ids))
    with model.sampling_mode():
        layers = Decoding.of(model, [shortest]).cache.layers
    attention = [layer for layer in layers if isinstance(layer, ReservingLayer)]
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in attention) / len(shortest.token_ids)
    whole = 0.0 if model.caches else Passes.of(model, "student").passing
    longest = max(len(prompt.token_ids) for prompt in prompts)
    places = grown(longest, longest + max_tokens, len(layers))
    # States of recurrent layers are there twice while rows move.
    cache = places * per_token + (longest + max_tokens) * whole
    cache += 2 * sum(state.nbytes for layer in layers for state in states(layer))
    drawing = CAPTURED if model.device.type == "cuda" else SORTED
    available = free_bytes(model.device) if free is None else free
    return max(1, min(LARGEST, int(SHARE * available / (cache + drawing * model.vocabulary))))


def copies_fit(model: CausalModel) -> bool:
    """Whether the copies of weights that decoding makes are small beside what is free."""
    needed = copies(model)
    return not needed or needed <= COPIED * free_bytes(model.device)
