"""Door to transformers: tokenizers and models from a folder, the hub or the bundled tiny pair."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from headstart.config.schema import ModelConfig
from headstart.errors import ModelError
from headstart.models.lora import merge_adapter

BUNDLED = "tiny:"


def resolve(path: str) -> str:
    """Folder of a bundled model (`tiny:teacher`, `tiny:student`, `tiny:student-weak`), else `path` unchanged.

    Raises ModelError for an unknown bundled model and for what looks like a folder but is none.
    """
    if path.startswith(BUNDLED):
        folder = Path(str(files("headstart"))) / "data" / "tiny" / path.removeprefix(BUNDLED)
        if not (folder / "config.json").exists():
            known = sorted(f"tiny:{p.parent.name}" for p in folder.parent.glob("*/config.json"))
            raise ModelError(f"there is no bundled model {path!r}; bundled are: {', '.join(known)}")
        return str(folder)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").exists():
            raise ModelError(f"{path} holds no config.json, so it is not a Hugging Face checkpoint")
        return str(local)
    if looks_local:
        raise ModelError(f"no model folder at {path!r} (seen from {Path.cwd().name}/); give a folder or a hub name")
    return path


def load_tokenizer(config: ModelConfig) -> Any:
    """The checkpoint's tokenizer. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    path = resolve(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{config.path}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    return tokenizer


def load_model(config: ModelConfig, device: torch.device) -> Any:
    """The checkpoint as an `AutoModelForCausalLM` in evaluation mode on `device`, its `adapter` merged in.

    Only safetensors weights are read (a pickle can run code). `dtype: auto` is bfloat16 on a GPU and float32 on a CPU.
    Raises ModelError when the checkpoint is missing, has no safetensors, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    path = resolve(config.path)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(
        config.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    extra = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{config.path}: the model cannot be loaded: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{config.path}: {len(missing)} weights are missing from the checkpoint ({', '.join(missing[:3])}, ...); "
            "they would be random. Check that the folder holds this model's own weights"
        )
    if config.adapter is not None:
        model = merge_adapter(model, config.adapter)
    return model.to(device).eval()


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
