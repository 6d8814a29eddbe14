"""What the served teacher, the served student and the fake server take for granted of vLLM, asked of a real one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from real_server import RealServer
from references import LONG, VOCABULARY, gap, local, scores, write_adapter

from headstart.models.causal import CausalModel
from headstart.records import Prompt, Sampling
from headstart.rollout.engine import InProcessEngine

STEADY = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}


@pytest.fixture(scope="module")
def adapters(checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of an adapter of the first checkpoint."""
    folder = tmp_path_factory.mktemp("adapters")
    first, second = (write_adapter(folder / f"version-{i}", checkpoints[0], seed=i) for i in (1, 2))
    return first, second


def test_prompt_logprobs_are_those_of_transformers(server: RealServer, checkpoints: tuple[Path, Path]) -> None:
    for ids in (LONG[:40], LONG):
        assert gap(server.prompt_logprobs(ids, VOCABULARY), scores(local(checkpoints[0]), ids)[:-1]) < 1e-5


def test_the_token_that_stands_there_is_always_scored(server: RealServer, checkpoints: tuple[Path, Path]) -> None:
    body = {"model": "student", "prompt": LONG[:40], "max_tokens": 1, "prompt_logprobs": 3}
    rows = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"][1:]
    expected = scores(local(checkpoints[0]), LONG[:40])
    for row, actual, row_V in zip(rows, LONG[1:], expected, strict=False):
        assert next(iter(row)) == str(actual)
        assert {int(i) for i in row} == {actual, *row_V.topk(3).indices.tolist()}
        assert row[str(actual)]["logprob"] == pytest.approx(float(row_V[actual]), abs=1e-5)


def test_temperature_does_not_reach_the_scores(server: RealServer) -> None:
    cold = server.prompt_logprobs(LONG[:40], VOCABULARY, temperature=0.5, top_p=0.5)
    assert gap(cold, server.prompt_logprobs(LONG[:40], VOCABULARY)) == 0


def test_an_echoed_prompt_scores_its_own_tokens(server: RealServer, checkpoints: tuple[Path, Path]) -> None:
    """The one way that endpoints other than vLLM have."""
    body = {"model": "student", "prompt": LONG[:40], "max_tokens": 0, "echo": True, "logprobs": 0}
    said = server.post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
    expected = scores(local(checkpoints[0]), LONG[:40])[:-1].gather(1, torch.tensor(LONG[1:40])[:, None])[:, 0]
    assert said[0] is None
    assert gap(torch.tensor(said[1:]), expected) < 1e-5


def test_scores_of_chosen_ids_are_refused_in_words_on_a_cpu(server: RealServer) -> None:
    chosen = {"max_tokens": 1, "prompt_logprob_token_ids": [[1, 2], [3, 4]], "prompt_logprob_start": 2}
    body = {"model": "student", "token_ids": LONG[:5], "sampling_params": chosen}
    reply = server.http.post("/inference/v1/generate", json=body)
    assert reply.status_code == 400
    assert "requires the V2 model runner" in reply.json()["error"]["message"]


def test_greedy_rollouts_are_those_of_the_engine_in_process(server: RealServer, checkpoints: tuple[Path, Path]) -> None:
    prompts = [Prompt(i, f"p{i}", LONG[9 * i : 9 * i + 3 + i], ()) for i in range(6)]
    engine = InProcessEngine(CausalModel(local(checkpoints[0]), VOCABULARY, 0), [1])
    ours = engine.generate(prompts, samples=1, max_tokens=24, sampling=Sampling(0.0), key=(0, "rollout", 0))
    for rollout in ours:
        body = {"model": "student", "prompt": rollout.prompt.token_ids, "max_tokens": 24, "stop_token_ids": [1]}
        choice = server.post("/v1/completions", body | STEADY | {"temperature": 0.0, "ignore_eos": True})["choices"][0]
        assert tuple(choice["token_ids"]) == rollout.completion_ids
        assert (choice["finish_reason"] == "stop") == rollout.stopped


def test_a_seed_gives_the_same_tokens_on_both_routes_and_in_any_company(server: RealServer) -> None:
    options = {"max_tokens": 20, "seed": 11, "ignore_eos": True, "temperature": 1.0}
    body = {"model": "student", "prompt": LONG[:7], **STEADY, **options}
    alone = server.post("/v1/completions", body)["choices"][0]["token_ids"]
    both = server.post("/v1/completions", body | {"prompt": [LONG[3:9], LONG[:7]]})["choices"]
    direct = {"model": "student", "token_ids": LONG[:7], "sampling_params": options}
    [choice] = server.post("/inference/v1/generate", direct)["choices"]
    assert alone == choice["token_ids"] == both[1]["token_ids"]
    other = server.post("/v1/completions", body | {"seed": 12})["choices"][0]["token_ids"]
    assert alone != other


def test_the_stop_token_is_among_the_tokens(server: RealServer) -> None:
    body = {"model": "student", "prompt": LONG[:7], "max_tokens": 300, "seed": 0, "ignore_eos": True}
    [choice] = server.post("/v1/completions", body | STEADY | {"stop_token_ids": list(range(1, 40))})["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == choice["token_ids"][-1] < 40
    assert all(token >= 40 for token in choice["token_ids"][:-1])


def test_logprobs_of_sampled_tokens_are_raw_and_name_one_less_than_the_top(
    server: RealServer, checkpoints: tuple[Path, Path]
) -> None:
    options = {"max_tokens": 12, "seed": 3, "temperature": 0.6, "top_p": 0.9, "logprobs": 4, "ignore_eos": True}
    reply = server.post(
        "/inference/v1/generate", {"model": "student", "token_ids": LONG[:9], "sampling_params": options}
    )
    [choice] = reply["choices"]
    expected = scores(local(checkpoints[0]), [*LONG[:9], *choice["token_ids"]])[8:]
    for said, token, row_V in zip(choice["logprobs"]["content"], choice["token_ids"], expected, strict=False):
        top = {entry["token_id"]: entry["logprob"] for entry in said["top_logprobs"]}
        assert said["token_id"] == token == said["top_logprobs"][0]["token_id"]
        # 0.32 sends four entries, 0.33 a fifth where the sampled token is not among the top four.
        assert {token, *row_V.topk(3).indices.tolist()} <= set(top) <= {token, *row_V.topk(4).indices.tolist()}
        assert all(value == pytest.approx(float(row_V[i]), abs=1e-5) for i, value in top.items())


def test_a_version_is_a_label_on_what_was_sampled_under_it(server: RealServer) -> None:
    body = {"model": "student", "token_ids": LONG[:5], "sampling_params": {"max_tokens": 2, "ignore_eos": True}}
    server.post("/update_weight_version", {"new_version": "step-7"})
    [choice] = server.post("/inference/v1/generate", body)["choices"]
    assert choice["weight_versions"] == [{"version": "step-7", "start": 0, "end": 2}]
    assert server.http.get("/weight_info").json() == {"weight_version": "step-7"}


def test_the_longest_context_that_can_be_scored_leaves_room_for_a_token(server: RealServer) -> None:
    body = {"model": "student", "max_tokens": 1, "prompt_logprobs": 0}
    assert server.http.post("/v1/completions", json=body | {"prompt": [5] * 511}).status_code == 200
    assert server.http.post("/v1/completions", json=body | {"prompt": [5] * 512}).status_code == 400


def test_fields_that_are_not_known_are_ignored_in_silence(server: RealServer) -> None:
    """Why a reply is checked for what was asked, and not only for its status."""
    body = {"model": "student", "prompt": LONG[:5], "max_tokens": 1, "prompt_logprobz": 3}
    assert server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"] is None


def test_an_adapter_is_changed_in_place(
    server: RealServer, checkpoints: tuple[Path, Path], adapters: tuple[Path, Path]
) -> None:
    base = server.prompt_logprobs(LONG, VOCABULARY)
    for adapter in adapters:
        server.load_adapter(adapter)
        expected = scores(local(checkpoints[0], adapter), LONG)
        assert gap(expected[:-1], base) > 0.5
        assert gap(server.prompt_logprobs(LONG, VOCABULARY, "policy"), expected[:-1]) < 2e-5
        assert gap(server.next_logprobs(LONG, VOCABULARY, "policy"), expected[-1]) < 2e-5
        assert gap(server.prompt_logprobs(LONG, VOCABULARY), base) == 0


def test_the_same_adapter_folder_with_other_weights_leaves_a_stale_cache(
    server: RealServer, checkpoints: tuple[Path, Path], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    expected = scores(local(checkpoints[0], adapters[1]), LONG)
    for adapter in adapters:
        shutil.copytree(adapter, tmp_path / "same", dirs_exist_ok=True)
        server.load_adapter(tmp_path / "same")
        stale = server.next_logprobs(LONG, VOCABULARY, "policy")
    assert gap(server.prompt_logprobs(LONG, VOCABULARY, "policy"), expected[:-1]) < 2e-5
    assert gap(stale, expected[-1]) > 0.1
    server.reset()
    assert gap(server.next_logprobs(LONG, VOCABULARY, "policy"), expected[-1]) < 2e-5


@pytest.mark.parametrize("cure", ["reset", "pause"])
def test_new_weights_leave_a_stale_cache_that_prompt_logprobs_do_not_show(
    server: RealServer, checkpoints: tuple[Path, Path], cure: str
) -> None:
    old, new = (scores(local(folder), LONG) for folder in checkpoints)
    server.reload(checkpoints[0])
    server.reset()
    assert gap(server.next_logprobs(LONG, VOCABULARY), old[-1]) < 1e-5
    server.reload(checkpoints[1])
    assert gap(server.prompt_logprobs(LONG, VOCABULARY), new[:-1]) < 1e-5
    assert gap(server.next_logprobs(LONG, VOCABULARY), new[-1]) > 0.1
    if cure == "reset":
        server.reset()
    else:
        server.post("/pause")
        server.post("/resume")
    assert gap(server.next_logprobs(LONG, VOCABULARY), new[-1]) < 1e-5
    server.reload(checkpoints[0])
    server.reset()
