"""The pilot with real training: on the bundled pair it must find the horizon, within its budget."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.config import loader
from headstart.config.schema import Config
from headstart.distillation.arms import ArmRun
from headstart.distillation.run import load
from headstart.errors import ConfigError, DataError, Interrupted, RunFolderError
from headstart.ranks.runtime import Runtime
from headstart.reports.run import read_run
from headstart.study import pilot as build_pilot
from headstart.study.halving import Arm, Cost, Plan, Prices, Rung
from headstart.study.pilot import Trainer, development, run_pilot
from headstart.train.parts import Parts
from headstart.train.step import train_step
from support import make_config

RECIPE = "recipe:tiny-esr"
DEV = ("diagnosis.task.type=tiny", "diagnosis.task.split=dev")


def tiny(*overrides: str) -> Config:
    return loader.load(RECIPE, [*DEV, *overrides])


def test_the_bundled_pair_wants_its_three_decisions_covered(tmp_path: Path) -> None:
    """N = 4 ends before the first decision, N = 16 covers all three, N = 64 costs three times as much for no more."""
    config = tiny(
        "training.steps=400",
        "diagnosis.problems=48",
        "diagnosis.pilot.horizons=[4, 16, 64]",
        "diagnosis.pilot.rates=[3.0e-4]",
    )
    # A kill during the timing may leave an arm behind; it must not be taken for the first rung of this pilot.
    (tmp_path / "diagnose" / "pilot-arms" / "4-0.0003" / "checkpoints" / "step_000001").mkdir(parents=True)
    said: list[str] = []
    bars: list[tuple[int, int]] = []
    pilot = run_pilot(config, tmp_path, lambda done, total, text="": bars.append((done, total)), said.append)

    assert pilot.winner is not None
    assert pilot.winner.arm.tokens == 16
    assert pilot.winner.gain.low > 0
    four = next(trial for trial in pilot.trials if trial.arm.tokens == 4)
    assert four.outcomes[-1].accuracy < pilot.winner.accuracy - 0.1
    record = json.loads((tmp_path / "diagnose" / "pilot.json").read_text())
    assert record == json.loads(json.dumps(pilot.to_json()))
    assert record["budget"]["planned_seconds"] <= record["budget"]["seconds"]
    # A machine that is held up after the timing can only overrun by the one unit it was in.
    assert record["spent"]["seconds"] <= 1.2 * record["budget"]["seconds"]
    assert "budget" in said[-1]
    assert 2 <= bars[-1][0] <= bars[-1][1] == 3  # on a machine held up long enough the last and dearest is dropped
    arms = [read_run(tmp_path / "diagnose" / "pilot-arms" / f"{tokens}-0.0003") for tokens in (4, 16)]
    assert [run.description for run in arms] == ["early stopping, N = 4", "early stopping, N = 16"]
    assert arms[1].points[-1].accuracy == pytest.approx(pilot.winner.accuracy)
    assert not list((tmp_path / "diagnose").glob("pilot-arms/*/checkpoints"))


def test_a_finished_pilot_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after the second graded rung: the rest is done later, nothing twice, and the record is the same."""
    config = tiny("training.steps=100", "diagnosis.problems=16", "diagnosis.pilot.rates=[9.0e-4]")
    # Prices far above the real ones, so that no machine is slow enough to change the plan in between.
    second = Cost(1.0, 100.0)
    prices = Prices(dict.fromkeys((8, 16, 32), second), second.times(5), second, Cost(), second)
    monkeypatch.setattr(Trainer, "time", lambda trainer, horizons: prices)
    train, calls = ArmRun.train, list[str]()

    def cut(run: ArmRun, *arguments: Any, **keywords: Any) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(run.name)
        train(run, *arguments, **keywords)

    monkeypatch.setattr(ArmRun, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        run_pilot(config, tmp_path)
    first, calls = calls, []
    resumed = run_pilot(config, tmp_path)
    assert [*first, *calls] == [f"N = {tokens} at lr 0.0009" for tokens in (16, 8, 32)]
    starts = (tmp_path / "diagnose" / "pilot-arms").glob("*/eval/step_000000.json")
    assert len({path.read_text() for path in starts}) == 1  # the untrained student was graded once

    monkeypatch.setattr(ArmRun, "train", None)  # nothing is left to train
    assert run_pilot(config, tmp_path).to_json() == resumed.to_json()
    with pytest.raises(RunFolderError, match="other settings"):
        run_pilot(tiny("training.steps=101", "diagnosis.problems=16"), tmp_path)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_an_arm_goes_on_as_if_it_had_never_been_put_away(tmp_path: Path, tuning: str) -> None:
    """Two rungs with another arm in between give the weights of one straight run, bit for bit."""
    config = make_config(
        tmp_path,
        f"tuning.type={tuning}",
        "diagnosis.max_tokens=12",
        "diagnosis.task.type=jsonl",
        f"diagnosis.task.path={_answered(tmp_path)}",
    )
    trainer = build_pilot.open_trainer(config, tmp_path / "diagnose")
    arm, other = Arm(6, 1e-3), Arm(3, 3e-3)
    price = Prices({3: Cost(), 6: Cost()}, Cost(), Cost(), Cost(), Cost())
    plan = Plan((arm, other), (Rung(3, 2, 2), Rung(7, 1, 1)), 1, price)

    def weights() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trainer.shared.pair.student.trainable().items()}

    trainer.run(arm, 0, plan)
    after_three = weights()
    trainer.run(other, 0, plan)
    assert any(not torch.equal(after_three[name], w) for name, w in weights().items())
    outcome = trainer.run(arm, 1, plan)
    in_parts = weights()
    straight = ArmRun("straight", tmp_path / "straight", trainer.arm_run(arm, 1, plan).config)
    straight.train(trainer.shared)
    assert all(torch.equal(in_parts[name], w) for name, w in weights().items())
    assert outcome.steps == 7
    assert len(outcome.scores) == 20
    # The second rung trained four steps, not seven.
    run = read_run(straight.folder)
    trained = sum(step["tokens"] for step in run.steps[3:])
    assert outcome.cost.tokens == trained + run.points[-1].evaluation["generated_tokens"]
    assert trainer.run(arm, 1, plan) == outcome


def test_an_arm_whose_loss_is_not_finite_is_known_again(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, "diagnosis.max_tokens=12", "diagnosis.task.type=jsonl", f"diagnosis.task.path={_answered(tmp_path)}"
    )
    trainer = build_pilot.open_trainer(config, tmp_path / "diagnose")
    arm = Arm(6, 1e30)
    plan = Plan((arm,), (Rung(3, 1, 1),), 1, Prices({6: Cost()}, Cost(), Cost(), Cost(0.5), Cost()))
    outcome = trainer.run(arm, 0, plan)
    assert (outcome.steps, outcome.scores) == (1, ())
    assert outcome.cost.seconds > 0.5
    assert trainer.run(arm, 0, plan) == outcome


def test_a_signal_during_a_rung_stops_the_pilot_and_a_rung_that_was_cut_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        tmp_path, "diagnosis.max_tokens=12", "diagnosis.task.type=jsonl", f"diagnosis.task.path={_answered(tmp_path)}"
    )
    trainer = build_pilot.open_trainer(config, tmp_path / "diagnose")
    arm = Arm(6, 1e-3)
    plan = Plan((arm,), (Rung(3, 1, 1),), 1, Prices({6: Cost()}, Cost(), Cost(), Cost(), Cost()))
    straight = ArmRun("straight", tmp_path / "straight", trainer.arm_run(arm, 0, plan).config)
    straight.train(trainer.shared)

    def killed(parts: Parts, step: int, tokens: int) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(parts, step, tokens)

    monkeypatch.setattr("headstart.train.loop.train_step", killed)
    with pytest.raises(Interrupted, match=r"stopped in N = 6 at lr 0\.001; the same command resumes it"):
        trainer.run(arm, 0, plan)
    monkeypatch.undo()
    outcome = trainer.run(arm, 0, plan)
    assert outcome.scores == tuple(read_run(straight.folder).points[-1].graded()["correct"].values())
    steps = [[s["loss"] for s in read_run(run.folder).steps] for run in (straight, trainer.arm_run(arm, 0, plan))]
    assert steps[0] == steps[1]


def _answered(folder: Path) -> Path:
    path = folder / "dev.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 3}", "answer": "w1"}) + "\n" for i in range(20)))
    return path


def test_training_prompts_with_answers_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "answered.jsonl"
    rows = [{"prompt": f"w{i}", "answer": f"w{i}" if i % 2 else None} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (f"prompts.source={path}", "prompts.answer_column=answer", "horizon={type: full, max_tokens: 9}")
    config = make_config(tmp_path, *overrides, "diagnosis.problems=36", "diagnosis.grader=exact")
    loaded, evaluation = development(config, load(config, Runtime.start("cpu")))
    problems, questions = loaded.problems, loaded.questions
    assert questions is not None
    graded = [questions.problems[prompt.index] for prompt in questions.prompts]
    assert [p.answer for p in graded] == [f"w{i}" for i in range(1, 36, 2)]  # of the first 36, those with answers
    assert not {p.id for p in problems} & {p.id for p in graded}
    assert len(problems) == len(loaded.prompts.prompts) == 40 - 18
    assert questions.settings.max_tokens == evaluation.max_tokens == 9
    assert questions.task.grade(graded[0], "w1").correct


def test_what_cannot_be_graded_or_afforded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"graded.*diagnosis\.task"):
        run_pilot(make_config(tmp_path / "random"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no pilot fits its budget: 10% of 2 full-rollout steps"):
        run_pilot(tiny("training.steps=2", "diagnosis.problems=16"), tmp_path / "short")
    assert not (tmp_path / "short" / "diagnose" / "pilot-timing.json").exists()  # the remedy works in the same folder
    with pytest.raises(ConfigError, match=r"found 300, longer than a full rollout of 200"):
        run_pilot(tiny("diagnosis.pilot.horizons=[16, 300]"), tmp_path / "long")


def test_horizons_come_from_the_recommendation(tmp_path: Path) -> None:
    config = tiny("horizon.tokens=24")
    assert build_pilot._horizons(config, 200, tmp_path) == (24, 12, 48)
    advice = {"tokens": 16, "low": 9, "high": 20, "supported": True}
    (tmp_path / "recommendation.json").write_text(json.dumps(advice))
    assert build_pilot._horizons(config, 200, tmp_path) == (16, 9, 20, 40)
    assert build_pilot._horizons(config, 30, tmp_path) == (16, 9, 20, 30)
    (tmp_path / "recommendation.json").write_text(json.dumps({**advice, "tokens": None, "supported": False}))
    assert build_pilot._horizons(config, 40, tmp_path) == (24, 12, 40)


def test_a_pilot_of_a_bundled_world_is_graded_on_prompts_it_does_not_train_on(tmp_path: Path) -> None:
    config = loader.load(RECIPE, ["diagnosis.problems=16", "training.device=cpu"])
    trainer = build_pilot.open_trainer(config, tmp_path)
    assert trainer.config.evaluation is not None
    assert trainer.config.evaluation.task.model_dump() == {"type": "tiny", "split": "train"}
    graded = {prompt.problem_id for prompt in trainer.questions.prompts}
    assert len(graded) == 16
    assert not graded & {prompt.problem_id for prompt in trainer.shared.prompts.prompts}
