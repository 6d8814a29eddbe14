"""Reloads that go wrong: on a CPU a head that is the embedding matrix stays the old one, with status 200; and a path
without weights ends the server."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import httpx
import pytest
import torch
from real_server import RealServer
from references import gap, local, scores, write_adapter

from headstart.errors import ServerError
from headstart.models.causal import CausalModel
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt
from headstart.rollout.sync import WeightSync
from headstart.serving.client import Client

VOCABULARY = 46
IDS = tuple(5 + (7 * i) % 40 for i in range(60))


def test_a_tied_head_stays_old_when_weights_are_reloaded(
    tied_server: RealServer, tied_checkpoints: tuple[Path, Path]
) -> None:
    old, new = (local(folder) for folder in tied_checkpoints)
    with torch.inference_mode():
        hidden = new.model(torch.tensor([IDS])).last_hidden_state[0, :-1].double()
        right, mixed = (torch.log_softmax(hidden @ m.lm_head.weight.double().T, -1).float() for m in (new, old))
    tied_server.reload(tied_checkpoints[1])
    tied_server.reset()
    found = tied_server.prompt_logprobs(IDS, VOCABULARY)
    assert gap(found, right) > 0.5  # what a probe against the trainer sees
    assert gap(found, mixed) < 1e-5  # new layers under the old head


def test_the_probe_sees_a_tied_head_that_stayed_old(
    tied_server: RealServer, tied_checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    model, client = local(tied_checkpoints[0]), Client([tied_server.url], timeout=60, deadline=60)
    prompts = [Prompt(0, "p", IDS[:20], ())]
    sync = WeightSync(
        client, CausalModel(model, VOCABULARY, 0), Runtime.start("cpu"), tmp_path, "checkpoint", prompts, 80
    )
    tied_server.reload(tied_checkpoints[0])
    sync.sync(0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ServerError, match="tied embeddings"):
        sync.sync(1)
    client.close()


def test_an_adapter_of_a_tied_model_arrives(
    tied_server: RealServer, tied_checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    """What to do instead on a CPU. (The base's old head is put back by a reload of the old weights.)"""
    tied_server.reload(tied_checkpoints[0])
    tied_server.reset()
    adapter = write_adapter(tmp_path / "adapter", tied_checkpoints[0], seed=3)
    tied_server.load_adapter(adapter)
    found = tied_server.prompt_logprobs(IDS, VOCABULARY, "policy")
    assert gap(found, scores(local(tied_checkpoints[0], adapter), IDS)[:-1]) < 2e-5


def test_a_folder_that_the_server_cannot_see_ends_the_engine_and_the_run(
    tied_server: RealServer, tied_checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last in this file. The run ends at once, and does not wait for an engine that will not come back."""
    client = Client([tied_server.url], timeout=60, deadline=600)
    student, prompts = CausalModel(local(tied_checkpoints[0]), VOCABULARY, 0), [Prompt(0, "p", IDS[:20], ())]
    sync = WeightSync(client, student, Runtime.start("cpu"), tmp_path / "sync", "checkpoint", prompts, 80)
    monkeypatch.setattr(WeightSync, "_write", lambda self, path: None)
    start = time.monotonic()
    with pytest.raises(ServerError, match="collective_rpc failed: status 500"):
        sync.sync(0)
    assert time.monotonic() - start < 60
    client.close()
    for _ in range(3):
        with contextlib.suppress(httpx.TransportError):  # the process may have ended, or wait for the engine
            ask = {"model": "student", "prompt": [5], "max_tokens": 1}
            assert tied_server.http.post("/v1/completions", json=ask, timeout=10).status_code == 500
        time.sleep(1)
