"""What a checkpoint's files may say, checked before transformers or peft opens them.

transformers reads whatever file an index names (a pickle too), follows an adapter to another model, and makes a model
of any size that config.json asks for. Here only safetensors in the checkpoint's own folder pass, and bounded sizes.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from headstart.errors import ModelError

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
OTHERS = ("generation_config.json", "tokenizer_config.json")
COUNTS = re.compile(r"(n|num)_(\w+_)?(layer|layers|experts|blocks|labels)")
"""Settings that say how many modules are made, one after another."""
MOST = 4096
"""Of each; the largest models have some hundreds."""


def stored(path: str, name: str, revision: str | None = None) -> Path | None:
    """The file `name` of a folder or hub repository (downloaded if need be); None where there is none."""
    from transformers.utils import cached_file

    quietly = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    found = cached_file(path, name, revision=revision, **quietly)
    return None if found is None else Path(found)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError for anything else, for NaN, and for numbers that overflow."""
    try:
        found = json.loads(file.read_bytes().decode(), parse_float=_float, parse_int=_int, parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not a valid JSON file: {error}. Copy or download it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds a {type(found).__name__}, not a JSON object. Copy or download it again")
    return found


def check_checkpoint(path: str, revision: str | None, *, trusted: bool) -> list[str]:
    """Names of the files that hold the weights. `trusted` allows attention code from the hub.

    Raises ModelError when a file is malformed, names weights that are no safetensors of this very folder, or asks for
    an absurd number of modules; and when the checkpoint is an adapter.
    """
    if stored(path, ADAPTER, revision) is not None:
        raise ModelError(f"{path} holds a peft adapter; give its base model as path and this one as adapter")
    config_file = stored(path, "config.json", revision)
    if config_file is None:
        return []  # transformers says why
    config = read_object(config_file)
    index_file, *others = (stored(path, name, revision) for name in (INDEX, *OTHERS))
    for file in others:
        if file is not None:
            read_object(file)
    _check_config(f"{path}: config.json", config, trusted)
    single = config.get("transformers_weights", WEIGHTS)
    names = [single]
    if index_file is not None:
        shards = read_object(index_file).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index_file} has no weight_map of names to files. Copy or download it again")
        names += shards.values()
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            where = "config.json" if name is single else INDEX
            raise ModelError(
                f"{path}: {where} names {name!r} as a file of weights; only .safetensors files in the checkpoint's own "
                "folder are read (a pickle can run code). Convert other weights with save_pretrained"
            )
    return names[:1] if stored(path, single, revision) is not None else sorted(set(names[1:]))


def elements(path: str, names: list[str], revision: str | None) -> int:
    """How many numbers the weight files hold, by their headers. Raises SafetensorError, naming the damaged file."""
    total = 0
    for name in names:
        file = stored(path, name, revision)
        if file is None:
            continue  # transformers says what is missing
        try:
            with safe_open(file, framework="pt") as opened:
                total += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise SafetensorError(f"{name}: {error}") from error
    return total


def _check_config(where: str, config: dict[str, Any], trusted: bool) -> None:
    left: list[tuple[str, Any]] = [*config.items()]
    while left:
        key, value = left.pop()
        if isinstance(value, dict | list):
            left += value.items() if isinstance(value, dict) else [("", item) for item in value]
        if COUNTS.fullmatch(key) and isinstance(value, int | float) and not 0 <= value <= MOST:
            raise ModelError(f"{where}: {key} is {value}, not from 0 to {MOST}. Copy or download the file again")
        if key.endswith("_implementation") and "/" in str(value) and not trusted:
            raise ModelError(
                f"{where}: {key} {value!r} is code to download from the hub. Remove it, or set trust_remote_code=true "
                "if you trust its author"
            )


def _float(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return float(text)


def _int(text: str) -> int:
    # The largest a tokenizer's model_max_length is ("no bound"): int(1e30).
    if len(text) > 31:
        raise ValueError(f"the number {text[:20]}... is too large")
    return int(text)


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("it holds NaN")
    return float(text)  # Mamba's time_step_limit goes to infinity
