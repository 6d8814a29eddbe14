"""`headstart preflight` as a user meets it, and its cheap part before every run."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import quick
from headstart.assemble import memory as loading
from headstart.checks import run as building
from headstart.checks.findings import Finding, Preflight
from headstart.checks.run import cheap_preflight, enforce, run_preflight
from headstart.cli.main import main
from headstart.config.loader import load
from headstart.config.render import resolved
from headstart.distillation.run import distill
from headstart.errors import ConfigError
from headstart.testing import random_model, write_checkpoint
from preflight_pairs import Side, loaded, of, write_sides
from small_tokenizers import piece_tokenizer
from support import beside_progress, make_config

RECIPE = "recipe:tiny-esr"
CHECKS = {
    "vocabulary", "prompt ids", "duplicate prompts", "prompt length", "prompt form", "test overlap",
    "stop tokens", "chat template",
    "self-test", "teacher determinism", "engine log-probs", "trainable weights", "gradients",
    "memory before loading", "memory", "time",
}  # fmt: skip


def test_the_bundled_pair_is_clean_in_seconds_without_network(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = quick.run("preflight", RECIPE, "--out", tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert beside_progress(done.stderr) == ""
    assert done.stderr.startswith("[0:00] loading torch and transformers\n")
    written = json.loads((tmp_path / "diagnose" / "preflight.json").read_text())
    assert written["format"] == 1
    assert written["exit_code"] == 0
    assert {f["check"] for f in written["findings"]} == CHECKS
    assert {f["severity"] for f in written["findings"]} <= {"ok", "note"}
    for finding in written["findings"]:
        assert set(finding) == {"check", "severity", "message", "remedy", "figures"}
        assert finding["check"] in done.stdout


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["headstart", "preflight", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    code = stop.value.code
    assert isinstance(code, int)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(resolved(make_config(tmp_path)))
    code, text = run(monkeypatch, capsys, recipe)
    assert code == 0, text
    code, text = run(monkeypatch, capsys, recipe, "divergence.support.type=sampled", "rollout.top_p=0.9")
    assert code == 1
    assert "1 warning" in text
    assert "use support full" in text
    code, text = run(monkeypatch, capsys, recipe, f"prompts.source={tmp_path / 'none.jsonl'}")
    assert code == 2
    assert "does not exist" in text
    assert "Traceback" not in text
    code, text = run(monkeypatch, capsys)
    assert code == 2
    assert "which run?" in text
    (tmp_path / "file").touch()
    code, text = run(monkeypatch, capsys, recipe, "--out", tmp_path / "file")
    assert (code, "--out" in text, "Traceback" in text) == (2, True, False)


def test_what_stops_loading_is_a_finding(tmp_path: Path) -> None:
    result = run_preflight(make_config(tmp_path, "teacher.path=./nowhere"))
    assert result.exit_code == 2
    assert sum("./nowhere" in f.message for f in result.findings) == 1
    result = run_preflight(make_config(tmp_path, "horizon.tokens=600"))
    (finding,) = of(result, "context length")
    assert finding.severity == "blocking"
    assert "context is 512 tokens" in finding.message


def test_weights_that_do_not_fit_are_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(loading, "load_pair", full)
    (finding,) = of(run_preflight(make_config(tmp_path)), "memory")
    assert finding.severity == "blocking"
    assert "Tried to allocate 9 GiB" in finding.message


def test_prompts_in_the_test_are_found(tmp_path: Path) -> None:
    make_config(tmp_path)
    task = tmp_path / "task.jsonl"
    rows = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()[:3]]
    task.write_text("".join(json.dumps({"prompt": row, "answer": "w1"}) + "\n" for row in rows))
    evaluation = f"evaluation={{task: {{type: jsonl, path: {task}}}, max_tokens: 8}}"
    (finding,) = of(run_preflight(make_config(tmp_path, evaluation)), "test overlap")
    assert (finding.severity, finding.figures["same"]) == ("warning", 3)
    assert [example["train"] for example in finding.figures["examples"]] == [f"prompts/{row}" for row in range(3)]


def test_progress_counts_the_checks(tmp_path: Path) -> None:
    heard: list[tuple[int, int, str]] = []
    run_preflight(make_config(tmp_path), progress=lambda *said: heard.append(said))  # type: ignore[arg-type]
    texts = [text for _, _, text in heard]
    assert texts[:3] == ["reading the prompts", "planning memory before loading", "loading and trying both models"]
    assert "stop tokens: sampling 8 responses of at most 160 tokens from the student" in texts
    assert "time: timed 3 of 3 steps and samplings" in texts
    counted = [done for done, total, _ in heard if total]
    assert sorted(set(counted)) == list(range(heard[-1][1] + 1))
    assert counted == sorted(counted)


def test_reruns_give_the_same_findings(tmp_path: Path) -> None:
    def timeless(result: Preflight) -> list[dict[str, Any]]:
        moving = ("time", "memory", "memory before loading")  # what the clock and the machine say
        return [f for f in result.to_json()["findings"] if f["check"] not in moving]

    config = load(RECIPE, [])
    assert timeless(run_preflight(config)) == timeless(run_preflight(config))


# --- before every run -------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_cheap_findings(tmp_path: Path) -> None:
    distill(make_config(tmp_path, "training.steps=1"), out=tmp_path / "run")
    written = json.loads((tmp_path / "run" / "diagnose" / "preflight.json").read_text())
    assert [f["check"] for f in written["findings"]] == [
        "vocabulary", "stop tokens", "prompt ids", "duplicate prompts", "prompt length", "memory",
    ]  # fmt: skip
    quick = run_preflight(make_config(tmp_path), quick=True).to_json()
    assert quick["not_made"] == [
        "alignment", "chat template", "self-test", "teacher determinism", "engine log-probs", "gradients", "time",
    ]  # fmt: skip
    assert written == quick | {"findings": written["findings"], "not_made": []}


def test_a_sound_run_says_nothing_and_takes_no_time() -> None:
    config = load(RECIPE, ["evaluation=null"])
    pair, prompts = loaded(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started = time.process_time()
        enforce(cheap_preflight(pair, [], prompts))
    assert time.process_time() - started < 0.2


def test_a_run_warns_of_duplicates_with_the_remedy(tmp_path: Path) -> None:
    config = make_config(tmp_path, "training.steps=1")
    source = tmp_path / "prompts.jsonl"
    source.write_text(source.read_text() * 2)
    with pytest.warns(UserWarning, match=r"24 of 48 prompts repeat another one.*; remove the repeated rows"):
        distill(config, out=tmp_path / "run")


def test_a_run_with_an_id_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    mark = {"template": "<mark> {{ messages[0]['content'] }} <assistant>", "special": ("<mark>",)}
    config = write_sides(tmp_path, Side(rows=46, **mark), Side(special=("<mark>",)))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match=r"no embedding for .*; resize the student's embeddings"):
            distill(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_step_that_may_not_fit_warns_and_one_that_cannot_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, prompts = loaded(make_config(tmp_path))
    (memory,) = of(cheap_preflight(pair, [], prompts), "memory")
    needed = memory.figures["needed_gib"] * 2**30
    for share, outcome in ((0.95, "warns"), (1.05, "warns"), (1.45, "warns"), (1.55, "raises")):
        monkeypatch.setattr(building, "free_bytes", lambda device, share=share: needed / share)
        result = cheap_preflight(pair, [], prompts)
        if outcome == "raises":
            with pytest.raises(ConfigError, match="a step at horizon 6 needs"):
                enforce(result)
        else:
            with pytest.warns(UserWarning, match="a step at horizon 6 needs"):
                enforce(result)


def test_notes_are_not_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enforce(Preflight((Finding("a", "note", "text"), Finding("b", "ok", "text"))))


def test_a_tokenizer_without_exact_bytes_is_a_table_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path)
    teacher = write_checkpoint(tmp_path / "other", random_model("llama", 46), piece_tokenizer())
    recipe = tmp_path / "run.yaml"
    recipe.write_text(resolved(config))
    code, text = run(monkeypatch, capsys, recipe, f"teacher.path={teacher}")
    assert code == 2
    assert "1 blocking" in text
    assert "WordPiece" in text
    assert "engine log-probs" in text
