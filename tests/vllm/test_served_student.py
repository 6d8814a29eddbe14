"""Students that speak from a real vLLM server: runs, weights that arrive, and the traps that the probe must see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_server import RealServer
from references import VOCABULARY, local, write_adapter

from headstart.distillation.run import distill
from headstart.errors import ServerError
from headstart.models.causal import CausalModel
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt, Sampling
from headstart.rollout.engine import InProcessEngine
from headstart.rollout.served import ServedEngine
from headstart.rollout.sync import WeightSync
from headstart.serving.client import Client
from headstart.testing import byte_tokenizer, random_model, write_checkpoint
from support import make_config, write_prompts

PROMPTS = [Prompt(i, f"p{i}", tuple(5 + (31 * i + 7 * j) % 250 for j in range(4 + 3 * i)), ()) for i in range(5)]
GREEDY = Sampling(0.0, 1.0, 0)


class Deaf(Client):
    """A client whose requests to reset a cache are lost on the way, with a reply that says they were not."""

    def post(self, path: str, body: Any, *, url: str | None = None, retry: bool = True) -> Any:
        if path.startswith(("/pause", "/resume", "/reset")):
            return {"success": True}
        return super().post(path, body, url=url, retry=retry)


def engine_of(
    model: Any, client: Client, folder: Path, form: Any, vocabulary: int = VOCABULARY
) -> tuple[ServedEngine, InProcessEngine]:
    """`model` served by `client`'s server, and sampled here."""
    student = CausalModel(model, vocabulary, 0)
    sync = WeightSync(client, student, Runtime.start("cpu"), folder, form, PROMPTS, 100)
    return ServedEngine(client, student, [1], sync), InProcessEngine(student, [1])


def shifted(model: Any, seed: int) -> None:
    """What a training step does to `model`, only larger."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and ("lora_" in name or not any(".lora_" in n for n, _ in model.named_parameters())):
                weight.add_(torch.randn_like(weight), alpha=0.05)


@pytest.mark.parametrize("form", ["adapter", "checkpoint"])
def test_rollouts_follow_the_weights(
    server: RealServer, checkpoints: tuple[Path, Path], tmp_path: Path, form: str
) -> None:
    model = local(checkpoints[0])
    if form == "adapter":
        model = local(checkpoints[0], write_adapter(tmp_path / "first", checkpoints[0], seed=5))
    client = Client([server.url], timeout=60, deadline=60)
    served, ours = engine_of(model, client, tmp_path / "sync", form)
    seen = []
    for step in range(3):
        served.sync(step)
        options: dict[str, Any] = {"samples": 1, "max_tokens": 24, "sampling": GREEDY, "key": (0, "rollout", step)}
        found, expected = served.generate(PROMPTS, **options), ours.generate(PROMPTS, **options)
        assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
        assert [r.stopped for r in found] == [r.stopped for r in expected]
        seen.append([r.completion_ids for r in found])
        shifted(model, step)
    assert seen[0] != seen[1] != seen[2]
    client.close()
    if form == "checkpoint":
        server.reload(checkpoints[0])
        server.reset()


@pytest.mark.parametrize("form", ["adapter", "checkpoint"])
def test_candidates_are_those_of_the_engine_in_process(
    server: RealServer, checkpoints: tuple[Path, Path], tmp_path: Path, form: str
) -> None:
    adapter = write_adapter(tmp_path / "first", checkpoints[0], seed=5) if form == "adapter" else None
    client = Client([server.url], timeout=60, deadline=60)
    served, ours = engine_of(local(checkpoints[0], adapter), client, tmp_path / "sync", form)
    served.sync(0)
    options: dict[str, Any] = {"samples": 1, "max_tokens": 16, "sampling": GREEDY, "key": (0, "rollout", 0)}
    found, expected = (e.generate(PROMPTS, **options, candidates=6) for e in (served, ours))
    for one, other in zip(found, expected, strict=True):
        assert one.candidate_ids is not None
        assert other.candidate_ids is not None
        assert one.candidate_ids.tolist() == other.candidate_ids.tolist()
    drawn = served.generate(
        PROMPTS, samples=3, max_tokens=16, sampling=Sampling(1.0, 1.0, 0), key=(0, "rollout", 1), candidates=6
    )
    again = served.generate(
        PROMPTS, samples=3, max_tokens=16, sampling=Sampling(1.0, 1.0, 0), key=(0, "rollout", 1), batch_size=2
    )
    assert [r.completion_ids for r in drawn] == [r.completion_ids for r in again]
    assert len({r.completion_ids for r in drawn}) > len(PROMPTS)
    client.close()


def test_a_cache_that_was_not_reset_is_seen(server: RealServer, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    model, client = local(checkpoints[0]), Deaf([server.url], timeout=60, deadline=60)
    served, _ = engine_of(model, client, tmp_path / "sync", "checkpoint")
    shifted(model, 1)
    with pytest.raises(ServerError, match=r"samples with other weights than it was given.*nats"):
        served.sync(0)
    client.close()
    server.reload(checkpoints[0])
    server.reset()


def test_a_server_that_was_given_other_weights_is_refused(
    server: RealServer, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    """What a restart looks like to 0.32, whose replies carry no version on this route."""
    client = Client([server.url], timeout=60, deadline=60)
    served, _ = engine_of(local(checkpoints[0]), client, tmp_path / "sync", "checkpoint")
    served.sync(0)
    server.post("/update_weight_version", {"new_version": "default"})
    with pytest.raises(ServerError, match="'default'"):
        served.generate(PROMPTS, samples=1, max_tokens=4, sampling=GREEDY, key=(0, "rollout", 0))
    client.close()


@pytest.mark.parametrize("tuning", ["{type: full}", "{type: lora, r: 4, dropout: 0.0}"])
def test_a_run_trains_on_what_the_server_samples(
    server: RealServer, checkpoints: tuple[Path, Path], tmp_path: Path, tuning: str
) -> None:
    tokenizer, teacher = byte_tokenizer(), random_model("qwen2", VOCABULARY, seed=7)
    world = tmp_path / "world"
    write_checkpoint(world / "teacher", teacher, tokenizer)
    write_checkpoint(world / "student", local(checkpoints[0]), tokenizer)
    write_prompts(world)
    served = (
        f"rollout={{engine: server, urls: [{server.url}], sync_dir: {tmp_path / 'sync'}, temperature: 1.0, top_p: 1.0}}"
    )
    distill(make_config(world, f"tuning={tuning}", served, "optimizer.lr=3e-3"), out=tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == 4
    assert all(step["engine_gap_max"] < 1e-4 for step in steps)
    assert steps[-1]["divergence"] != steps[0]["divergence"]
    server.reload(checkpoints[0])
    server.reset()


def test_a_folder_that_the_server_cannot_see_is_an_error_in_words(
    server: RealServer, checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter the server lives on; with a checkpoint it would not."""
    adapter = write_adapter(tmp_path / "first", checkpoints[0], seed=5)
    client = Client([server.url], timeout=60, deadline=60)
    served, _ = engine_of(local(checkpoints[0], adapter), client, tmp_path / "sync", "adapter")
    monkeypatch.setattr(WeightSync, "_write", lambda self, path: None)
    with pytest.raises(ServerError, match="No adapter found"):
        served.sync(0)
    assert server.http.get("/is_paused").json() == {"is_paused": False}
    client.close()
