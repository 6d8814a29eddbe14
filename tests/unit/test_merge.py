"""Merging specialists: against plain sums in float64, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from examples.merge import mean, merge, task_arithmetic
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from headstart.errors import ConfigError
from headstart.testing import WORDS, random_model, word_tokenizer, write_checkpoint


def state(seed: int, rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(rows, 2, generator=generator), "b": torch.randn(4, generator=generator)}


@given(st.integers(0, 100), st.lists(st.floats(0.1, 3.0), min_size=1, max_size=4), st.floats(-1.0, 2.0))
@settings(max_examples=30, deadline=None)
def test_both_ways_are_their_formulas(seed: int, weights: list[float], scale: float) -> None:
    base, models = state(seed), [state(seed + 1 + k) for k in range(len(weights))]
    for name, start in base.items():
        average = sum(w / sum(weights) * m[name].double() for w, m in zip(weights, models, strict=True))
        torch.testing.assert_close(mean(models, weights)[name].double(), average, rtol=1e-5, atol=1e-6)
        moved = start.double() + scale * sum(m[name].double() - start.double() for m in models)
        torch.testing.assert_close(task_arithmetic(base, models, scale)[name].double(), moved, rtol=1e-5, atol=1e-5)
        one = task_arithmetic(base, models, 1 / len(models))[name]
        torch.testing.assert_close(one, mean(models)[name], rtol=1e-4, atol=1e-5)


def test_one_model_is_itself_and_types_stay() -> None:
    half = {name: tensor.bfloat16() for name, tensor in state(0).items()}
    assert all(torch.equal(mean([half])[name], tensor) for name, tensor in half.items())
    assert {tensor.dtype for tensor in task_arithmetic(half, [half, half]).values()} == {torch.bfloat16}
    assert all(torch.equal(task_arithmetic(half, [half])[name], tensor) for name, tensor in half.items())


def test_other_shapes_and_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model 2 has a as \(5, 2\), the first as \(3, 2\)"):
        mean([state(0), state(1, rows=5)])
    with pytest.raises(ConfigError, match="cannot be merged"):
        task_arithmetic(state(1, rows=5), [state(0)])
    other = word_tokenizer(WORDS[::-1])
    paths = [
        write_checkpoint(tmp_path / str(k), random_model("llama", 46, seed=k), tokenizer)
        for k, tokenizer in enumerate((word_tokenizer(), other, word_tokenizer()))
    ]
    with pytest.raises(ConfigError, match="different tokenizers"):
        merge(tmp_path / "out", [str(path) for path in paths[:2]])
    merge(tmp_path / "out", [str(paths[0]), str(paths[2])], base=str(paths[0]), scale=1.0)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", paths[2]))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
