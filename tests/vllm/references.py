"""What transformers says of the same checkpoints, and how far apart two answers are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

VOCABULARY = 262
"""Ids of `byte_tokenizer`."""
LONG = tuple(5 + (37 * i) % 250 for i in range(300))
"""Longer than two blocks of the prefix cache (128 tokens each on a CPU)."""


def local(folder: Path, adapter: Path | None = None) -> Any:
    """The checkpoint in `folder`, in float32, with an adapter or without."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


def scores(model: Any, ids: Sequence[int]) -> Tensor:
    """Log-probabilities `[len(ids), V]` of what follows `ids[:1]`, `ids[:2]`, ..."""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).float()


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in nats."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def write_adapter(folder: Path, checkpoint: Path, seed: int) -> Path:
    """An adapter of `checkpoint` that changes what it says by nats."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped = get_peft_model(local(checkpoint), settings)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    wrapped.save_pretrained(folder)
    return folder
