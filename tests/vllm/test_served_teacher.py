"""Teachers that score from a real vLLM server: what it can give is found out, and scores are those of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_server import RealServer
from references import LONG, VOCABULARY, local, scores

from headstart.checks.server import run_server_preflight
from headstart.distillation.run import distill
from headstart.errors import VocabularyError
from headstart.serving.client import Client
from headstart.teacher.connect import connect
from headstart.teacher.endpoint import Endpoint
from headstart.testing import byte_tokenizer, word_tokenizer, write_checkpoint
from support import make_config, write_prompts

PROMPT, COMPLETION = LONG[:20], LONG[20:60]
WIDTH = 9


@pytest.fixture(scope="module")
def endpoint(server: RealServer) -> Iterator[Endpoint]:
    client = Client([server.url], timeout=60, deadline=60)
    yield connect(client, None, byte_tokenizer(), WIDTH)
    client.close()


@pytest.fixture
def candidates() -> Any:
    """Candidates of every completion token, the token that stands there last; some rows have fewer."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, VOCABULARY, (len(COMPLETION), WIDTH))
    found[::3, 4] = -1
    found[:, -1] = COMPLETION
    return found


@pytest.fixture(scope="module")
def reference(checkpoints: tuple[Path, Path]) -> Any:
    """Log-probabilities `[n, V]` of the completion's tokens."""
    return scores(local(checkpoints[0]), [*PROMPT, *COMPLETION])[len(PROMPT) - 1 : -1].numpy()


def chosen(reference: Any, candidates: Any) -> Any:
    picked = np.take_along_axis(reference, np.maximum(candidates, 0), 1)
    return np.where(candidates < 0, -np.inf, picked)


def test_what_the_server_can_give_is_found_out(endpoint: Endpoint) -> None:
    found = endpoint.capabilities()
    assert (found.level, found.model, found.width) == ("full", "student", None)
    assert found.max_positions == 511  # one is left to generate
    assert found.version == "0.32.0"
    assert found.tokenizer is not None
    assert any("V2 model runner" in note for note in found.notes)


def test_another_tokenizer_is_seen(server: RealServer) -> None:
    client = Client([server.url], timeout=60, deadline=60)
    with pytest.raises(VocabularyError):
        connect(client, None, word_tokenizer(), WIDTH)
    client.close()


@pytest.mark.parametrize("start", [0, 7])
def test_scores_are_those_of_transformers(endpoint: Endpoint, candidates: Any, reference: Any, start: int) -> None:
    found = endpoint.score(PROMPT, COMPLETION, candidates[start:], start)
    np.testing.assert_allclose(found, chosen(reference, candidates)[start:], atol=1e-5)


def test_the_top_k_and_the_sampled_token_are_those_of_transformers(
    endpoint: Endpoint, candidates: Any, reference: Any
) -> None:
    top = Endpoint(endpoint.client, replace(endpoint.found, level="top_k", width=40))
    found, expected = top.score(PROMPT, COMPLETION, candidates), chosen(reference, candidates)
    rank = (reference[:, None, :] > np.take_along_axis(reference, np.maximum(candidates, 0), 1)[:, :, None]).sum(-1)
    known = (rank < 40) | (candidates < 0)
    known[:, -1] = True
    assert (np.isnan(found) == ~known).all()
    assert 0 < np.isnan(found).sum() < found.size
    np.testing.assert_allclose(found[known], expected[known], atol=1e-5)


def test_an_echo_scores_the_sampled_token(endpoint: Endpoint, candidates: Any, reference: Any) -> None:
    echo = Endpoint(endpoint.client, replace(endpoint.found, level="sampled", width=1))
    found = echo.score(PROMPT, COMPLETION, candidates)
    np.testing.assert_allclose(found[:, -1], chosen(reference, candidates)[:, -1], atol=1e-5)
    assert np.isnan(found[:, :4]).all()


def world(folder: Path, checkpoints: tuple[Path, Path]) -> None:
    """A teacher that the server has, and a student that it has not."""
    for name, checkpoint in zip(("teacher", "student"), checkpoints, strict=True):
        write_checkpoint(folder / name, local(checkpoint), byte_tokenizer())
    write_prompts(folder)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_preflight_says_what_the_server_gives_and_compares_it_with_a_copy(
    server: RealServer, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    world(tmp_path / "world", checkpoints)
    config = make_config(tmp_path / "world", "divergence.support={type: top_k, k: 8}")
    levels = []
    for copy in checkpoints:
        gives, compared = run_server_preflight(config, server.url, None, str(copy)).findings
        assert "log-probabilities of the whole vocabulary" in gives.message
        levels.append((gives.severity, compared.severity))
    assert levels == [("ok", "ok"), ("ok", "blocking")]


@pytest.mark.parametrize("support", ["{type: top_k, k: 8}", "{type: top_k, k: 8, tail: unbiased}", "{type: sampled}"])
def test_a_run_is_that_of_the_same_teacher_in_process(
    server: RealServer, checkpoints: tuple[Path, Path], tmp_path: Path, support: str
) -> None:
    world(tmp_path / "world", checkpoints)
    common = [f"divergence.support={support}", "horizon.tokens=12"]
    distill(make_config(tmp_path / "world", *common), out=tmp_path / "here")
    there = make_config(tmp_path / "world", *common, f"teacher={{type: server, urls: [{server.url}]}}")
    distill(there, out=tmp_path / "there")
    here, there_steps = metrics(tmp_path / "here"), metrics(tmp_path / "there")
    assert len(here) == len(there_steps) == 4
    for one, other in zip(here, there_steps, strict=True):
        for key in ("loss", "student_logprob", "teacher_logprob", "grad_norm"):
            assert other[key] == pytest.approx(one[key], abs=2e-5, rel=2e-5), key
        assert other["teacher_bytes"] > 0


def test_one_server_is_both_teacher_and_student(
    server: RealServer, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    """The base model scores what its own adapter says; an adapter that is still empty has nothing to learn from it."""
    world(tmp_path / "world", (checkpoints[0], checkpoints[0]))
    both = f"{{engine: server, urls: [{server.url}], sync_dir: {tmp_path / 'sync'}, temperature: 1.0, top_p: 1.0}}"
    config = make_config(
        tmp_path / "world",
        f"rollout={both}",
        f"teacher={{type: server, urls: [{server.url}], model: student}}",
        "tuning={type: lora, r: 4, dropout: 0.0}",
        "divergence.support={type: top_k, k: 8}",
        "training.steps=2",
    )
    distill(config, out=tmp_path / "run")
    first, second = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.0, abs=1e-5)
    assert max(first["engine_gap_max"], second["engine_gap_max"]) < 1e-4
