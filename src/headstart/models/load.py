"""Door to transformers: tokenizers and models from a folder, the hub or the bundled pairs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from headstart.config.evaluation import WORLDS
from headstart.config.schema import ModelConfig
from headstart.errors import ModelError
from headstart.models.causal import parts_of
from headstart.models.lora import merge_adapter
from headstart.models.quiet import quiet


def resolve(path: str) -> str:
    """Folder of a bundled model (`tiny:student`, `late:teacher`), else `path` unchanged.

    Raises ModelError for an unknown bundled model and for what looks like a folder but is none.
    """
    world, _, name = path.partition(":")
    if name and world in WORLDS:
        folder = Path(str(files("headstart"))) / "data" / world / name
        if not (folder / "config.json").exists():
            known = sorted(f"{world}:{p.parent.name}" for p in folder.parent.glob("*/config.json"))
            raise ModelError(f"there is no bundled model {path!r}; bundled are: {', '.join(known)}")
        return str(folder)
    local = Path(path).expanduser()
    # A hub name is owner/name; models/studnet beside a folder models is a misspelt path, not a reason to ask the hub.
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or local.parent.is_dir()
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
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_refusal(config.path, "tokenizer", error)) from error
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
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                revision=config.revision,
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them below
                **extra,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(_refusal(config.path, "model", error)) from error
    _check_complete(config.path, info)
    parts_of(model)
    if config.adapter is not None:
        model = merge_adapter(model, config.adapter)
    if device.type == "cpu":
        # The weights are still the mapped file: whoever overwrites it during a run would put trained weights back.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.to(device).eval()


def _check_complete(path: str, info: Mapping[str, Any]) -> None:
    """Raise ModelError when a weight is missing or has another shape: transformers would make it random."""
    wrong = sorted(info["missing_keys"])
    for name, found, wanted in info["mismatched_keys"]:
        wrong.append(f"{name} has shape {tuple(found)}, not {tuple(wanted)}")
    if wrong:
        raise ModelError(
            f"{path}: {len(wrong)} weights are missing from the checkpoint or do not fit its config.json "
            f"({', '.join(wrong[:3])}). Check that the folder holds this model's own weights"
        )


def _refusal(path: str, what: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
    if not Path(path).expanduser().is_dir():
        remedy = "Check the name and the network, or give a folder"
    elif isinstance(error, SafetensorError):
        remedy = "A safetensors file is damaged; copy or download it again"
    elif "no file named model.safetensors" in reason:
        remedy = "Only safetensors are read (a pickle can run code); convert other weights with save_pretrained"
    else:
        remedy = "Check that the folder holds a whole checkpoint of a causal language model"
    return f"{path}: the {what} cannot be loaded: {reason}. {remedy}"
