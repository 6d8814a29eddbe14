"""A loaded model is its own: nothing that happens to the checkpoint's file afterwards changes it."""

from __future__ import annotations

from pathlib import Path

import torch

from headstart.config.schema import ModelConfig
from headstart.models.load import load_model
from support import write_pair


def test_trained_weights_survive_an_overwritten_checkpoint(tmp_path: Path) -> None:
    student, _ = write_pair(tmp_path)
    model = load_model(ModelConfig(path=str(student)), torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    trained = [parameter.clone() for parameter in model.parameters()]
    file = student / "model.safetensors"
    file.write_bytes(file.read_bytes())  # truncates it first, as a copy over it does
    assert all(torch.equal(p, t) for p, t in zip(model.parameters(), trained, strict=True))
