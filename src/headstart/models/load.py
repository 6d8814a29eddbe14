"""Door to transformers: tokenizers and models from a folder, the hub or the bundled pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from headstart.config.evaluation import WORLDS
from headstart.config.schema import ModelConfig
from headstart.errors import HeadstartError, ModelError
from headstart.models.files import ADAPTER, check_checkpoint, elements
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
        if not (local / "config.json").is_file() and not (local / ADAPTER).is_file():
            raise ModelError(f"{path} holds no config.json, so it is not a Hugging Face checkpoint")
        return str(local)
    if looks_local:
        raise ModelError(f"no model folder at {path!r} (seen from {Path.cwd().name}/); give a folder or a hub name")
    return path


def load_tokenizer(config: ModelConfig) -> Any:
    """The checkpoint's tokenizer. Raises ModelError when there is none, or a file of the checkpoint is malformed."""
    from transformers import AutoTokenizer

    path = resolve(config.path)
    with _refusing(config.path, "tokenizer"):
        check_checkpoint(path, config.revision, trusted=config.trust_remote_code)
        return AutoTokenizer.from_pretrained(path, **_source(config))


def load_model(config: ModelConfig, device: torch.device) -> Any:
    """The checkpoint as an `AutoModelForCausalLM` in evaluation mode on `device`, its `adapter` merged in.

    Only safetensors weights are read (a pickle can run code). `dtype: auto` is bfloat16 on a GPU and float32 on a CPU.
    Raises ModelError when the checkpoint is missing or malformed, has no safetensors, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    path = resolve(config.path)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(
        config.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    extra = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    with _refusing(config.path, "model"):
        _check_size(path, config)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below
            **_source(config),
            **extra,
        )
    _check_complete(config.path, info)
    if config.adapter is not None:
        model = merge_adapter(model, config.adapter)
    if device.type == "cpu":
        # The weights are still the mapped file: whoever overwrites it during a run would put trained weights back.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.to(device).eval()


def _source(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _check_size(path: str, config: ModelConfig) -> None:
    """Raise ModelError when config.json asks for a model that its weights cannot fill: transformers would make the rest
    of it at random, gigabytes of it if need be."""
    from transformers import AutoConfig, AutoModelForCausalLM

    files = check_checkpoint(path, config.revision, trusted=config.trust_remote_code)
    held = elements(path, files, config.revision)
    with _refusing(config.path, "configuration"):
        made = AutoConfig.from_pretrained(path, **_source(config))
        if getattr(made.get_text_config(), "num_hidden_layers", 1) < 1:
            raise ValueError("num_hidden_layers is less than 1")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                made, attn_implementation="eager", trust_remote_code=config.trust_remote_code
            )
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    packed = 8 if getattr(made, "quantization_config", None) else 1  # numbers of 4 bits in an int32
    if held and wanted > 2 * packed * held + 2**24:
        raise ModelError(
            f"{config.path}: config.json describes a model of {wanted:,} numbers, but the checkpoint holds {held:,}. "
            "Check that the folder holds this model's own config.json and weights"
        )


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


@contextmanager
def _refusing(path: str, what: str) -> Iterator[None]:
    """While entered, transformers is quiet, and any error is a ModelError: malformed files raise all types."""
    try:
        with quiet():
            yield
    except (HeadstartError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # A panic of the Rust code in tokenizers is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(_refusal(path, what, error)) from error


def _refusal(path: str, what: str, error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no reason given"]
    reason = " ".join(" ".join(lines[: 2 if lines[0].endswith(":") else 1]).split())[:300].rstrip(" .:")
    if not isinstance(error, OSError | ValueError | ImportError | SafetensorError):
        reason = f"{type(error).__name__}: {reason}"
    if not Path(path).expanduser().is_dir():
        remedy = "Check the name and the network, or give a folder"
    elif isinstance(error, SafetensorError):
        remedy = "A safetensors file is damaged; copy or download it again"
    elif "no file named model.safetensors" in reason:
        remedy = "Only safetensors are read (a pickle can run code); convert other weights with save_pretrained"
    else:
        file = "tokenizer.json and tokenizer_config.json" if what == "tokenizer" else "config.json"
        remedy = f"Check {file}, and that the folder holds a whole checkpoint of a causal language model"
    return f"{path}: the {what} cannot be loaded: {reason}. {remedy}"
