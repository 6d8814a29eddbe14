"""A teacher behind a URL gives what the same teacher in process gives, or stops the run in words."""

from __future__ import annotations

import json
import math
import re
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quick
from headstart.checks.run import run_preflight
from headstart.checks.server import run_server_preflight
from headstart.config.render import resolved
from headstart.config.schema import Config, ModelConfig
from headstart.distillation.run import build, distill
from headstart.errors import ConfigError, HeadstartError, ServerError, VocabularyError
from headstart.models.causal import CausalModel
from headstart.models.load import load_model, load_tokenizer
from headstart.ranks.runtime import Runtime
from headstart.records import Rollout
from headstart.serving.client import Client
from headstart.teacher.connect import connect
from headstart.teacher.scorers import LocalScorer
from headstart.teacher.server import ServerTeacher
from headstart.testing import FakeServer, Faults
from headstart.train.folder import RunFolder
from headstart.train.metrics import Clock
from headstart.train.parts import Parts
from headstart.train.step import backward, sample_rollouts
from support import make_config, make_parts

SERVED = ("teacher.type=server", "teacher.model=m", "teacher.timeout=60", "teacher.deadline=2")
TOP_K = ("divergence.support.type=top_k", "divergence.support.k=8")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """The teacher in `tmp_path`, and its tokenizer."""
    return made_in(tmp_path)


def made_in(folder: Path) -> Any:
    """A pair's files in `folder`; its teacher and tokenizer, loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_config(folder)
    teacher = folder / "teacher"
    return AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)


def served_config(folder: Path, url: str, *overrides: str) -> Config:
    return make_config(folder, *SERVED, f"teacher.urls=[{url}]", *(overrides or TOP_K))


def gradient(parts: Parts) -> tuple[list[Tensor], list[Rollout], dict[str, Any]]:
    """The gradient of the first step, its rollouts, and what was read at each token."""
    rollouts = sample_rollouts(parts, 0, 6)
    parts.student.model.train()
    readings = backward(parts, rollouts, 0, Clock(parts.runtime))
    read = {
        name: torch.cat([torch.from_numpy(getattr(r, name)) for r in readings])
        for name in ("divergence", "teacher_logprob", "student_tail", "teacher_tail")
        if all(getattr(r, name) is not None for r in readings)
    }
    return [p.grad.clone() for p in parts.student.trainable().values() if p.grad is not None], rollouts, read


FORMS = {
    "bucket": TOP_K,
    "unbiased": (*TOP_K, "divergence.support.tail=unbiased"),
    "sampled": ("divergence.support.type=sampled",),
}


@pytest.mark.parametrize(
    ("level", "form"), [*((level, form) for level in ("per_row", "top_k") for form in FORMS), ("sampled", "sampled")]
)
def test_a_step_is_the_one_with_the_teacher_in_process(tmp_path: Path, model: Any, level: Any, form: str) -> None:
    local = make_parts(tmp_path / "local", make_config(tmp_path, *FORMS[form]))
    with FakeServer(*model, level=level, max_logprobs=-1) as url, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remote = make_parts(tmp_path / "remote", served_config(tmp_path, url, *FORMS[form]))
        ours, theirs = gradient(local), gradient(remote)
        assert isinstance(remote.teacher, ServerTeacher)
        assert remote.teacher.scorer.capabilities().level == {"top_k": "full"}.get(level, level)
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
    for name, column in ours[2].items():
        torch.testing.assert_close(theirs[2][name], column, rtol=0, atol=1e-5)


@pytest.mark.parametrize("column", [True, False])
def test_one_of_several_teachers_may_be_at_a_url(tmp_path: Path, model: Any, column: bool) -> None:
    """Rows that name it, or all rows by weight, beside a teacher that is here."""
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    named = [row | {"by": "ab"[i % 2]} for i, row in enumerate(rows)]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    routes = [f"prompts.source={tmp_path / 'named.jsonl'}", "prompts.teacher_column=by"] if column else []
    here = {"name": "a", "path": str(tmp_path / "student")}

    def parts_of(name: str, other: dict[str, Any]) -> Parts:
        teachers = json.dumps([here, {"name": "b", **other}])
        return make_parts(
            tmp_path / name, make_config(tmp_path, "teacher=null", f"teachers={teachers}", *TOP_K, *routes)
        )

    local = parts_of("local", {"path": str(tmp_path / "teacher")})
    with FakeServer(*model, level="per_row", max_logprobs=-1) as url, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remote = parts_of("remote", {"type": "server", "urls": [url], "model": "m"})
        ours, theirs = gradient(local), gradient(remote)
        counts = remote.teacher.metrics()
    assert ours[1] == theirs[1]
    assert counts["teacher_requests"] == sum("b" in dict(r.prompt.views) for r in theirs[1]) > 0
    assert counts["tokens_a"] > 0 < counts["tokens_b"]
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


def test_a_top_k_endpoint_leaves_what_it_does_not_say_to_the_tail(tmp_path: Path, model: Any) -> None:
    with FakeServer(*model, level="top_k", max_logprobs=5) as url:
        with pytest.warns(UserWarning, match="5 most probable"):
            parts = make_parts(tmp_path / "remote", served_config(tmp_path, url))
        _, _, read = gradient(parts)
        counts = parts.teacher.metrics()
    assert counts["candidates_asked"] > counts["candidates_known"] > 0
    exact = make_parts(tmp_path / "local", make_config(tmp_path, *TOP_K))
    _, _, full = gradient(exact)
    assert (read["divergence"] <= full["divergence"] + 1e-5).all(), "a smaller support is a smaller lower bound"
    torch.testing.assert_close(read["teacher_logprob"], full["teacher_logprob"], rtol=0, atol=1e-5)


def test_requests_leave_while_others_are_still_sampled(tmp_path: Path, model: Any) -> None:
    server = FakeServer(*model, max_logprobs=-1)
    with server as url:
        parts = make_parts(tmp_path / "remote", served_config(tmp_path, url))
        before = len(server.asked("/inference/v1/generate"))
        rollouts = sample_rollouts(parts, 0, 6)
        parts.teacher.ready(rollouts)
        assert len(server.asked("/inference/v1/generate")) - before == len(rollouts)
        backward(parts, rollouts, 0, Clock(parts.runtime))
        assert len(server.asked("/inference/v1/generate")) - before == len(rollouts), "nothing is asked twice"
        counts = parts.teacher.metrics()
    assert counts["teacher_requests"] == len(rollouts)
    assert counts["teacher_bytes"] > 0


def test_two_servers_take_turns(tmp_path: Path, model: Any) -> None:
    one, other = FakeServer(*model, max_logprobs=-1), FakeServer(*model, max_logprobs=-1)
    with one as a, other as b:
        config = make_config(tmp_path, *SERVED, f"teacher.urls=[{a}, {b}]", *TOP_K, "training.steps=2")
        distill(config, out=tmp_path / "run")
    asked = [len(server.asked("/inference/v1/generate")) for server in (one, other)]
    assert min(asked) >= 6


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def test_a_run_equals_the_one_in_process_and_says_what_is_known(tmp_path: Path, model: Any) -> None:
    with FakeServer(*model, max_logprobs=-1) as url:
        distill(served_config(tmp_path, url), out=tmp_path / "remote")
    distill(make_config(tmp_path, *TOP_K), out=tmp_path / "local")
    ours, theirs = weights(tmp_path / "local"), weights(tmp_path / "remote")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=2e-4)
    steps = [json.loads(line) for line in (tmp_path / "remote" / "metrics.jsonl").read_text().splitlines()]
    first = next(step for step in steps if step["event"] == "step")
    assert first["teacher_entropy"] is None
    assert first["teacher_rank_1"] is None
    assert first["teacher_requests"] == first["rollouts"]
    assert 0 < first["student_tail"] < 1
    assert first["seconds_teacher_wait"] >= 0
    card = (tmp_path / "remote" / "model" / "README.md").read_text()
    assert f"distilled from m at {url}" in card


# --- faults -----------------------------------------------------------------------------------------------------------


def run_with(tmp_path: Path, model: Any, fail: Any, *overrides: str) -> ServerError:
    """A run whose server starts to misbehave after two good steps, and the error that ends it."""
    server = FakeServer(*model, max_logprobs=-1)
    with server as url:
        config = make_config(tmp_path, *SERVED, f"teacher.urls=[{url}]", *TOP_K, "checkpoint.every=10", *overrides)
        parts = build(config, Runtime.start("cpu"), lambda: RunFolder.create(tmp_path / "run", config))
        from headstart.train import loop

        made, steps = loop.train_step, []

        def watched(*args: Any) -> Any:
            steps.append(args)
            if len(steps) == 3:
                fail(server)
            return made(*args)

        loop.train_step = watched
        try:
            with pytest.raises(ServerError) as caught:
                loop.run(parts)
        finally:
            loop.train_step = made
        parts.teacher.scorer.close()  # type: ignore[attr-defined]
    assert len(steps) == 3
    return caught.value


FAULTS: dict[str, Any] = {
    "down": (lambda s: s.stop(), "refused|Connect"),
    "hang": (lambda s: setattr(s.faults, "hanging", 10**6), "no reply within"),
    "slow": (lambda s: setattr(s.faults, "slow", 20.0), "no reply within"),
    "500": (lambda s: setattr(s.faults, "failing", 10**6), "status 500"),
    "truncated": (lambda s: setattr(s.faults, "truncated", 10**6), "failed"),
    "nan": (lambda s: setattr(s.faults, "nan", True), "NaN"),
    "missing row": (lambda s: setattr(s.faults, "missing_row", True), "rows"),
    "another's reply": (lambda s: setattr(s.faults, "duplicated", 10**6), "other tokens|rows"),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The trained weights of a run that no fault interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    with FakeServer(*made_in(folder), max_logprobs=-1) as url:
        distill(served_config(folder, url, *TOP_K, "checkpoint.every=10"), out=folder / "run")
    return weights(folder / "run")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_with_a_checkpoint_and_resuming_gives_the_straight_run(
    tmp_path: Path, model: Any, straight: dict[str, torch.Tensor], fault: str
) -> None:
    fail, words = FAULTS[fault]
    waits = fault in ("hang", "slow")
    error = run_with(tmp_path, model, fail, f"teacher.timeout={3 if waits else 60}", "teacher.deadline=2")
    assert re.search(words, str(error)), str(error)
    assert "stopped after step 2" in str(error)
    assert f"--resume {tmp_path / 'run'}" in str(error)
    with FakeServer(*model, max_logprobs=-1) as url:  # another port: only where it lies has changed
        saved = tmp_path / "run" / "config.yaml"
        saved.write_text("\n".join(_moved(saved.read_text().splitlines(), url)))
        result = distill(resume=tmp_path / "run")
    assert result.progress.step == 4
    resumed = weights(tmp_path / "run")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def _moved(lines: list[str], url: str) -> Iterator[str]:
    for line in lines:
        line = f"  - {url}" if line.strip().startswith("- http://127.0.0.1") else line
        yield "  timeout: 60.0" if line.startswith("  timeout: 3") else line


def test_what_passes_is_tried_again(tmp_path: Path, model: Any) -> None:
    with FakeServer(*model, max_logprobs=-1, faults=Faults()) as url:
        parts = make_parts(tmp_path / "straight", served_config(tmp_path, url))
        expected = gradient(parts)[0]
    server = FakeServer(*model, max_logprobs=-1)
    with server as url:
        parts = make_parts(tmp_path / "shaky", served_config(tmp_path, url, *TOP_K, "teacher.deadline=20"))
        server.faults.failing, server.faults.truncated = 2, 2
        found = gradient(parts)[0]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# --- refused before the first step ------------------------------------------------------------------------------------


def test_another_tokenizer_is_noticed(tmp_path: Path, model: Any) -> None:
    from headstart.testing import WORDS, word_tokenizer

    teacher, _ = model
    with (
        FakeServer(teacher, word_tokenizer([*WORDS[:-2], "other", "words"]), max_logprobs=-1) as url,
        pytest.raises(VocabularyError, match=r"teacher\.tokenizer"),
    ):
        make_parts(tmp_path / "remote", served_config(tmp_path, url))


@pytest.mark.parametrize("level", ["sampled"])
def test_a_sampled_endpoint_refuses_a_top_k_loss_in_words(tmp_path: Path, model: Any, level: Any) -> None:
    with FakeServer(*model, level=level) as url, pytest.raises(ConfigError, match="type: sampled"):
        make_parts(tmp_path / "remote", served_config(tmp_path, url))


def test_a_model_that_is_not_served_is_named(tmp_path: Path, model: Any) -> None:
    with FakeServer(*model, name="other") as url, pytest.raises(ConfigError, match="serves other"):
        make_parts(tmp_path / "remote", served_config(tmp_path, url))


def test_servers_of_two_models_are_refused(tmp_path: Path, model: Any) -> None:
    with FakeServer(*model, max_logprobs=-1) as a, FakeServer(*model, max_logprobs=-1, max_model_len=100) as b:
        config = make_config(tmp_path, *SERVED, f"teacher.urls=[{a}, {b}]", *TOP_K)
        with pytest.raises(ConfigError, match="serve one model"):
            make_parts(tmp_path / "remote", config)


def test_a_context_that_is_too_short_is_refused(tmp_path: Path, model: Any) -> None:
    with (
        FakeServer(*model, max_logprobs=-1, max_model_len=10) as url,
        pytest.raises(ConfigError, match="teacher's context is 9 tokens"),
    ):
        make_parts(tmp_path / "remote", served_config(tmp_path, url))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("divergence.support.type=full", "candidate tokens only"),
        ("divergence.type=forward_kl", "candidate tokens only"),
        ("divergence.alignment=coarse", "alignment strict"),
        ("horizon.type=overlap", "horizon.type"),
        ("probes.every=2", "probes"),
    ],
)
def test_what_needs_the_model_here_is_refused_with_the_remedy(tmp_path: Path, override: str, words: str) -> None:
    make_config(tmp_path)
    with pytest.raises(ConfigError, match=r"teacher\.path") as caught:
        served_config(tmp_path, "http://127.0.0.1:1", *([] if "full" in override else TOP_K), override)
    assert words in str(caught.value)


def test_diagnose_says_that_it_needs_the_model_here(tmp_path: Path) -> None:
    from headstart.diagnosis.run import diagnose

    make_config(tmp_path)
    with pytest.raises(ConfigError, match=r"headstart diagnose needs the teacher's model on this machine"):
        diagnose(served_config(tmp_path, "http://127.0.0.1:1"), out=tmp_path / "d")


# --- other forms of the same teacher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["per_row", "top_k"])
def test_every_scorer_keeps_the_protocol(tmp_path: Path, model: Any, level: Any) -> None:
    """Ragged rows, repeated ids, a start past the first token: as the model itself says."""
    prompt, completion = [7, 8, 9], [10, 11, 1, 12, 13]
    asked = np.array([[3, 11, -1, -1], [5, 4, 5, 1], [-1, -1, -1, -1], [12, 12, 13, -1]])[[0, 1, 2]]
    asked[2] = [12, 9, 12, -1]
    with torch.no_grad():
        logits = model[0](torch.tensor([[*prompt, *completion]])).logits[0, 3:6]
    expected = logits.log_softmax(-1).gather(-1, torch.from_numpy(asked).clamp_min(0)).numpy()
    expected[asked < 0] = -np.inf
    local = LocalScorer(CausalModel(model[0], 46, 0))
    with FakeServer(*model, level=level, max_logprobs=-1) as url:
        served = connect(Client([url], deadline=2), None, model[1], 4)
        for scorer in (local, served):
            np.testing.assert_allclose(scorer.score(prompt, completion, asked, start=1), expected, atol=1e-5)
            assert scorer.score(prompt, completion, asked[:0]).shape == (0, 4)
        served.close()


def test_the_scorer_in_process_gives_the_same_step(tmp_path: Path) -> None:
    local = make_parts(tmp_path / "local", make_config(tmp_path, *TOP_K))
    assert local.teacher.model is not None
    scorer = LocalScorer(local.teacher.model)
    remote = replace(
        make_parts(tmp_path / "remote", make_config(tmp_path, *TOP_K)),
        teacher=ServerTeacher(scorer, local.vocabulary, candidates=9, unbiased=False),
    )
    for a, b in zip(gradient(local)[0], gradient(remote)[0], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)


def test_stop_tokens_that_count_as_one_do_so_behind_a_url(tmp_path: Path) -> None:
    """The teacher ends with another token than the student, so the probabilities of both are added on both sides."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_config(tmp_path, eos_id=7)
    everything = ("divergence.support.type=top_k", "divergence.support.k=46")
    local = make_parts(tmp_path / "local", make_config(tmp_path, *everything))
    assert local.vocabulary.merge_ids == (1, 7)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    with FakeServer(teacher, AutoTokenizer.from_pretrained(tmp_path / "teacher"), max_logprobs=-1) as url:
        source = f"teacher.tokenizer={tmp_path / 'teacher'}"
        remote = make_parts(tmp_path / "remote", served_config(tmp_path, url, *everything, source))
        assert remote.vocabulary.merge_ids == (1, 7)
        for a, b in zip(gradient(local)[0], gradient(remote)[0], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


STRICT = (*TOP_K, "divergence.alignment=strict")
SAMPLED_STRICT = ("divergence.support.type=sampled", "divergence.alignment=strict")


def test_another_tokenizer_works_through_strict(tmp_path: Path) -> None:
    """Against loops over floats: candidates as byte strings, and all that is not common in the tail."""
    make_config(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path="tiny:teacher-cross"))
    teacher = load_model(ModelConfig(path="tiny:teacher-cross"), torch.device("cpu"))
    cross = ("student.path=tiny:student", "teacher.tokenizer=tiny:teacher-cross", "prompts.source=tiny")
    with FakeServer(teacher, tokenizer, max_logprobs=-1) as url:
        parts = make_parts(tmp_path / "run", served_config(tmp_path, url, *STRICT, *cross, "horizon.tokens=24"))
        rollouts = parts.teacher.align(sample_rollouts(parts, 0, 24))
        readings = backward(parts, rollouts, 0, Clock(parts.runtime))
        divergence = np.concatenate([r.divergence for r in readings])
    aligner, checked = parts.vocabulary.aligner, 0
    assert aligner is not None
    ours, theirs = (side.events for side in (aligner.student, aligner.teacher))
    with torch.no_grad():
        for rollout in rollouts:
            assert rollout.aligned is not None
            for row, other in zip(rollout.aligned.rows, rollout.aligned.teacher_rows, strict=True):
                p = _masses(parts.student.model, rollout.prompt.token_ids, rollout.completion_ids[:row], ours)
                q = _masses(teacher, rollout.prompt.teacher_token_ids, rollout.aligned.ids[:other], theirs)
                common = {ours[i] for i in rollout.candidate_ids[row, :-1]} & {*q} - {None}
                tails = [1 - sum(x[event] for event in common) for x in (p, q)]
                value = sum(p[e] * math.log(p[e] / q[e]) for e in common) + tails[0] * math.log(tails[0] / tails[1])
                assert divergence[checked] == pytest.approx(value, abs=2e-4)
                checked += 1
    assert checked == len(divergence) > 20


def _masses(model: Any, prompt: Any, completion: Any, events: Any) -> dict[Any, float]:
    """The probability of each event as the next token, in float64."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, -1, : len(events)].double()
    masses: dict[Any, float] = {}
    for event, mass in zip(events, logits.softmax(-1).tolist(), strict=True):
        masses[event] = masses.get(event, 0.0) + mass
    return masses


@pytest.mark.parametrize("overrides", [TOP_K, SAMPLED_STRICT])
def test_another_tokenizer_is_refused_otherwise(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    make_config(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path="tiny:teacher-cross"))
    teacher = load_model(ModelConfig(path="tiny:teacher-cross"), torch.device("cpu"))
    cross = ("student.path=tiny:student", "teacher.tokenizer=tiny:teacher-cross", "prompts.source=tiny")
    with (
        FakeServer(teacher, tokenizer, max_logprobs=-1) as url,
        pytest.raises(HeadstartError, match="alignment strict"),
    ):
        make_parts(tmp_path / "run", served_config(tmp_path, url, *overrides, *cross))


def test_tokens_are_chosen_by_what_the_candidates_say(tmp_path: Path, model: Any) -> None:
    chosen = ("selection.type=top", "selection.tokens=2")
    local = make_parts(tmp_path / "local", make_config(tmp_path, *TOP_K, *chosen))
    with FakeServer(*model, max_logprobs=-1) as url:
        remote = make_parts(tmp_path / "remote", served_config(tmp_path, url, *TOP_K, *chosen))
        for a, b in zip(gradient(local)[0], gradient(remote)[0], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_are_one_and_end_together_when_the_server_does(tmp_path: Path, model: Any) -> None:
    server = FakeServer(*model, max_logprobs=-1)
    with server as url:
        config = served_config(tmp_path, url)
        distill(config, out=tmp_path / "one")
        yaml = str(tmp_path / "one" / "config.yaml")
        for out, extra in (("two", []), ("divided", ["sharding.type=fsdp"])):
            done = quick.ranks(2, "distill", yaml, "--out", tmp_path / out, *extra)
            assert done.returncode == 0, done.stderr
            ours, theirs = weights(tmp_path / "one"), weights(tmp_path / out)
            for name in ours:
                torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=2e-4)
        server.faults.hanging = 0
        seen = len(server.asked("/inference/v1/generate"))
        watcher = threading.Thread(target=_fail_after, args=(server, seen + 10), daemon=True)
        watcher.start()
        ended = quick.ranks(2, "distill", yaml, "--out", tmp_path / "three", "training.steps=400", timeout=120)
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1, ended.stderr
    assert "status 500" in said[0]
    assert "continue with: headstart distill --resume" in said[0]
    assert list((tmp_path / "three" / "checkpoints").glob("step_*"))


def _fail_after(server: FakeServer, requests: int) -> None:
    while len(server.asked("/inference/v1/generate")) < requests:
        time.sleep(0.05)
    server.faults.failing = 10**6


# --- preflight --------------------------------------------------------------------------------------------------------


def test_preflight_says_what_an_endpoint_gives_and_compares_it_with_a_copy(tmp_path: Path, model: Any) -> None:
    config, copy = make_config(tmp_path, *TOP_K), str(tmp_path / "teacher")
    with FakeServer(*model, max_logprobs=-1) as url:
        found = run_server_preflight(config, url, copy=copy)
        other = run_server_preflight(config, url, copy=str(tmp_path / "student"))
    assert found.exit_code == 0, str(found)
    text = str(found)
    for words in (
        "ids asked for at each token",
        "scores up to 511 tokens",
        "tokenizer",
        "version 0.33.0",
        "local copy's by",
    ):
        assert words in text
    assert found.findings[-1].figures["largest"] < 1e-5
    assert other.exit_code == 2
    assert "check that the server has this checkpoint" in str(other)
    with FakeServer(*model, level="top_k", max_logprobs=20) as url:
        found = run_server_preflight(config, url, "m")
    assert found.exit_code == 1
    assert "20 most probable" in str(found)
    assert "V2 model runner" in str(found)
    with FakeServer(*model, level="sampled") as url:
        assert "a policy gradient" in str(run_server_preflight(config, url))
    assert run_server_preflight(config, "http://nowhere:1x").exit_code == 2


def test_preflight_of_a_run_scores_openings_through_the_server(tmp_path: Path, model: Any) -> None:
    with FakeServer(*model, max_logprobs=-1) as url:
        found = run_preflight(served_config(tmp_path, url))
    checks = {finding.check: finding for finding in found.findings}
    assert checks["teacher server"].severity == "ok"
    assert checks["teacher scores"].figures["teacher_requests"] == 8
    assert "bytes per token received" in checks["teacher scores"].message
    assert found.exit_code == 0, str(found)


def test_the_command_looks_at_a_url(tmp_path: Path, model: Any) -> None:
    from typer.testing import CliRunner

    from headstart.cli.main import app

    file = tmp_path / "run.yaml"
    file.write_text(resolved(make_config(tmp_path, *TOP_K)))
    with FakeServer(*model, max_logprobs=-1) as url:
        result = CliRunner().invoke(app, ["preflight", str(file), "--teacher-url", url])
    assert result.exit_code == 0, result.output
    assert "log-probabilities of the ids asked for" in " ".join(result.output.split())
    assert CliRunner().invoke(app, ["preflight", str(file), "--model", "m"]).exit_code != 0
