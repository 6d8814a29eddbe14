"""Rollouts from a server are the student's own, and no silent trap of a weight transfer goes unnoticed."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import quick
from headstart.config.render import resolved
from headstart.distillation.run import distill
from headstart.errors import ConfigError, ServerError
from headstart.models.export import save_weights
from headstart.models.lora import merge
from headstart.records import Sampling
from headstart.rollout import sync as sync_module
from headstart.rollout.engine import InProcessEngine
from headstart.serving import client as client_module
from headstart.testing import FakeServer, random_model, word_tokenizer, write_checkpoint
from headstart.train.loop import run
from headstart.train.parts import Parts
from headstart.train.step import sample_rollouts
from support import make_config, make_parts, write_pair, write_prompts

GREEDY = Sampling(temperature=0.0)
LORA = ("tuning={type: lora, r: 4, alpha: 32, dropout: 0}", "optimizer.lr=2e-2")
FULL = ("tuning.type=full", "optimizer.lr=1e-2")


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PAUSES", (0.01, 0.02))


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[FakeServer]]:
    """Two replicas that serve the student on disk."""
    write_pair(tmp_path)
    write_prompts(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    made = [FakeServer(model, word_tokenizer(), name="student") for _ in range(2)]
    for server in made:
        server.start()
    yield made
    for server in made:
        server.stop()


def settings(servers: list[FakeServer], folder: Path, *more: str) -> tuple[str, ...]:
    urls = ", ".join(server.url for server in servers)
    return ("rollout.engine=server", f"rollout.urls=[{urls}]", f"rollout.sync_dir={folder / 'sync'}", *more)


def served_parts(tmp_path: Path, servers: list[FakeServer], *more: str, name: str = "run") -> Parts:
    return make_parts(tmp_path / name, make_config(tmp_path, *settings(servers, tmp_path, *more)))


def local(parts: Parts) -> InProcessEngine:
    return InProcessEngine(parts.student, parts.vocabulary.stop_ids)


def moved(parts: Parts, size: float = 0.05) -> None:
    """The student's trainable weights, as after a step of training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in parts.student.trainable().values():
            p.add_(size * torch.randn(p.shape, generator=generator))


# --- rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [LORA, FULL, (*LORA, "rollout.sync=checkpoint")], ids=["adapter", "full", "folded"])
def test_greedy_rollouts_are_the_in_process_engines(
    tmp_path: Path, servers: list[FakeServer], tuning: tuple[str, ...]
) -> None:
    parts = served_parts(tmp_path, servers, *tuning)
    limits = [3 + i % 6 for i in range(len(parts.prompts))]
    how: dict[str, Any] = {"samples": 2, "max_tokens": limits, "sampling": GREEDY, "key": (0, "rollout", 0)}
    seen = []
    for step in range(2):
        parts.engine.sync(step)
        ended: list[Any] = []
        found = parts.engine.generate(parts.prompts, finished=ended.append, candidates=5, batch_size=7, **how)
        want = local(parts).generate(parts.prompts, candidates=5, **how)
        assert found == want
        assert len(found) == len(ended) == 48
        assert {r.stopped for r in found} == {True, False}
        for mine, theirs in zip(found, want, strict=True):
            np.testing.assert_array_equal(mine.candidate_ids, theirs.candidate_ids)
            np.testing.assert_allclose(mine.engine_logprobs, parts.student.logprobs([mine]).numpy(), atol=1e-4)
        seen.append([r.completion_ids for r in found])
        moved(parts)
    assert seen[0] != seen[1]
    asked = [len(server.asked("/v1/completions")) for server in servers]
    assert min(asked) > 40, "both replicas are asked"


def test_draws_follow_what_a_rollout_is_for(tmp_path: Path, servers: list[FakeServer]) -> None:
    """Neither order, nor company, nor the replica, nor a failed try changes a rollout."""
    parts = served_parts(tmp_path, servers, *LORA)
    parts.engine.sync(0)
    how: dict[str, Any] = {"max_tokens": 8, "sampling": Sampling(1.0, 0.95), "key": (3, "rollout", 5)}
    whole = parts.engine.generate(parts.prompts, samples=2, **how)
    servers[0].faults.failing, servers[1].faults.truncated = 3, 2
    some = parts.engine.generate(parts.prompts[5:2:-1], samples=2, batch_size=2, **how)
    by_name = {(r.prompt.index, r.sample_index): r for r in whole}
    assert [by_name[r.prompt.index, r.sample_index] for r in some] == some
    assert whole[0].completion_ids != whole[1].completion_ids
    other = parts.engine.generate(parts.prompts, samples=2, **{**how, "key": (3, "rollout", 6)})
    assert [r.completion_ids for r in other] != [r.completion_ids for r in whole]
    assert parts.engine.generate([], samples=2, **how) == []


def trajectory(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_a_run_is_the_in_process_run(tmp_path: Path, servers: list[FakeServer], tuning: tuple[str, ...]) -> None:
    greedy = (*tuning, "rollout.temperature=0")
    run(make_parts(tmp_path / "own", make_config(tmp_path, *greedy)))
    run(served_parts(tmp_path, servers, *greedy, name="served"))
    own, served = trajectory(tmp_path / "own"), trajectory(tmp_path / "served")
    assert len(own) == len(served) == 4
    for a, b in zip(own, served, strict=True):
        for key in ("tokens", "completion_length_max", "share_stopped"):
            assert a[key] == b[key]
        for key in ("loss", "grad_norm", "student_logprob", "teacher_logprob"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)
        assert "engine_gap_mean" not in a
        assert 0 <= b["engine_gap_mean"] <= b["engine_gap_max"] < 1e-4
    assert own[0]["loss"] != pytest.approx(own[3]["loss"], rel=1e-2), "a run that learns nothing compares nothing"
    left = sorted(path.name for path in (tmp_path / "sync").glob("*/*"))
    assert left == ["step-000002", "step-000003"]


def test_evaluations_are_sampled_there_too(tmp_path: Path, servers: list[FakeServer]) -> None:
    data = tmp_path / "task.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"w{i}", "answer": "w3"}) + "\n" for i in range(5)))
    task = f"evaluation={{task: {{type: jsonl, path: {data}}}, max_tokens: 6, every: 2}}"
    more = (*LORA, "training.steps=2", task)
    result = run(served_parts(tmp_path, servers, *more))
    assert result.after is not None
    assert result.after.settings["engine"] == "server"
    asked = sum(len(server.asked("/v1/completions")) for server in servers)
    probes, rollouts, responses = 3 * 2 * 2, 2 * 6, 2 * 5 * result.after.samples
    assert asked == probes + rollouts + responses


# --- traps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuning", "fault", "said"),
    [
        (FULL, "stale_cache", "samples with other weights than it was given"),
        (FULL, "keeps_head", "scores with other weights than it was given: its log-probabilities of a fixed text"),
        (FULL, "ignores_weights", "scores with other weights than it was given"),
        (LORA, "ignores_weights", "scores with other weights than it was given"),
        (LORA, "nan", "holds NaN"),
        (LORA, "missing_row", "does not score a text of 160 tokens as vLLM does"),
    ],
)
def test_a_transfer_that_went_wrong_silently_stops_the_run(
    tmp_path: Path, servers: list[FakeServer], tuning: tuple[str, ...], fault: str, said: str
) -> None:
    parts = served_parts(tmp_path, servers, *tuning)
    parts.engine.sync(0)
    moved(parts)
    setattr(servers[1].faults, fault, True)
    with pytest.raises(ServerError, match=said) as error:
        parts.engine.sync(1)
    assert servers[1].url in str(error.value)


def test_an_adapter_from_a_new_path_has_cache_blocks_of_its_own(tmp_path: Path, servers: list[FakeServer]) -> None:
    parts = served_parts(tmp_path, servers, *LORA)
    parts.engine.sync(0)
    moved(parts)
    servers[1].faults.stale_cache = True
    parts.engine.sync(1)
    paths = [body["lora_path"] for body in servers[1].asked("/v1/load_lora_adapter")]
    assert len(set(paths)) == 2


def test_a_prefix_cache_that_is_never_reset_shows_at_the_first_transfer(
    tmp_path: Path, servers: list[FakeServer]
) -> None:
    parts = served_parts(tmp_path, servers, *FULL)
    moved(parts)
    servers[0].faults.stale_cache = True
    with pytest.raises(ServerError, match="stale prefix cache"):
        parts.engine.sync(0)


@pytest.mark.parametrize("old", [False, True], ids=["0.33", "0.32"])
def test_stale_versions_are_refused(
    tmp_path: Path, servers: list[FakeServer], old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version in the replies, or only at its own route, as before vLLM 0.33."""
    parts = served_parts(tmp_path, servers[:1], *FULL)
    parts.engine.sync(0)
    if old:
        monkeypatch.setattr(type(servers[0].served), "versions", lambda self, made: None)
    assert sample_rollouts(parts, 0, 4)
    servers[0].restart()
    with pytest.raises(ServerError, match=r"samples from weights 'default', and this step trains 'run-\w+/0'"):
        sample_rollouts(parts, 0, 4)
    if not old:
        parts.engine.sync(1)
        servers[0].faults.stale_version = True
        with pytest.raises(ServerError, match="samples from weights 'default'"):
            sample_rollouts(parts, 1, 4)


def test_a_restarted_server_lacks_the_adapter(tmp_path: Path, servers: list[FakeServer]) -> None:
    parts = served_parts(tmp_path, servers, *LORA)
    parts.engine.sync(0)
    servers[1].restart()
    with pytest.raises(ServerError, match="model `headstart` does not exist"):
        sample_rollouts(parts, 0, 4)


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"outside": 47}, "holds id 47, and the tokenizer ends at 45"),
        ({"duplicated": 1}, "is to another prompt than was asked"),
        ({"nan": True}, "holds NaN"),
        ({"failing": 10**6}, "status 500"),
        ({"hanging": 10**6}, "no reply within 2 s"),
    ],
)
def test_replies_that_cannot_be_trained_on(
    tmp_path: Path, servers: list[FakeServer], faults: dict[str, Any], said: str
) -> None:
    parts = served_parts(tmp_path, servers[:1], *LORA, "rollout.timeout=2")
    assert len(sample_rollouts(parts, 0, 4)) == 6
    if "outside" in faults:
        for _, adapted in servers[0].served.adapters.values():
            adapted.get_base_model().resize_token_embeddings(49, mean_resizing=False)
    for name, value in faults.items():
        setattr(servers[0].faults, name, value)
    with pytest.raises(ServerError, match=said):
        sample_rollouts(parts, 0, 4)


def test_rows_of_a_padded_head_are_never_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a head gives about half of the probability to ids that no tokenizer has."""
    size = len(word_tokenizer())
    wide = random_model("llama", size + 40, seed=1)
    for name, model in (("student", wide), ("teacher", random_model("llama", size, seed=2))):
        write_checkpoint(tmp_path / name, model, word_tokenizer())
    write_prompts(tmp_path)
    monkeypatch.setattr(sync_module, "TOLERANCE", {torch.float32: 9.0})  # shares of all rows, and of the tokens' rows
    server = FakeServer(wide, word_tokenizer(), name="student")
    with server:
        parts = served_parts(tmp_path, [server], *LORA, "rollout.samples_per_prompt=8")
        rollouts = sample_rollouts(parts, 0, 6)
        assert max(token for r in rollouts for token in r.completion_ids) < size
        body = server.asked("/v1/completions")[-1] | {"model": "student", "max_tokens": 40}
        drawn = server.post("/v1/completions", {**body, "logit_bias": None})["choices"][0]["token_ids"]
        assert max(drawn) >= size, "without the bias they are"


def test_a_failed_server_ends_the_run_cleanly_and_resume_completes_it(
    tmp_path: Path, servers: list[FakeServer]
) -> None:
    greedy = (*LORA, "rollout.temperature=0", "rollout.timeout=3")
    config = make_config(tmp_path, *settings(servers, tmp_path, *greedy))
    run(make_parts(tmp_path / "straight", config))
    parts = make_parts(tmp_path / "cut", config)
    report = parts.tracker.step

    def break_down(seen: Any) -> None:
        report(seen)
        if seen.step == 2:
            for server in servers:
                server.faults.failing = 10**6

    object.__setattr__(parts, "tracker", Spy(parts.tracker, break_down))
    with pytest.raises(ServerError, match="status 500"):
        run(parts)
    for server in servers:
        server.faults.failing = 0
        server.restart()
    distill(resume=tmp_path / "cut")
    straight, cut = trajectory(tmp_path / "straight"), trajectory(tmp_path / "cut")
    assert [line["step"] for line in cut] == [1, 2, 3, 4]
    assert [line["loss"] for line in cut] == pytest.approx([line["loss"] for line in straight], rel=1e-5)


class Spy:
    """A tracker with another `step`."""

    def __init__(self, tracker: Any, step: Any) -> None:
        self.tracker, self.step = tracker, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tracker, name)


# --- before a run ----------------------------------------------------------------------------------------------------


def test_servers_that_do_not_fit_are_refused_before_the_run_has_a_folder(
    tmp_path: Path, servers: list[FakeServer]
) -> None:
    def refused(*more: str) -> str:
        with pytest.raises((ServerError, ConfigError)) as error:
            served_parts(tmp_path, servers, *more)
        assert not (tmp_path / "run").exists()
        return str(error.value)

    servers[1].served.max_model_len = 14
    assert "the servers take 14 tokens (max_model_len), but the longest prompt and response have 15" in refused()
    servers[1].served.name = "other"
    assert "serve different models (other, student)" in refused()
    servers[1].served.level = "sampled"
    assert "/weight_info was refused with status 404" in refused()
    servers[1].stop()
    assert "failed: ConnectError" in refused("rollout.timeout=0.1")


def test_an_adapter_is_folded_into_a_copy(tmp_path: Path) -> None:
    targets = "tuning.targets=[q_proj, down_proj, lm_head]"
    parts = make_parts(tmp_path / "run", make_config(tmp_path, *LORA, targets))
    moved(parts)
    before = {name: p.detach().clone() for name, p in parts.student.model.state_dict().items()}
    save_weights(parts.student.model, tmp_path / "folded")
    for name, p in parts.student.model.state_dict().items():
        assert torch.equal(p, before[name])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    want = merge(copy.deepcopy(parts.student.model))
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, want.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found.get_output_embeddings().weight, found.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("rollout.urls=[http://h:1]",), "rollout.urls: found ['http://h:1'] beside engine in_process"),
        (("rollout.sync=adapter",), "rollout.sync: found adapter beside engine in_process"),
        (("rollout.timeout=3",), "rollout.timeout: found 3.0 beside engine in_process"),
        (("rollout.engine=server",), "rollout.urls: found none beside engine server"),
        (("rollout.engine=server",), "rollout.sync_dir: found null beside engine server"),
        (("rollout.engine=server", "rollout.urls=[h:1]"), "rollout.urls: found h:1; give them as http://host:port"),
        (
            ("rollout.engine=server", "rollout.urls=[http://h:1]", "rollout.sync_dir=/s", "rollout.sync=adapter"),
            "rollout.sync: adapter needs tuning.type lora (found full)",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(tmp_path, *overrides)
    assert said in str(error.value)


def test_a_replaced_engine_needs_no_sync(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "run", make_config(tmp_path))
    assert replace(parts, engine=local(parts)).engine.sync(3) is None  # type: ignore[func-returns-value]


# --- ranks -----------------------------------------------------------------------------------------------------------


def two_ranks(tmp_path: Path, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    return quick.ranks(2, "distill", tmp_path / "run.yaml", "--out", tmp_path / name, *more, timeout=180)


@pytest.mark.slow
@pytest.mark.parametrize(("tuning", "sharding"), [(LORA, "none"), (FULL, "fsdp")], ids=["whole", "sharded"])
def test_ranks_ask_for_their_own_prompts_and_one_gives_the_weights(
    tmp_path: Path, servers: list[FakeServer], tuning: tuple[str, ...], sharding: str
) -> None:
    config = make_config(tmp_path, *settings(servers, tmp_path, *tuning, "training.steps=2"))
    route = "/v1/load_lora_adapter" if tuning == LORA else "/collective_rpc"
    run(make_parts(tmp_path / "one", config))
    assert [len(server.asked(route)) for server in servers] == [2, 2]
    (tmp_path / "run.yaml").write_text(resolved(config))
    done = two_ranks(tmp_path, "two", f"sharding.type={sharding}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [len(server.asked(route)) for server in servers] == [4, 4]
    for a, b in zip(trajectory(tmp_path / "one"), trajectory(tmp_path / "two"), strict=True):
        assert (a["tokens"], a["rollouts"]) == (b["tokens"], b["rollouts"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["engine_gap_max"] < 1e-4


@pytest.mark.slow
def test_a_server_that_fails_ends_all_ranks(tmp_path: Path, servers: list[FakeServer]) -> None:
    (tmp_path / "run.yaml").write_text(resolved(make_config(tmp_path, *settings(servers, tmp_path, *LORA))))
    servers[1].faults.failing = 10**6
    done = two_ranks(tmp_path, "broken", "rollout.timeout=2")
    assert done.returncode != 0
    assert "status 500" in done.stderr
