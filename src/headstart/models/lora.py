"""Door to peft: adapters are added, merged and saved here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from headstart.config.schema import LoraTuning
from headstart.errors import ModelError
from headstart.models.quiet import quiet


def unwrap(model: Any) -> Any:
    """The transformers model inside a peft wrapper, its adapted layers included; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def add_lora(model: Any, tuning: LoraTuning, seed: int) -> Any:
    """`model` with trainable low-rank adapters (and nothing else trainable), initialised from `seed` alone.

    Raises ModelError when `tuning.targets` names no module of the model.
    """
    from peft import LoraConfig, get_peft_model

    targets = tuning.targets if isinstance(tuning.targets, str) else list(tuning.targets)
    config = LoraConfig(
        r=tuning.r,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=_cuda_devices()), quiet():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            raise ModelError(
                f"tuning.targets {targets!r} fits no layer of the student; its linear layers: {', '.join(names)}"
            ) from error


def merge_adapter(model: Any, path: str) -> Any:
    """`model` with the adapter at `path` merged into its weights. Raises ModelError when it cannot be loaded."""
    from peft import PeftModel

    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"the adapter folder {path!r} holds no adapter_model.safetensors; only safetensors are read (a pickle can "
            "run code). Give the folder of a peft adapter"
        )
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir()):
        raise ModelError(f"no adapter folder at {path!r}; give a folder or a hub name")
    try:
        with quiet():
            return PeftModel.from_pretrained(model, str(folder) if folder.is_dir() else path).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the adapter {path!r} cannot be loaded onto this model: {reason}. Check that it was made for this model"
        ) from error


def merge(model: Any) -> Any:
    """The plain transformers model with its adapter folded into the weights; a model without adapter as it is."""
    return model.merge_and_unload() if unwrap(model) is not model else model


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter alone, in peft's format, as safetensors."""
    model.save_pretrained(folder, safe_serialization=True)


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
