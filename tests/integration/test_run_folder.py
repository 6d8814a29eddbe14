"""What a run leaves behind, and that every choice the configuration offers really trains."""

from __future__ import annotations

import json
import math
import re
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headstart.cli.main import main
from headstart.config import loader
from headstart.config.render import resolved
from headstart.config.schema import Config
from headstart.distillation.run import distill
from headstart.train.step import sample_rollouts
from support import make_config, make_parts

METRICS_PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
LORA = "tuning={type: lora, r: 4, alpha: 8, dropout: 0.05}"


def lines_of(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def task_file(folder: Path, count: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w{i} w3", "answer": f"w{i}"}) + "\n" for i in range(count)))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """Five LoRA steps with evaluation, TensorBoard, sample rollouts and both output formats."""
    folder = tmp_path_factory.mktemp("finished")
    task = f"{{type: jsonl, path: {task_file(folder)}}}"
    config = make_config(
        folder,
        LORA,
        f"evaluation={{task: {task}, every: 2, samples: 3, max_tokens: 12}}",
        "training.steps=5",
        "checkpoint={every: 1, keep_last: 2}",
        "tracking={tensorboard: true, rollouts_every: 2, rollouts_saved: 3}",
        "output.format=both",
    )
    distill(config, out=folder / "run")
    return folder / "run", config


def test_every_file_is_there(finished: tuple[Path, Config]) -> None:
    run, config = finished
    assert names(run) == {
        *("config.yaml", "environment.json", "inputs.json", "metrics.jsonl", ".lock"),
        *("checkpoints", "diagnose", "eval", "model", "rollouts", "tensorboard"),
    }
    assert loader.load(run / "config.yaml") == config
    environment = json.loads((run / "environment.json").read_text())
    assert {"command", "started", "python", "headstart", "torch", "transformers", "peft", "platform"} <= set(
        environment
    )
    assert environment["torch"] == torch.__version__
    assert names(run / "rollouts") == {f"step_{step:06d}.{kind}" for step in (1, 2, 4, 5) for kind in ("txt", "jsonl")}
    assert names(run / "eval") == {f"step_{step:06d}.{kind}" for step in (0, 2, 4, 5) for kind in ("json", "jsonl")}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md", "adapter"} <= (
        names(run / "model")
    )
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names(run / "model" / "adapter")
    assert not list(run.rglob("*.tmp")) + list(run.rglob("*.incomplete"))


def test_checkpoints_are_the_last_two_and_the_best(finished: tuple[Path, Config]) -> None:
    run, _ = finished
    accuracy = {line["step"]: line["accuracy"] for line in lines_of(run, "evaluation") if line["step"] > 0}
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    assert names(run / "checkpoints") == {f"step_{step:06d}" for step in {best, 4, 5}}
    newest = run / "checkpoints" / "step_000005"
    assert names(newest) == {"model.safetensors", "optimizer.pt", "state.json", "manifest.json"}
    progress = json.loads((newest / "state.json").read_text())["progress"]
    assert progress["step"] == 5
    assert progress["generated_tokens"] == lines_of(run, "step")[-1]["generated_tokens"]
    assert all("lora_" in name for name in load_file(newest / "model.safetensors"))


def test_saved_rollouts_show_the_divergence_of_every_token(finished: tuple[Path, Config]) -> None:
    text = (finished[0] / "rollouts" / "step_000002.txt").read_text()
    heads = re.findall(r"^# (\S+) sample (\d): (\d+) tokens, (stopped|reached the horizon), ([\d.]+) nats", text, re.M)
    bodies = [block.split("\n", 1)[1] for block in text.split("\n# ")]
    assert len(heads) == len(bodies) == 3
    for (name, sample, tokens, ending, mean), body in zip(heads, bodies, strict=True):
        nats = [float(x) for x in re.findall(r"⟨([\d.]+)⟩", body)]
        assert name.startswith("prompts/")
        assert sample == "0"
        assert ending == "stopped" or tokens == "6"
        assert 0 < len(nats) <= int(tokens)
        assert sum(nats) / int(tokens) == pytest.approx(float(mean), abs=0.006)
    lines = [json.loads(line) for line in (finished[0] / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
    for line, (name, _, tokens, ending, mean), body in zip(lines, heads, bodies, strict=True):
        assert body.startswith("> " + line["prompt"])
        assert re.sub("⟨[^⟩]*⟩", "", body.split("\n", 1)[1]).strip() == "".join(line["tokens"]).strip()
        assert len(line["tokens"]) == len(line["divergence"]) == line["scored"] == int(tokens)
        assert sum(line["divergence"]) / line["scored"] == pytest.approx(float(mean), abs=1e-4)
        assert (line["problem_id"], line["stopped"], line["verdict"]) == (name, ending == "stopped", "")


def test_evaluations_agree_with_their_rows(finished: tuple[Path, Config]) -> None:
    run, _ = finished
    for line in lines_of(run, "evaluation"):
        stem = run / "eval" / f"step_{line['step']:06d}"
        figures = json.loads(stem.with_suffix(".json").read_text())
        assert {"event": "evaluation", **figures} == line
        rows = [json.loads(row) for row in stem.with_suffix(".jsonl").read_text().splitlines()]
        assert len(rows) == 5 * 3 == line["problems"] * line["samples"]
        assert line["accuracy"] == pytest.approx(sum(row["verdict"]["correct"] for row in rows) / len(rows))
        assert line["generated_tokens"] == sum(row["tokens"] for row in rows)
        assert line["settings"]["max_tokens"] == 12
        assert max(row["tokens"] for row in rows) > 6, "evaluation must not stop at the training horizon"


def test_tensorboard_has_the_same_numbers(finished: tuple[Path, Config]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, _ = finished
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    steps = lines_of(run, "step")
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in steps])
    assert [e.step for e in events.Scalars("evaluation/accuracy")] == [0, 2, 4, 5]
    assert "train/divergence_by_position/0-4" in events.Tags()["scalars"]


def documented(section: str) -> list[str]:
    """Keys of one table of the metrics page, in its order."""
    page = METRICS_PAGE.read_text().split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| `([a-z0-9_]+)` \|", page, re.M)


@pytest.mark.parametrize(("section", "event"), [("Step lines", "step"), ("Evaluation lines", "evaluation")])
def test_every_metric_is_documented_and_every_documented_metric_exists(
    finished: tuple[Path, Config], section: str, event: str
) -> None:
    listed = documented(section)
    assert len(listed) == len(set(listed)) > 10
    for line in lines_of(finished[0], event):
        assert set(line) == set(listed)


def test_metrics_of_another_tokenizer_are_documented(finished: tuple[Path, Config], tmp_path: Path) -> None:
    overrides = ("student.path=tiny:student", "teacher.path=tiny:teacher-cross", "prompts.source=tiny")
    distill(make_config(tmp_path, *overrides, "training.steps=1"), out=tmp_path / "run")
    more = set(lines_of(tmp_path / "run", "step")[0]) - set(lines_of(finished[0], "step")[0])
    assert more == set(documented("Step lines with another tokenizer"))


def test_the_metric_of_a_teachers_context_is_documented(finished: tuple[Path, Config], tmp_path: Path) -> None:
    distill(loader.load("recipe:tiny-context", ["training.steps=1", "evaluation=null"]), out=tmp_path / "run")
    more = set(lines_of(tmp_path / "run", "step")[0]) - set(lines_of(finished[0], "step")[0])
    assert more == set(documented("Step lines with a context of the teacher's"))


def test_step_lines_are_consistent(finished: tuple[Path, Config]) -> None:
    steps = lines_of(finished[0], "step")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [line["generated_tokens"] for line in steps] == list(accumulate(line["tokens"] for line in steps))
    for line in steps:
        assert line["share_stopped"] + line["share_reached_horizon"] == pytest.approx(1)
        ranks = ("teacher_rank_1", "teacher_rank_2_5", "teacher_rank_6_10", "teacher_rank_over_10")
        assert sum(line[key] for key in ranks) == pytest.approx(1)
        assert line["completion_length_p10"] <= line["completion_length_p50"] <= line["completion_length_p90"]
        assert line["completion_length_max"] <= line["horizon"] == 6
        assert line["completion_length_mean"] * line["rollouts"] == pytest.approx(line["tokens"])
        assert set(line["divergence_by_position"]) <= {"0-4", "5-9"}
        parts = sum(line[f"seconds_{part}"] for part in ("rollout", "teacher", "student", "optimizer"))
        assert 0 < parts <= line["seconds"]
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])


# --- every choice trains ---------------------------------------------------------------------------------------------

SUPPORTS = ["{type: full}", "{type: top_k, k: 8}", "{type: sampled}"]
CHOICES = [
    *(f"divergence={{type: {kind}, support: {s}}}" for kind in ("reverse_kl", "forward_kl", "jsd") for s in SUPPORTS),
    *(f"training.denominator={kind}" for kind in ("trajectory", "token", "sum")),
    *(f"schedule={{type: {kind}, warmup: 0.5}}" for kind in ("cosine", "linear", "constant")),
    "tuning.gradient_checkpointing=true",
    "training.logit_chunk=3",
    "training.micro_batch=2",
    "rollout={temperature: 0, samples_per_prompt: 2}",
    "rollout={temperature: 0.8, top_p: 0.9, top_k: 5, batch_size: 4}",
    "prompts.chat=false",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair, prompts and `run.yaml` (two steps)."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "run.yaml").write_text(resolved(make_config(folder, "training.steps=2")))
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`headstart distill ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["headstart", "distill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_trains(small: Path, tmp_path: Path, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    command(monkeypatch, small / "run.yaml", "--out", run, choice)
    steps = lines_of(run, "step")
    assert len(steps) == 2
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    before = load_file(small / "student" / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    assert any((after[name] - tensor).abs().max() > 1e-4 for name, tensor in before.items())


def test_limit_and_over_long_prompts(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the first 10 prompts (1 to 6 words, 3 tokens of template) those with more than 4 words are dropped."""
    run = tmp_path / "run"
    command(monkeypatch, small / "run.yaml", "--out", run, "prompts.limit=10", "prompts.max_tokens=7")
    assert "8 prompts (longest 7 tokens, 2 over-long dropped)" in capsys.readouterr().out
    (line, _) = lines_of(run, "step")
    assert line["rollouts"] == 6
    assert line["prompt_tokens"] <= 6 * 7


def test_a_prompt_is_encoded_once_for_its_samples(small: Path, tmp_path: Path) -> None:
    config = loader.load(small / "run.yaml", ["rollout.samples_per_prompt=3", "training.prompts_per_step=4"])
    parts = make_parts(tmp_path / "run", config)
    parts.student.decoder = None  # so that every token comes by the model's own door
    calls: list[tuple[int, int]] = []
    parts.student.backbone.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rollouts = sample_rollouts(parts, 0, 5)
    assert len(rollouts) == 12
    prefill, *decoding = calls
    assert prefill == (4, max(len(r.prompt.token_ids) for r in rollouts))
    assert decoding[0] == (12, 1)
    assert len({r.completion_ids for r in rollouts if r.prompt.index == rollouts[0].prompt.index}) > 1


# --- plug-ins --------------------------------------------------------------------------------------------------------

PLUGINS = '''
from pathlib import Path

from headstart.records import Problem, Verdict


class Growing:
    """Starts at `start` and grows by one whenever a step was measured; stops the process once, before step 4."""

    def __init__(self, start, fuse=None):
        self.now, self.fuse = start, fuse

    def tokens(self, step):
        if self.fuse and step == 3 and Path(self.fuse).exists():
            Path(self.fuse).unlink()
            raise KeyboardInterrupt
        return self.now

    def observe(self, seen):
        assert seen.horizon == self.now
        self.now += 1

    def state_dict(self):
        return {"now": self.now}

    def load_state_dict(self, state):
        self.now = state["now"]


class Echo:
    """Right if the response begins with the question's word."""

    name = "echo"

    def __init__(self, words):
        self.words = words

    def problems(self):
        return [Problem(id=w, messages=({"role": "user", "content": w},), answer=w) for w in self.words]

    def grade(self, problem, response):
        right = response.startswith(problem.answer)
        return Verdict(right, "correct" if right else "wrong", {"short": len(response.split()) < 5})

    def prefix_state(self, problem, prefix):
        return "unknown"
'''


def test_plug_ins_work_and_a_horizon_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A custom horizon and a custom task from a file in the current directory; the horizon's state survives."""
    (tmp_path / "my_plugins.py").write_text(PLUGINS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    fuse = tmp_path / "fuse"

    def config(arguments: str) -> Config:
        return make_config(
            tmp_path,
            f"horizon={{type: custom, path: 'my_plugins:Growing', arguments: {{{arguments}}}}}",
            "evaluation={task: {type: custom, path: 'my_plugins:Echo', arguments: {words: [w1, w2, w3]}}, "
            "samples: 2, max_tokens: 9}",
            "training.steps=6",
        )

    straight = distill(config("start: 3"), out=tmp_path / "straight")
    assert straight.after is not None
    assert straight.after.task == "echo"
    assert 0 <= straight.after.details["short"] <= 1
    assert [line["horizon"] for line in lines_of(straight.path, "step")] == [3, 4, 5, 6, 7, 8]

    fuse.touch()
    with pytest.raises(KeyboardInterrupt):
        distill(config(f"start: 3, fuse: {fuse}"), out=tmp_path / "run")
    resumed = distill(resume=tmp_path / "run")
    assert [line["horizon"] for line in lines_of(resumed.path, "step")] == [3, 4, 5, 6, 7, 8]
    a, b = (load_file(path / "model" / "model.safetensors") for path in (straight.path, resumed.path))
    assert all(torch.equal(a[name], b[name]) for name in a)
