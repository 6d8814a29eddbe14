"""Specialists that share a base, merged into one model: the baseline beside a student of several teachers.

    python -m examples.merge OUT MODEL MODEL                            # the mean of their weights
    python -m examples.merge OUT MODEL MODEL --base BASE --scale 1.0    # BASE + scale * sum of (MODEL - BASE)

The second is task arithmetic (arXiv 2212.04089); with scale 1 / (number of models) it is the mean. Sums are made in
float32, and the result has the type and the tokenizer of the first model. Models of other shapes or another tokenizer
cannot be merged, and are refused: they can still teach one student (docs/how-to/several-teachers.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from headstart.config.models import ModelConfig
from headstart.errors import ConfigError
from headstart.models.load import load_model, load_tokenizer

CPU = torch.device("cpu")


def mean(models: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of every tensor; equal weights by default. Raises ConfigError where shapes differ."""
    _check(models)
    weights = weights or [1.0] * len(models)
    shares = [weight / sum(weights) for weight in weights]
    return {
        name: sum(share * model[name].float() for share, model in zip(shares, models, strict=True)).to(first.dtype)
        for name, first in models[0].items()
    }


def task_arithmetic(
    base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], scale: float = 1.0
) -> dict[str, Tensor]:
    """The base plus `scale` times the sum of what each model changed. Raises ConfigError where shapes differ."""
    _check([*models, base])
    return {
        name: (start.float() + scale * sum(model[name].float() - start.float() for model in models)).to(start.dtype)
        for name, start in base.items()
    }


def _check(models: Sequence[Mapping[str, Tensor]]) -> None:
    first = {name: tuple(tensor.shape) for name, tensor in models[0].items()}
    for place, model in enumerate(models[1:], start=2):
        other = {name: tuple(tensor.shape) for name, tensor in model.items()}
        if wrong := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
            raise ConfigError(
                f"model {place} has {wrong[0]} as {other.get(wrong[0], 'absent')}, the first as "
                f"{first.get(wrong[0], 'absent')} ({len(wrong)} such): they share no base and cannot be merged; let "
                "them teach one student instead"
            )


def merge(out: Path, models: Sequence[str], base: str | None = None, scale: float = 1.0) -> None:
    """Write the merged model and the first one's tokenizer to `out`. Raises ConfigError where they cannot be merged."""
    sources = [ModelConfig(path=path) for path in models]
    tokenizers = [load_tokenizer(source) for source in sources]
    if any(tokenizer.get_vocab() != tokenizers[0].get_vocab() for tokenizer in tokenizers):
        raise ConfigError(f"{', '.join(models)} have different tokenizers: their rows mean different tokens")
    loaded = [load_model(source, CPU) for source in sources]
    states = [model.state_dict() for model in loaded]
    if base is None:
        merged = mean(states)
    else:
        merged = task_arithmetic(load_model(ModelConfig(path=base), CPU).state_dict(), states, scale)
    loaded[0].load_state_dict(merged)
    loaded[0].save_pretrained(out)
    tokenizers[0].save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("models", nargs="+", help="folders or hub names")
    parser.add_argument("--base", help="what they were trained from; without it the mean is taken")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sum of changes, with --base")
    arguments = parser.parse_args()
    merge(arguments.out, arguments.models, arguments.base, arguments.scale)


if __name__ == "__main__":
    main()
