"""Checkpoints and real vLLM servers, which all tests share: leave them with the weights they started with.

`make test-vllm` sets HEADSTART_VLLM, without which these tests are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_server import RealServer

from headstart.testing import byte_tokenizer, random_model, word_tokenizer, write_checkpoint

# Heads of 32 numbers: the smallest that vLLM's attention on a CPU takes. Weights small enough that log-probabilities
# stay above -20, where float32 still resolves 1e-6.
SHAPE = {"hidden": 128, "scale": 0.1}


@pytest.fixture(scope="session")
def interpreter() -> str:
    """The Python of vLLM's environment."""
    path = os.environ.get("HEADSTART_VLLM")
    if not path:
        pytest.skip("HEADSTART_VLLM names no Python with vLLM: `make test-vllm` makes one and runs these tests")
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two Qwen2 checkpoints with heads of their own; the second is what training made of the first."""
    folder, tokenizer = tmp_path_factory.mktemp("untied"), byte_tokenizer()
    models = [random_model("qwen2", len(tokenizer), seed=seed, **SHAPE) for seed in (0, 1)]
    return _written(folder, models, tokenizer)


@pytest.fixture(scope="module")
def tied_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two Llama checkpoints whose head is the embedding matrix."""
    folder, tokenizer = tmp_path_factory.mktemp("tied"), word_tokenizer()
    models = [random_model("llama", len(tokenizer), seed=seed, **SHAPE) for seed in (0, 1)]
    assert models[0].config.tie_word_embeddings
    return _written(folder, models, tokenizer)


@pytest.fixture(scope="session")
def server(interpreter: str, checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of the first untied checkpoint."""
    with RealServer(interpreter, checkpoints[0], tmp_path_factory.mktemp("log") / "server.log") as started:
        yield started


@pytest.fixture(scope="module")
def tied_server(
    interpreter: str, tied_checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server of the first tied checkpoint."""
    with RealServer(interpreter, tied_checkpoints[0], tmp_path_factory.mktemp("log") / "server.log") as started:
        yield started


def _written(folder: Path, models: list[Any], tokenizer: Any) -> tuple[Path, Path]:
    first, second = (write_checkpoint(folder / f"step-{i}", model, tokenizer) for i, model in enumerate(models))
    return first, second
