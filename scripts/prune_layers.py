"""A checkpoint without some of its layers, as a student that needs training: `layers` count from 0.

    python scripts/prune_layers.py CHECKPOINT OUT --drop 13 17

OUT is an ordinary Hugging Face folder in the checkpoint's dtype: what the configuration says layer by layer is cut too,
tied weights stay tied, the tokenizer's files are copied as they are.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from headstart.files import atomic_folder

REWRITTEN = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt")


def pruned_config(config: Any, drop: Sequence[int]) -> Any:
    """The configuration with fewer layers: every list in it that has an entry per layer loses those of `drop`.

    Raises ValueError for a layer that does not exist, and where none would be left.
    """
    count = config.num_hidden_layers
    unknown = sorted(layer for layer in drop if not 0 <= layer < count)
    if unknown:
        raise ValueError(f"no layer {', '.join(map(str, unknown))}: the model has {count} layers, 0 to {count - 1}")
    if len(set(drop)) == count:
        raise ValueError(f"all {count} layers would be dropped; keep at least one")
    values = config.to_dict()
    for name, value in values.items():
        if isinstance(value, list) and len(value) == count:
            values[name] = [entry for layer, entry in enumerate(value) if layer not in drop]
    values["num_hidden_layers"] = count - len(set(drop))
    return type(config).from_dict(values)


def without_layers(model: Any, drop: Sequence[int]) -> Any:
    """The model itself, changed in place."""
    config, decoder = pruned_config(model.config, drop), model.get_decoder()
    decoder.layers = nn.ModuleList(layer for i, layer in enumerate(decoder.layers) if i not in drop)
    for place, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # where it finds its keys and values in the cache
                module.layer_idx = place
    model.config = decoder.config = config
    return model


def prune(checkpoint: Path, out: Path, drop: Sequence[int]) -> None:
    """Raises FileExistsError where `out` is there already, FileNotFoundError where `checkpoint` holds no model."""
    if out.exists():
        raise FileExistsError(f"{out} exists already; name another folder or remove it")
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint} is no folder with a config.json")
    pruned_config(AutoConfig.from_pretrained(checkpoint), drop)  # before the weights are read
    model = without_layers(AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"), drop)
    with atomic_folder(out) as folder:
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*REWRITTEN, ".*"))
        model.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder with a Hugging Face model")
    parser.add_argument("out", type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--drop", type=int, nargs="+", required=True, metavar="LAYER", help="from 0 on")
    options = parser.parse_args(arguments)
    try:
        prune(options.checkpoint, options.out, options.drop)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    print(f"{options.out}: without layer {', '.join(map(str, sorted(set(options.drop))))}")


if __name__ == "__main__":
    main()
