"""A trap on CPUs: after a reload, a head that is the embedding matrix stays the old one, with status 200."""

from __future__ import annotations

from pathlib import Path

import torch
from real_server import RealServer
from transformers import AutoModelForCausalLM

VOCABULARY = 46
IDS = tuple(5 + (7 * i) % 40 for i in range(60))


def test_a_tied_head_stays_old_when_weights_are_reloaded(
    tied_server: RealServer, tied_checkpoints: tuple[Path, Path]
) -> None:
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in tied_checkpoints)
    with torch.inference_mode():
        hidden = new.model(torch.tensor([IDS])).last_hidden_state[0, :-1].double()
        right, mixed = (torch.log_softmax(hidden @ m.lm_head.weight.double().T, -1).float() for m in (new, old))
    tied_server.reload(tied_checkpoints[1])
    tied_server.reset()
    found = tied_server.prompt_logprobs(IDS, VOCABULARY)
    assert float((found - right).abs().max()) > 0.5  # what a probe against the trainer sees
    assert float((found - mixed).abs().max()) < 1e-5  # new layers under the old head
