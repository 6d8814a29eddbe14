"""Door to transformers: tokenizers and models from a folder, the hub or the bundled pairs."""

from __future__ import annotations

import ctypes
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from headstart.config.evaluation import WORLDS
from headstart.config.models import IN_MEMORY, ModelConfig
from headstart.errors import HeadstartError, ModelError, TemplateError, out_of_memory
from headstart.models.causal import parts_of
from headstart.models.lora import merge_adapter
from headstart.models.quiet import quiet
from headstart.models.templates import chat_template
from headstart.progress import doing

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BOUNDS = (
    (r"(n|num)_(hidden_)?layers?", 1, 512),
    (r"(n|num)_(\w+_)?(experts|blocks|labels)|\w*_factor", 0, 1024),
    (r"\w*_(dim|size)", -1, 2**24),
)
"""Settings of config.json that cost time or memory before any weight is read: pattern, least and most."""


def resolve(path: str) -> str:
    """Folder of a bundled model (`tiny:student`, `late:teacher`), else `path` unchanged.

    Raises ModelError for an unknown bundled model and for what looks like a folder but is none.
    """
    if path.endswith(IN_MEMORY):
        raise ModelError(f"{path!r} was a model passed in from Python; do this from there, with its Pair again")
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
        if not any((local / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ModelError(f"{path} holds no config.json, so it is not a Hugging Face checkpoint")
        return str(local)
    if looks_local:
        raise ModelError(f"no model folder at {path!r} (seen from {Path.cwd().name}/); give a folder or a hub name")
    return path


@doing("loading a tokenizer")
def load_tokenizer(config: ModelConfig) -> Any:
    """The checkpoint's tokenizer. Raises ModelError when there is none, or the checkpoint is malformed."""
    from transformers import AutoTokenizer

    path = resolve(config.path)
    with _refusing(config.path, "tokenizer"):
        _check_files(path, config)
        source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        tokenizer(tokenizer.decode([0])), tokenizer.all_special_ids  # some malformed files are noticed on use only
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    return tokenizer


def read_template(place: str) -> str:
    """The chat template in a file, or that of a model. Raises TemplateError where there is none."""
    path = Path(place).expanduser()
    if path.is_file() or path.suffix in (".jinja", ".j2", ".txt"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"chat_template: {place} cannot be read ({error}); name a .jinja file") from error
    template = chat_template(load_tokenizer(ModelConfig(path=place)))
    if template is None:
        raise TemplateError(f"chat_template: {place} has no chat template either; name a .jinja file or a chat model")
    return template


def dtype_of(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type that the model computes in on `device`."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.dtype, auto)


def stored_dtype(config: ModelConfig) -> torch.dtype | None:
    """The type that most of the checkpoint's weights have on disk; None where that is not known, or no float's."""
    with suppress(HeadstartError, OSError, SafetensorError, AttributeError):
        path = resolve(config.path)
        index = _settings(path, INDEX, config.revision)
        name = next(iter(index["weight_map"].values())) if index else WEIGHTS
        file = cached_file(path, name, revision=config.revision, _raise_exceptions_for_missing_entries=False)
        with safe_open(file or "", framework="pt") as opened:
            types = Counter(opened.get_slice(key).get_dtype() for key in opened.keys())  # noqa: SIM118
        most = types.most_common(1)[0][0]
        return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(most)
    return None


def sharing_weights(model: Any) -> Any:
    """A second model of the same weights: modules of its own, and tensors in common. What is put beside the layers of
    one, such as an adapter, is not in the other."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return deepcopy(model, tensors)


def load_model(config: ModelConfig, device: torch.device, *, mapped: bool = False) -> Any:
    """The checkpoint as an `AutoModelForCausalLM` in evaluation mode on `device`, its `adapter` merged in.

    Only safetensors weights are read (a pickle can run code). `dtype: auto` is bfloat16 on a GPU and float32 on a CPU.
    With `mapped` it stays on the CPU, and weights of that type are still the mapped files, which take no memory.
    Raises ModelError when the checkpoint is missing or malformed, has no safetensors, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    path = resolve(config.path)
    dtype = dtype_of(config, device)
    extra = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    with doing(f"loading the weights of {config.path}"), _refusing(config.path, "model"):
        special = "quantization_config" in _check_files(path, config) or config.trust_remote_code
        # First without memory: transformers makes what is missing at random, in any size that config.json asks for.
        for place in ({},) if special else ({"device_map": "meta"}, {}):
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                revision=config.revision,
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them below
                **extra,
                **place,
            )
            _check_complete(config.path, info)
            parts_of(model)
    if config.adapter is not None:
        model = merge_adapter(model, config.adapter)
    if mapped:
        return model.eval()
    if device.type == "cpu":
        # The weights are still the mapped file: whoever overwrites it during a run would put trained weights back.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        _give_back()
    return model.to(device).eval()


def _give_back() -> None:
    """Let the system have the memory that loading used and freed. glibc keeps what lies between tensors that are alive:
    2 GiB of 7 after two models of 0.5 B parameters that were converted from bfloat16."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries, other systems
        ctypes.CDLL(None).malloc_trim(0)


def load_outline(config: ModelConfig, device: torch.device) -> Any:
    """The model that `load_model` would make, on the meta device: every shape and no memory, from config.json alone.

    `device` is where it would be loaded. Raises ModelError as `load_model` does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path, code = resolve(config.path), {"trust_remote_code": config.trust_remote_code}
    extra = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    with _refusing(config.path, "config.json"):
        _check_files(path, config)
        settings = AutoConfig.from_pretrained(path, revision=config.revision, **code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, dtype=dtype_of(config, device), **code, **extra)
        parts_of(model)
    return model.eval()


def _check_files(path: str, config: ModelConfig) -> dict[str, Any]:
    """config.json's content. Raises ModelError where a file is malformed, or where transformers would follow an adapter
    to another model, read weights that are no safetensors of this folder, or make modules without end."""
    settings = _settings(path, "config.json", config.revision)
    if _settings(path, "adapter_config.json", config.revision) is not None:
        raise ModelError(f"{path} holds a peft adapter; give its base model as path and this one as adapter")
    if settings is None:
        return {}  # transformers says why
    for name in ("generation_config.json", "tokenizer_config.json"):
        _settings(path, name, config.revision)
    shards = (_settings(path, INDEX, config.revision) or {"weight_map": {}}).get("weight_map")
    files = dict.fromkeys(map(str, shards.values() if isinstance(shards, dict) else [shards]), INDEX)
    for name, source in {**files, str(settings.get("transformers_weights", WEIGHTS)): "config.json"}.items():
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise ModelError(
                f"{path}: {source} names {name[:80]!r} as weights. Only safetensors of the checkpoint's own folder are "
                "read (a pickle can run code); convert others with save_pretrained"
            )
        if (Path(path) / name).is_file():
            with _refusing(f"{path}/{name}", "file"), safe_open(Path(path) / name, framework="pt"):
                pass
    return settings


def _settings(path: str, name: str, revision: str | None) -> dict[str, Any] | None:
    """The object in a JSON file of a folder or hub repository; None where there is no such file. Raises ModelError."""
    first = name == "config.json"  # without a network it is said there, rather than tried for every file
    raises = {f"_raise_exceptions_for_{what}": first for what in ("missing_entries", "connection_errors")}
    file = cached_file(path, name, revision=revision, **raises)
    if file is None:
        return None
    hook = None if name == INDEX else _bounded  # an index's metadata say how large all weights are
    try:
        text = Path(file).read_bytes().decode()
        found = json.loads(text, parse_float=_number, parse_constant=_number, object_pairs_hook=hook)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {name} is not a valid JSON file of settings: {error}. Correct or copy it") from error
    return found


def _number(text: str) -> float:
    if not math.isfinite(float(text)) and "Infinity" not in text:  # Mamba's time_step_limit goes to Infinity
        raise ValueError(f"it holds the number {text[:20]}")
    return float(text)


def _bounded(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in pairs:
        for pattern, least, most in BOUNDS:
            if isinstance(value, int | float) and re.fullmatch(pattern, key) and not least <= value <= most:
                raise ValueError(f"{key} is {value:.9g}, not from {least} to {most}")
        ids = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and not all(isinstance(i, int | None) for i in ids):
            raise ValueError(f"{key} is {value!r:.80}, not a token id")
    return dict(pairs)


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
    if out_of_memory(error):
        remedy = "Memory ran out: free some, or take a smaller model or dtype"
    elif isinstance(error, SafetensorError):
        remedy = "A safetensors file is damaged; copy or download it again"
    elif not Path(path).expanduser().is_dir():
        remedy = "Check the name and the network, or give a folder"
    elif "no file named model.safetensors" in reason:
        remedy = "Only safetensors are read (a pickle can run code); convert other weights with save_pretrained"
    else:
        files = "tokenizer.json and tokenizer_config.json" if what == "tokenizer" else "generation_config.json"
        remedy = f"Check config.json, {files}: the folder must hold a whole checkpoint of a causal language model"
    return f"{path}: the {what} cannot be loaded: {reason}. {remedy}"
