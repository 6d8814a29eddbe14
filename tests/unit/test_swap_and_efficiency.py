"""Prefix swap between constructed speakers, and costs read from constructed run folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from headstart.errors import RunFolderError
from headstart.explanation.efficiency import explain_efficiency, trained_run
from headstart.explanation.models import Models, Source
from headstart.explanation.swap import Swap, explain_swap
from headstart.models.vocabulary import SharedVocabulary
from headstart.records import PrefixState, Problem, Prompt, Rollout, Verdict
from headstart.reports.run import Run
from headstart.streams import uniforms

GOOD, BAD, STOP, LENGTH, PROBLEMS = 3, 4, 1, 8, 300


class Digits:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(str, ids))


@dataclass(frozen=True)
class Model:
    """Writes BAD at token 2 with probability `plans_badly`, at token 6 with probability `slips`, GOOD elsewhere."""

    plans_badly: float
    slips: float = 0.0


@dataclass(frozen=True)
class FakePair:
    """Speaks as `student` or as `teacher`; the first id of a prompt is the prompt, the rest what was said already."""

    student: Model
    teacher: Model
    tokenizer: Any = Digits()  # noqa: RUF009
    vocabulary: SharedVocabulary = SharedVocabulary(10, (STOP,))  # noqa: RUF009

    def with_student(self, student: Any) -> FakePair:
        return replace(self, student=student)

    def sample(self, prompts: Sequence[Prompt], *, who: str, max_tokens: int, purpose: str, samples: int = 1,
               seed: int = 0, sampling: None = None, batch_size: int | None = None) -> list[Rollout]:  # fmt: skip
        model = self.student if who == "student" else self.teacher
        said = []
        for prompt in prompts:
            for sample in range(samples):
                begun = (prompt.token_ids if who == "student" else prompt.teacher_token_ids)[1:]
                # Other draws for each model, as other logits would make of the same draws.
                key = (seed, f"{purpose}-{model}", 0)
                draws = uniforms(key, [(prompt.index, sample)], 0, LENGTH)[0]
                bad = {2: draws[2] < model.plans_badly, 6: draws[6] < model.slips}
                whole = [*begun, *(BAD if bad.get(n) else GOOD for n in range(len(begun), LENGTH)), STOP]
                said.append(Rollout(prompt, sample, tuple(whole[len(begun) :][:max_tokens]), stopped=True))
        return said


class AllGood:
    """Right when nothing went wrong."""

    name = "good"

    def problems(self) -> Sequence[Problem]:
        return [Problem(id=str(i)) for i in range(PROBLEMS)]

    def grade(self, problem: Problem, response: str) -> Verdict:
        right = str(BAD) not in response
        return Verdict(right, "correct" if right else "wrong")

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        return "wrong" if str(BAD) in prefix else "clean"


def swap(before: Model, after: Model, horizon: int = 4, task: Any = None, **students: Model) -> Swap:
    prompts = [Prompt(i, str(i), (0,), (9,)) for i in range(PROBLEMS)]
    task = task or AllGood()
    pair, trained = FakePair(before, Model(0.0)), {"after": after, **students}
    models = Models(pair, trained, task.problems(), prompts, task, horizon, 2, LENGTH + 1, 64)  # type: ignore[arg-type]
    return explain_swap(models)


def accuracies(found: Swap) -> dict[tuple[Source, Source], float]:
    return {(cell.prefix, cell.tail): cell.accuracy.mean for cell in found.cells}


def test_when_the_prefix_decides_the_prefix_carries_the_whole_gain() -> None:
    found = swap(Model(plans_badly=0.6), Model(plans_badly=0.1))
    by = accuracies(found)
    assert len(by) == 9
    assert by["before", "before"] == by["before", "after"] == by["before", "teacher"] == pytest.approx(0.4, abs=0.08)
    assert by["after", "before"] == by["after", "after"] == pytest.approx(0.9, abs=0.06)
    assert by["teacher", "before"] == by["teacher", "teacher"] == 1.0
    assert "within noise of the old student" in found.sentence
    gain = next(cell.gain for cell in found.cells if (cell.prefix, cell.tail) == ("after", "before"))
    assert gain.low > 0.3
    # Every tail is LENGTH - 4 tokens and a stop: three speakers finish two others' prefixes.
    assert found.generated_tokens == 3 * 2 * PROBLEMS * (LENGTH - 4 + 1)
    assert found.to_json()["format"] == 1


def test_a_tail_is_written_after_exactly_the_prefix_in_both_views() -> None:
    prompts = [Prompt(i, str(i), (0,), (9,)) for i in range(3)]
    heard: list[Prompt] = []

    class Listening(FakePair):
        def sample(self, prompts: Sequence[Prompt], **settings: Any) -> list[Rollout]:
            heard.extend(prompts)
            return [Rollout(p, 0, (7, STOP)[: settings["max_tokens"]], stopped=True) for p in prompts]

    models = Models(Listening(Model(0.0), Model(0.0)), {}, [], prompts, None, 2, 1, 9, 64)  # type: ignore[arg-type]
    begun = [
        Rollout(prompts[0], 0, (3, 4, 5), False),
        Rollout(prompts[1], 0, (3, STOP), True),
        Rollout(prompts[2], 0, (5, 6, 3, STOP), True),
    ]
    finished = models.finish("teacher", begun, 2)
    assert [(p.token_ids, p.teacher_token_ids) for p in heard] == [((0, 3, 4), (9, 3, 4)), ((0, 5, 6), (9, 5, 6))]
    assert [r.completion_ids for r in finished] == [(3, 4, 7, STOP), (3, STOP), (5, 6, 7, STOP)]


def test_when_the_tail_decides_the_tail_carries_it() -> None:
    by = accuracies(swap(Model(0.0, slips=0.5), Model(0.0, slips=0.0), twin=Model(0.0, slips=0.2)))
    assert len(by) == 16
    assert by["after", "before"] == pytest.approx(0.5, abs=0.08)
    assert by["before", "after"] == by["after", "after"] == 1.0
    assert by["before", "twin"] == pytest.approx(0.8, abs=0.08)


def test_prefixes_that_are_whole_responses_stand_and_a_horizon_without_tail_swaps_nothing() -> None:
    by = accuracies(swap(Model(0.6), Model(0.1), horizon=LENGTH))
    assert by["after", "before"] == by["after", "after"]
    found = swap(Model(0.6), Model(0.1), horizon=LENGTH + 1)
    assert found.cells == ()
    assert "leaves no tail" in found.sentence


def test_no_gain_has_no_place() -> None:
    assert "within noise" in swap(Model(0.5), Model(0.5)).sentence


# --- efficiency ------------------------------------------------------------------------------------------------------


def write_run(folder: Path, steps: int, seconds: float, tokens: int, **environment: Any) -> Run:
    folder.mkdir()
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        wobble = seconds * (0.9 if step % 2 else 1.1)
        phases = {f"seconds_{name}": wobble / 4 for name in ("rollout", "teacher", "student", "optimizer")}
        lines.append({"event": "step", "step": step, "seconds": wobble, "tokens": tokens, "peak_memory_gib": 0.1 * step,
                      **phases})  # fmt: skip
    (folder / "eval").mkdir()
    (folder / "eval" / f"step_{steps:06d}.json").write_text(
        json.dumps({"step": steps, "accuracy": 0.5, "interval": [0.4, 0.6]})
    )
    (folder / "config.yaml").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.11", "cpus": 2, **environment}))
    return trained_run(folder)


def test_costs_and_ratios_are_those_of_the_folders(tmp_path: Path) -> None:
    run, twin = write_run(tmp_path / "run", 20, 0.5, 100), write_run(tmp_path / "twin", 10, 4.0, 1500)
    found = explain_efficiency(run, twin)
    assert found.twin is not None
    assert (found.run.steps, found.run.generated_tokens, found.twin.generated_tokens) == (20, 2000, 15000)
    assert found.run.seconds == pytest.approx(10.0)
    assert found.run.phases["rollout"] == pytest.approx(2.5)
    assert found.run.peak_memory_gib == pytest.approx(2.0)
    per_step = found.ratios["seconds_per_step"]
    assert per_step is not None
    assert not isinstance(per_step, float)
    assert per_step.value == pytest.approx(8.0)
    assert 7.2 < per_step.low < 8.0 < per_step.high < 8.8
    assert found.ratios["seconds"] == pytest.approx(4.0)
    assert found.differences == {}
    assert "8.0 times as long" in found.sentence
    assert "intervals overlap" in found.sentence


def test_another_machine_is_named_and_a_run_alone_has_no_ratio(tmp_path: Path) -> None:
    run, twin = write_run(tmp_path / "run", 4, 0.5, 100), write_run(tmp_path / "twin", 4, 4.0, 1500, cpus=8)
    found = explain_efficiency(run, twin)
    assert found.differences == {"cpus": (2, 8)}
    assert "Seconds are not comparable: cpus differ" in found.sentence
    alone = explain_efficiency(run)
    assert alone.twin is None
    assert alone.ratios == {}
    (run.path / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="no training step"):
        trained_run(run.path)
