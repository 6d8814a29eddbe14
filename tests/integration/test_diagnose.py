"""The diagnosis of the bundled pair: what it advises, that it goes on after a kill, and the horizon it gives a run."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import quick
from headstart.config import loader
from headstart.config.schema import Config
from headstart.diagnosis.run import Diagnosis, diagnose
from headstart.distillation.run import distill
from headstart.errors import ConfigError, DataError, RunFolderError
from headstart.tasks.tiny import TinyTask

RECIPE = "recipe:tiny-esr"
TASK = "diagnosis.task={type: tiny, split: dev}"
SMALL = (TASK, "diagnosis.problems=12", "diagnosis.grid=[8,16,64]", "diagnosis.batch_size=8")
CLEAR = ("diagnosis.problems=24", "diagnosis.seed=2")
"""Few problems, but these say clearly where the damage is."""
SHORT_RUN = ("training.steps=2", "evaluation=null", "checkpoint.every=1", "tracking.rollouts_every=0")


def config(*overrides: str) -> Config:
    return loader.load(RECIPE, ["training.device=cpu", *overrides])


def advice(found: Diagnosis) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((found.folder / "diagnose" / "recommendation.json").read_text())
    assert record["sentence"] == found.recommendation.sentence
    return record


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_on_the_bundled_pair_the_advice_brackets_sixteen(tmp_path: Path, seed: int) -> None:
    found = diagnose(config(TASK, f"diagnosis.seed={seed}", "diagnosis.batch_size=256"), out=tmp_path)
    record = advice(found)
    assert record["supported"]
    assert record["low"] <= 16 <= record["high"]
    assert record["low"] <= record["tokens"] <= record["high"] <= 64
    assert "Warning" not in record["sentence"]
    assert record["plateau"]["low"] > 0.9
    assert found.decay.prompts == 64
    curve = {p.prefix_tokens: p for p in found.decay.points}
    assert curve[16].after_clean.mean > 0.9 > 0.3 > curve[16].after_wrong.mean  # this teacher never recovers
    assert curve[16].gift.mean > 0.9 > 0.7 > curve[4].gift.mean
    assert [row["tokens"] for row in record["costs"]] == sorted(row["tokens"] for row in record["costs"])
    full = record["costs"][-1]
    assert full["tokens"] == found.decay.longest_tokens
    assert record["costs"][0]["seconds"] < full["seconds"]
    assert record["costs"][0]["gib"] < full["gib"]


@pytest.mark.slow
def test_on_the_weak_pair_the_advice_warns(tmp_path: Path) -> None:
    weak = config(TASK, "student.path=tiny:student-weak", "diagnosis.batch_size=256")
    record = advice(diagnose(weak, out=tmp_path))
    assert record["low"] <= 16 <= record["high"]
    assert "correct opening is not enough" in record["sentence"]
    assert record["plateau"]["value"] < 0.965
    assert record["shortfall"]["low"] > 0


def test_a_killed_diagnosis_goes_on_and_ends_with_the_same_numbers(tmp_path: Path) -> None:
    heard: list[str] = []
    whole = diagnose(config(*SMALL), out=tmp_path / "whole", say=heard.append)
    assert (
        "12 problems: at most 264 generations" in heard[0]
    )  # own responses of both, four continuations at each length, eight gifts
    cut = tmp_path / "cut"

    def kill(done: int, total: int, text: str) -> None:
        assert 0 < done <= total
        if text.startswith("teacher right"):  # a live reading, so the first block is written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(config(*SMALL), out=cut, progress=kill)
    lines = (cut / "diagnose" / "decay.jsonl").read_text()
    partial = json.loads((cut / "diagnose" / "decay.json").read_text())
    assert partial["prompts"] == lines.count("\n") == 5  # readable while it goes on
    (cut / "diagnose" / "decay.jsonl").write_text(lines + '{"index": 5, "probl')  # torn by the kill
    again = diagnose(config(*SMALL, "optimizer.lr=1e-3", "diagnosis.batch_size=5"), out=cut)
    assert replace(again.decay, seconds=0.0) == replace(whole.decay, seconds=0.0)
    assert again.positions == whole.positions
    assert again.recommendation.window == whole.recommendation.window
    assert again.recommendation.plateau == whole.recommendation.plateau
    assert (cut / "diagnose" / "decay.jsonl").read_text().startswith(lines)
    heard.clear()
    diagnose(config(*SMALL), out=cut, say=heard.append)
    assert heard == []  # nothing is generated, so nothing is announced
    with pytest.raises(RunFolderError, match=r"other settings \(max_tokens: \d+ -> \d+; seed: \d+ -> \d+\)"):
        diagnose(config(*SMALL, "diagnosis.seed=1", "diagnosis.max_tokens=190"), out=cut)


def test_within_minutes_it_ends_and_what_was_chosen_gives_the_same_numbers(tmp_path: Path) -> None:
    said: list[str] = []
    heard: list[tuple[int, int]] = []
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a busy machine may be too slow for it
        found = diagnose(config(TASK), out=tmp_path / "cut", minutes=0.05, say=said.append,
                         progress=lambda done, total, text="", /: heard.append((done, total)))  # fmt: skip
    assert time.monotonic() - start < 0.05 * 60 + 20, "loading and a busy machine come on top"
    assert "In full: 64 problems, prefixes of 4, 8, 16, 32, 64, 128 tokens, responses of at most 200" in said[0]
    assert {total for _, total in heard} == {3}, "progress is in the time given"
    chosen = json.loads((tmp_path / "cut" / "diagnose" / "settings.json").read_text())
    assert chosen["minutes"] == 0.05
    assert chosen["prompts"] == found.decay.prompts < 64
    assert found.decay.grid == (0, *chosen["grid"])
    assert found.decay.student_cut == sum(
        not line["stopped"] and line["speaker"] == "student" and line["index"] < chosen["prompts"]
        for line in map(json.loads, (tmp_path / "cut" / "diagnose" / "rollouts.jsonl").read_text().splitlines())
    ) / chosen["prompts"]  # fmt: skip
    again = diagnose(config(TASK), out=tmp_path / "cut", minutes=1, say=said.append)
    assert (again.decay, again.positions, len(said)) == (found.decay, found.positions, 1)
    same = [f"diagnosis.problems={chosen['prompts']}", f"diagnosis.grid={chosen['grid']}",
            f"diagnosis.max_tokens={chosen['max_tokens']}"]  # fmt: skip
    plain = diagnose(config(TASK, *same), out=tmp_path / "plain")
    assert replace(plain.decay, seconds=0.0) == replace(found.decay, seconds=0.0)
    with pytest.raises(RunFolderError, match=r"minutes: 0\.05 -> .absent."):
        diagnose(config(TASK), out=tmp_path / "cut")


def test_the_folder_holds_the_files_of_the_contract(tmp_path: Path) -> None:
    found = diagnose(config(*SMALL), out=tmp_path)
    assert loader.load(tmp_path / "config.yaml") == config(*SMALL)
    assert json.loads((tmp_path / "environment.json").read_text())["torch"]
    decay = json.loads((tmp_path / "diagnose" / "decay.json").read_text())
    assert (decay["format"], decay["task"], decay["grid"]) == (1, "tiny", [0, 8, 16, 64])
    assert decay["points"][1].keys() >= {
        "prefix_tokens", "after_student", "after_clean", "after_wrong", "after_finished", "after_own",
        "student_continues", "gift", "damage",
    }  # fmt: skip
    positions = json.loads((tmp_path / "diagnose" / "positions.json").read_text())
    assert positions == found.positions
    assert positions["coverage"].keys() == {"0.4", "0.5", "0.9"}
    assert positions["rollouts"] == 12
    rollouts = [json.loads(line) for line in (tmp_path / "diagnose" / "rollouts.jsonl").read_text().splitlines()]
    assert positions["tokens"] == sum(len(r["ids"]) for r in rollouts if r["speaker"] == "student")


def write_prompts(path: Path, count: int, **columns: Sequence[str]) -> Path:
    problems = TinyTask("train", count).problems()
    rows = [
        {"prompt": list(p.messages or ()), **{name: values[i] for name, values in columns.items()}}
        for i, p in enumerate(problems)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_prompts_are_graded_by_their_answers_or_by_the_teachers_vote(tmp_path: Path) -> None:
    answers = [p.answer or "" for p in TinyTask("train", 16).problems()]
    path = write_prompts(tmp_path / "prompts.jsonl", 16, answer=answers)
    common = ("diagnosis.problems=16", "diagnosis.grid=[16]", "diagnosis.grader=number", f"prompts.source={path}")
    tiny = diagnose(config("diagnosis.problems=16", "diagnosis.grid=[16]"), out=tmp_path / "tiny").decay
    labelled = diagnose(config(*common, "prompts.answer_column=answer"), out=tmp_path / "labelled").decay
    voted = diagnose(config(*common), out=tmp_path / "voted")
    # The same prompts and draws, read by another grader.
    assert (labelled.student, labelled.points[1].after_student) == (tiny.student, tiny.points[1].after_student)
    assert (labelled.labelled, voted.decay.labelled) == (True, False)
    assert abs(voted.decay.student.successes - labelled.student.successes) <= 2  # the teacher is right on 98%
    assert "not truth" in " ".join(voted.recommendation.reasons)
    assert voted.decay.generated_tokens > 1.5 * labelled.generated_tokens


def test_problems_without_a_usable_answer_are_left_out(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.jsonl", 4, answer=["7", "", "none", "3"])
    common = (
        "diagnosis.grid=[16]",
        "diagnosis.grader=number",
        f"prompts.source={path}",
        "prompts.answer_column=answer",
    )
    found = diagnose(config(*common), out=tmp_path / "out").decay
    assert (found.prompts, found.left_out) == (2, 2)
    write_prompts(path, 4, answer=["a", "b", "", "d"])
    with pytest.raises(DataError, match=r"none of the first 4 answers .* diagnosis\.grader"):
        diagnose(config(*common), out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_diagnosed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"context is 256 tokens.*diagnosis\.max_tokens = 250"):
        diagnose(config(TASK, "diagnosis.max_tokens=250"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="holds no diagnosis or run"):
        diagnose(config(*SMALL), out=tmp_path / "mine")
    with pytest.warns(UserWarning, match=r"diagnosis\.task is evaluation\.task"):
        diagnose(
            config("diagnosis.task={type: tiny, split: test}", *SMALL[1:], "diagnosis.problems=2"), out=tmp_path / "a"
        )


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["horizon"], line["loss"]) for line in lines if line["event"] == "step"]


def test_a_run_diagnoses_itself_once_and_trains_as_if_its_horizon_had_been_given(tmp_path: Path) -> None:
    own = config(*SMALL, *CLEAR, *SHORT_RUN, "horizon={type: diagnosed, max_tokens: 200}")
    run = distill(own, out=tmp_path / "own").path
    record = json.loads((run / "diagnose" / "recommendation.json").read_text())
    assert record["supported"]
    given = config(*SHORT_RUN, f"horizon={{type: fixed, tokens: {record['tokens']}}}")
    assert losses(run) == losses(distill(given, out=tmp_path / "given").path)
    # Stopped after the first step: the stored number is used, whatever a new diagnosis would say.
    (run / "model").rename(tmp_path / "model")
    for folder in (run / "checkpoints").glob("step_*2"):
        folder.rename(tmp_path / folder.name)
    record["tokens"] = 5
    (run / "diagnose" / "recommendation.json").write_text(json.dumps(record))
    distill(resume=run)
    assert [horizon for horizon, _ in losses(run)][1:] == [5]


def test_a_run_stopped_in_its_diagnosis_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = config(*SMALL, *SHORT_RUN, "horizon={type: diagnosed, max_tokens: 200}", "training.steps=1")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("headstart.diagnosis.run.recommend", interrupt)
        with pytest.raises(KeyboardInterrupt):
            distill(own, out=tmp_path)
    measured = (tmp_path / "diagnose" / "decay.jsonl").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few problems may support nothing
        distill(resume=tmp_path)
    assert (tmp_path / "diagnose" / "decay.jsonl").read_bytes() == measured
    assert len(losses(tmp_path)) == 1


def test_a_run_takes_the_horizon_of_a_finished_diagnosis(tmp_path: Path) -> None:
    place = tmp_path / "diagnosis"
    wanted = f"horizon={{type: diagnosed, folder: {place}, max_tokens: 200}}"
    with pytest.raises(RunFolderError, match=r"holds no finished diagnosis.*headstart diagnose"):
        distill(config(*SHORT_RUN, wanted), out=tmp_path / "run")
    diagnose(config(*SMALL, *CLEAR), out=place)
    path = place / "diagnose" / "recommendation.json"
    record = json.loads(path.read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = distill(config(*SHORT_RUN, wanted), out=tmp_path / "run").path
    assert {horizon for horizon, _ in losses(run)} == {record["tokens"]}
    with pytest.warns(UserWarning, match=r"diagnosed the student tiny:student, but this run's is tiny:student-weak"):
        distill(config(*SHORT_RUN, wanted, "student.path=tiny:student-weak"), out=tmp_path / "other")
    path.write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(RunFolderError, match="format 2"):
        distill(config(*SHORT_RUN, wanted), out=tmp_path / "newer")
    path.write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        distill(config(*SHORT_RUN, wanted), out=tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_a_teacher_without_a_lead_means_full_rollouts(tmp_path: Path) -> None:
    alike = config(*SMALL, *SHORT_RUN, "teacher.path=tiny:student", "horizon={type: diagnosed, max_tokens: 60}")
    with pytest.warns(UserWarning, match="No short horizon is supported by this evidence"):
        run = distill(alike, out=tmp_path / "run").path
    record = json.loads((run / "diagnose" / "recommendation.json").read_text())
    assert (record["supported"], record["tokens"]) == (False, None)
    assert {horizon for horizon, _ in losses(run)} == {60}


@pytest.mark.slow
def test_under_two_ranks_one_diagnoses_and_both_use_its_number(tmp_path: Path) -> None:
    settings = (*SMALL, *CLEAR, *SHORT_RUN, "horizon={type: diagnosed, max_tokens: 200}", "training.device=cpu")
    done = quick.ranks(2, "distill", RECIPE, *settings, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("diagnosing where this run should stop") == 1
    record = json.loads((tmp_path / "run" / "diagnose" / "recommendation.json").read_text())
    assert {horizon for horizon, _ in losses(tmp_path / "run")} == {record["tokens"]}
    # Eight rollouts a step over both ranks, none of which stops within so few tokens.
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines if line["event"] == "step"] == [8 * record["tokens"]] * 2
