"""Tokenizers of real model families, read from `../shared/data` beside the checkout (no weights, no network)."""

from __future__ import annotations

import atexit
import functools
import lzma
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[1].parent / "shared" / "data"


@functools.cache
def real_tokenizer_folder(name: str) -> Path:
    """A folder with `name`'s tokenizer (qwen3, qwen2_5, phi3_mini, gpt2, t5_small); skips the test when absent."""
    source = DATA / "tokenizers" / name
    if not source.is_dir():
        pytest.skip(f"the real {name} tokenizer is not beside the checkout ({source})")
    folder = _scratch() / name
    folder.mkdir()
    shutil.copy(source / "tokenizer_config.json", folder)
    (folder / "tokenizer.json").write_bytes(lzma.decompress((source / "tokenizer.json.xz").read_bytes()))
    return folder


@functools.cache
def real_tokenizer(name: str) -> Any:
    """The loaded tokenizer, one per session: do not change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_tokenizer_folder(name))


def real_data(name: str) -> Path:
    """A data file such as `gsm8k/test.jsonl`; skips the test when absent."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the checkout ({path})")
    return path


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="headstart-tokenizers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
