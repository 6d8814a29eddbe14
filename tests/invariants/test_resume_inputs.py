"""A resumed run knows what it resumes: what shapes its trajectory is refused when it differs, or allowed by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.config import loader
from headstart.config.render import resolved
from headstart.config.schema import ModelConfig
from headstart.distillation.run import distill
from headstart.errors import CheckpointError, ConfigError, RunFolderError
from headstart.train import inputs as inputs_module
from headstart.train.inputs import model_parts
from headstart.train.loop import RunResult
from support import make_config

LORA = "tuning={type: lora, r: 4, alpha: 8, dropout: 0.1, targets: [q_proj, v_proj]}"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair, prompts and task, and in `run` a LoRA run of 4 steps: what resumed runs are compared to."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "task.jsonl").write_text(
        "".join(json.dumps({"prompt": f"w{i}", "answer": f"w{i}"}) + "\n" for i in (1, 2))
    )
    task = f"evaluation={{task: {{type: jsonl, path: {folder / 'task.jsonl'}}}, every: 3, samples: 2, max_tokens: 8}}"
    distill(make_config(folder, LORA, task, "checkpoint.keep_last=9"), out=folder / "run")
    return folder


@pytest.fixture
def world(straight: Path, tmp_path: Path) -> Path:
    """A copy of that folder in which the run has stopped after step 2; its paths lead into the copy."""
    folder = tmp_path / "world"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "run" / "model")
    for step in (3, 4):
        shutil.rmtree(folder / "run" / "checkpoints" / f"step_{step:06d}")
    for name in ("config.yaml", "inputs.json"):
        file = folder / "run" / name
        file.write_text(file.read_text().replace(str(straight), str(folder)))
    return folder


def edit(run: Path, *overrides: str) -> None:
    """Change `config.yaml` as a user would."""
    (run / "config.yaml").write_text(resolved(loader.load(run / "config.yaml", overrides)))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(run: Path, allowed: Sequence[str] = ()) -> str:
    """The message of a refused resume, which leaves every file as it was."""
    before = files_in(run)
    with pytest.raises(RunFolderError) as error:
        distill(resume=run, allow_changed=allowed)
    assert files_in(run) == before
    return str(error.value)


def lines_of(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def same_weights(result: RunResult, straight: Path) -> bool:
    a, b = (load_file(run / "model" / "model.safetensors") for run in (result.path, straight / "run"))
    return all(torch.equal(a[name], b[name]) for name in a)


def changes(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "inputs.json").read_text())["changes"]
    return found


# --- settings --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "training.steps": ("training.steps=5", "training.steps: 4 -> 5"),
    "training.steps equal": ("training.steps=2", "training.steps: 4 -> 2"),
    "training.seed": ("training.seed=1", "training.seed: 0 -> 1"),
    "training.prompts_per_step": ("training.prompts_per_step=3", "training.prompts_per_step: 6 -> 3"),
    "optimizer.lr": ("optimizer.lr=0.002", "optimizer.lr: 0.001 -> 0.002"),
    "schedule.warmup": ("schedule.warmup=0.5", "schedule.warmup: 0.1 -> 0.5"),
    "rollout.temperature": ("rollout.temperature=0.5", "rollout.temperature: 1.0 -> 0.5"),
    "horizon.tokens": ("horizon.tokens=7", "horizon.tokens: 6 -> 7"),
    "divergence": ("divergence.type=forward_kl", 'divergence.type: "reverse_kl" -> "forward_kl"'),
    "divergence.beta": ("divergence={type: jsd, beta: 0.3}", 'divergence.beta: "absent" -> 0.3'),
    "tuning.alpha": ("tuning.alpha=16", "tuning.alpha: 8.0 -> 16.0"),
    "student.dtype": ("student.dtype=bfloat16", 'student.dtype: "auto" -> "bfloat16"'),
    "prompts.max_tokens": ("prompts.max_tokens=8", "prompts.max_tokens: 1024 -> 8"),
    "prompts.limit": ("prompts.limit=10", "prompts.limit: null -> 10"),
    "prompts.system": ("prompts.system=w9", 'prompts.system: null -> "w9"'),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_changed_setting_is_refused_with_both_values_and_allowed_by_name(world: Path, case: str) -> None:
    override, said = SETTINGS[case]
    run = world / "run"
    edit(run, override)
    message = refused(run)
    assert said in message
    names = message.split("--allow-changed ")[1].split(",  or")[0].split(", or")[0].split(",")
    result = distill(resume=run, allow_changed=names)
    assert result.progress.step == loader.load(run / "config.yaml").training.steps
    (change,) = changes(run)
    assert change["after_step"] == 2
    assert said.split(":")[0] in change["changed"]
    assert {line["step"] for line in lines_of(run, "step")} == set(range(1, result.progress.step + 1))


@pytest.mark.parametrize("name", ["training", "training.steps"])
def test_sections_and_keys_are_names(world: Path, name: str) -> None:
    edit(world / "run", "training.steps=5", "optimizer.lr=0.002")
    message = refused(world / "run", [name])
    assert "optimizer.lr" in message
    assert "training.steps" not in message
    assert distill(resume=world / "run", allow_changed=[name, "optimizer"]).progress.step == 5


@pytest.mark.parametrize("name", ["training.step", "steps", "", "promts", "training.steps.more"])
def test_a_name_without_meaning_is_refused(world: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--allow-changed: found"):
        distill(resume=world / "run", allow_changed=[name])


FREE = [
    "tracking={rollouts_every: 1, rollouts_saved: 2}", "output.format=both", "checkpoint={every: 3, keep_last: 1}",
    "evaluation=null", "evaluation.every=1", "rollout.batch_size=2", "training.logit_chunk=64",
    "diagnosis.batch_size=2", "training.device=auto",
]  # fmt: skip


@pytest.mark.parametrize("override", FREE)
def test_free_settings_change_without_a_word_and_the_run_stays_equal(
    world: Path, straight: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(world / "run", override)
    assert same_weights(distill(resume=world / "run"), straight)
    kept = [key for change in changes(world / "run") for key in change["changed"]]
    assert override.startswith("training.device") or all(f"changed since the start: {key}" for key in kept)
    assert bool(kept) == (override != "training.device=auto")  # auto is the CPU here, which it was


@pytest.mark.parametrize(
    "override", ["training.micro_batch=2", "training.memory_budget_gib=1", "tuning.gradient_checkpointing=true"]
)
def test_what_fits_into_memory_may_change(world: Path, override: str) -> None:
    edit(world / "run", override)
    assert distill(resume=world / "run").progress.step == 4


def test_an_unchanged_run_goes_on_bit_for_bit(world: Path, straight: Path) -> None:
    record = json.loads((world / "run" / "inputs.json").read_text())
    assert same_weights(distill(resume=world / "run", allow_changed=["training.steps", "prompts"]), straight)
    assert json.loads((world / "run" / "inputs.json").read_text()) == record


def test_changes_add_up(world: Path) -> None:
    run = world / "run"
    edit(run, "training.steps=3")
    distill(resume=run, allow_changed=["training.steps"])
    shutil.rmtree(run / "model")
    edit(run, "training.steps=5", "optimizer.lr=0.01")
    assert "training.steps: 3 -> 5" in refused(run)
    distill(resume=run, allow_changed=["training", "optimizer"])
    assert [(c["after_step"], sorted(c["changed"])) for c in changes(run)] == [
        (2, ["training.steps"]), (3, ["optimizer.lr", "training.steps"]),
    ]  # fmt: skip


# --- what lies in files ----------------------------------------------------------------------------------------------


def rows(change: Callable[[list[str]], list[str]]) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        file = folder / "prompts.jsonl"
        file.write_text("".join(line + "\n" for line in change(file.read_text().splitlines())))

    return work


def json_file(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return work


def weights(name: str, tensor: str) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        found = {key: value.clone() for key, value in load_file(folder / name / "model.safetensors").items()}
        found[next(key for key in found if tensor in key)].reshape(-1)[-1] += 0.5
        save_file(found, folder / name / "model.safetensors", metadata={"format": "pt"})

    return work


def template(who: str) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        file = folder / who / "chat_template.jinja"
        file.write_text(file.read_text() + "{# edited #}")

    return work


def tokenizers(folder: Path) -> None:
    """Two words trade their ids in both."""
    for who in ("student", "teacher"):
        file = folder / who / "tokenizer.json"
        data = json.loads(file.read_text())
        vocabulary = data["model"]["vocab"]
        vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
        file.write_text(json.dumps(data))


FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a row edited": (rows(lambda x: [*x[:3], '{"prompt": "w5 w6 w7"}', *x[4:]]), "prompts", "prompts/problems: "),
    "a row appended": (rows(lambda x: [*x, '{"prompt": "w5"}']), "prompts", '"24 problems, '),
    "rows reordered": (rows(lambda x: x[::-1]), "prompts", "prompts/problems: "),
    "a row removed": (rows(lambda x: x[:-1]), "prompts", '"23 problems, '),
    "tokenizers": (tokenizers, "tokenizer", "tokenizer/student: "),
    "teacher's template": (template("teacher"), "template", "template/teacher: "),
    "student's template": (template("student"), "template", "template/student: "),
    "student's weights": (weights("student", "q_proj"), "student", "student/model.safetensors: "),
    "teacher's weights": (weights("teacher", "norm"), "teacher", "teacher/model.safetensors: "),
    "config.json": (json_file("teacher/config.json", lambda x: x.update(rope_theta=5e4)), "teacher",
                    "teacher/config.json: "),
    "generation": (json_file("student/generation_config.json", lambda x: x.update(top_k=7)), "student",
                   "student/generation_config.json: "),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_changed_file_is_refused_by_name_and_allowed_by_kind(world: Path, case: str) -> None:
    change, name, said = FILES[case]
    change(world)
    message = refused(world / "run")
    assert said in message
    assert f"--allow-changed {name}," in message
    assert message.count(" -> ") == 1 + (case == "tokenizers")  # token ids that follow are not a further thing
    assert distill(resume=world / "run", allow_changed=[name]).progress.step == 4
    assert said.split(":")[0].strip('"') in str(changes(world / "run"))
    if name == "prompts":
        assert "prompts/problems" in changes(world / "run")[0]["changed"]


def test_other_token_ids_of_the_same_texts_are_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a chat template that prints the date: neither text, template nor tokenizer has changed."""
    record = json.loads((world / "run" / "inputs.json").read_text())
    record["parts"]["prompts/token ids"] = "24 prompts, sha256 0"
    (world / "run" / "inputs.json").write_text(json.dumps(record))
    assert "prompts/token ids: " in refused(world / "run")
    assert distill(resume=world / "run", allow_changed=["prompts"]).progress.step == 4


def test_moved_content_is_no_change(world: Path, straight: Path) -> None:
    for name in ("student", "teacher", "prompts.jsonl"):
        (world / name).rename(world / f"moved_{name}")
    moved = {"student.path": "student", "teacher.path": "teacher", "prompts.source": "prompts.jsonl"}
    edit(world / "run", *(f"{key}={world}/moved_{name}" for key, name in moved.items()))
    assert same_weights(distill(resume=world / "run"), straight)


def test_another_model_under_another_path_is_named_with_both(world: Path) -> None:
    shutil.copytree(world / "teacher", world / "other")
    weights("other", "norm")(world)
    edit(world / "run", f"teacher.path={world / 'other'}")
    message = refused(world / "run")
    assert "teacher.path: " in message
    assert "teacher/model.safetensors: " in message
    assert distill(resume=world / "run", allow_changed=["teacher"]).progress.step == 4


def test_every_tensor_of_a_large_file_is_sampled(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if files of more than 1 kB were large: a change that reaches a block is seen, whatever the tensor."""
    monkeypatch.setattr(inputs_module, "WHOLE", 1000)
    monkeypatch.setattr(inputs_module, "BLOCK", 64)
    file, model = world / "teacher" / "model.safetensors", ModelConfig(path=str(world / "teacher"))
    tensors = load_file(file)
    before = model_parts("teacher", model)
    assert model_parts("teacher", model) == before
    for name in tensors:
        changed = {key: value.clone() for key, value in tensors.items()}
        changed[name] += 0.25
        save_file(changed, file, metadata={"format": "pt"})
        assert model_parts("teacher", model) != before, name
    save_file(tensors, file, metadata={"format": "pt"})
    assert model_parts("teacher", model)["teacher/model.safetensors"] == before["teacher/model.safetensors"]


# --- the record itself -----------------------------------------------------------------------------------------------


def test_a_run_of_an_older_version_goes_on_with_one_warning(world: Path, straight: Path) -> None:
    run = world / "run"
    (run / "inputs.json").unlink()
    with pytest.warns(UserWarning, match=r"no inputs\.json.*cannot be checked") as told:
        assert same_weights(distill(resume=run), straight)
    assert len([w for w in told if "inputs.json" in str(w.message)]) == 1
    assert changes(run) == [{"after_step": 2, "changed": "not recorded before"}]
    shutil.rmtree(run / "model")
    edit(run, "optimizer.lr=0.5")
    assert "optimizer.lr" in refused(run)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"config": 3}', '{"config": {}, "parts": {"a": 1}}', "\x00"])
def test_a_damaged_record_is_one_error(world: Path, text: str) -> None:
    (world / "run" / "inputs.json").write_text(text)
    assert "is damaged" in refused(world / "run")


def test_settings_of_a_later_version_start_at_their_defaults(world: Path, straight: Path) -> None:
    record = json.loads((world / "run" / "inputs.json").read_text())
    del record["config"]["training"]["denominator"], record["config"]["probes"], record["config"]["schedule"]["type"]
    (world / "run" / "inputs.json").write_text(json.dumps(record))
    assert same_weights(distill(resume=world / "run"), straight)


def test_a_start_without_checkpoints_is_checked_too(world: Path) -> None:
    shutil.rmtree(world / "run" / "checkpoints")
    edit(world / "run", "optimizer.lr=0.5")
    assert "optimizer.lr" in refused(world / "run")


# --- the end of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [True, False])
def test_fewer_steps_than_the_checkpoint_has_end_at_once(world: Path, recorded: bool) -> None:
    run = world / "run"
    edit(run, "training.steps=1")
    if recorded:
        assert "training.steps: 4 -> 1" in refused(run)
    else:
        (run / "inputs.json").unlink()
    before = files_in(run)
    with pytest.raises(CheckpointError, match=r"of step 2, but config.yaml asks for training\.steps=1; set 2 or more"):
        distill(resume=run, allow_changed=["training.steps"])
    assert files_in(run) == before


def test_a_complete_run_says_so(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = straight / "run"
    before = files_in(run)
    result = distill(resume=run)
    assert "is complete: its model is in" in "".join(capsys.readouterr().out.split("\n"))
    assert files_in(run) == before
    last = lines_of(run, "step")[-1]
    assert (result.progress.step, result.progress.generated_tokens) == (4, last["generated_tokens"])
    assert result.before is not None
    assert result.after is not None
    assert (result.before.step, result.after.step) == (0, 4)


def test_more_steps_for_a_complete_run(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(straight / "run", tmp_path / "run"))
    edit(run, "training.steps=5")
    assert distill(resume=run).progress.step == 4
    assert "put training.steps back to 4" in "".join(capsys.readouterr().out.split("\n"))
    (run / "model").rename(tmp_path / "model")
    assert distill(resume=run, allow_changed=["training.steps"]).progress.step == 5


@pytest.mark.parametrize("broken", ["metrics.jsonl", "eval/step_000004.json", "checkpoints", "inputs.json"])
def test_a_complete_run_says_so_whatever_else_is_lost(straight: Path, tmp_path: Path, broken: str) -> None:
    shutil.copytree(straight / "run", tmp_path / "run")
    path = tmp_path / "run" / broken
    shutil.rmtree(path) if path.is_dir() else path.write_text('{"event": "step", "st')
    assert distill(resume=tmp_path / "run").progress.step == 4


def test_dropped_lines_of_metrics_are_counted(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (world / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    distill(resume=world / "run")
    # two steps, two evaluations and the torn line
    assert "metrics.jsonl: 5 lines dropped that come after step 2" in capsys.readouterr().out
    assert [line["step"] for line in lines_of(world / "run", "step")] == [1, 2, 3, 4]


# --- stored evaluations ----------------------------------------------------------------------------------------------


def mark(run: Path, step: int) -> Path:
    """Write a number into a stored evaluation that no evaluation would find."""
    file = run / "eval" / f"step_{step:06d}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": 12345.0}))
    return file


def told(run: Path) -> dict[int, float]:
    return {line["step"]: line["seconds"] for line in lines_of(run, "evaluation")}


def test_an_evaluation_of_the_same_weights_and_settings_is_not_repeated(world: Path) -> None:
    mark(world / "run", 3)
    edit(world / "run", "evaluation.batch_size=1")
    distill(resume=world / "run")
    assert told(world / "run")[3] == 12345.0


def gold(folder: Path) -> None:
    file = folder / "task.jsonl"
    file.write_text(file.read_text().replace('"answer": "w2"', '"answer": "w7"'))


REDONE: dict[str, Callable[[Path], object]] = {
    "limit": lambda world: edit(world / "run", "evaluation.limit=1"),
    "seed": lambda world: edit(world / "run", "evaluation.seed=3"),
    "temperature": lambda world: edit(world / "run", "evaluation.temperature=0.1"),
    "length": lambda world: edit(world / "run", "evaluation.max_tokens=9"),
    "grader": lambda world: edit(world / "run", "evaluation.task.grader=number"),
    "answers": gold,
    "weights": lambda world: edit(world / "run", "optimizer.lr=0.1"),
    "template": template("student"),
    "no weights said": json_file("run/eval/step_000003.json", lambda x: x["settings"].pop("weights_sha256")),
    "another's": lambda world: shutil.copy(world / "run/eval/step_000004.json", world / "run/eval/step_000003.json"),
    "no rows": lambda world: (world / "run/eval/step_000003.jsonl").unlink(),
    "rows cut": lambda world: (world / "run/eval/step_000003.jsonl").write_text("{}\n"),
    "cut": lambda world: (world / "run/eval/step_000003.json").write_text('{"task": "ta'),
    "empty": lambda world: (world / "run/eval/step_000003.json").write_text(""),
    "a list": lambda world: (world / "run/eval/step_000003.json").write_text("[]"),
    "a key is missing": json_file("run/eval/step_000003.json", lambda x: x.pop("accuracy")),
    "text for a number": json_file("run/eval/step_000003.json", lambda x: x.update(accuracy="high")),
    "a number for an interval": json_file("run/eval/step_000003.json", lambda x: x.update(interval=3)),
    "null settings": json_file("run/eval/step_000003.json", lambda x: x.update(settings=None)),
    "binary": lambda world: (world / "run/eval/step_000003.json").write_bytes(b"\xff\x00"),
}  # fmt: skip


@pytest.mark.parametrize("case", REDONE)
def test_any_other_evaluation_is_redone(world: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    mark(world / "run", 3)
    REDONE[case](world)
    result = distill(resume=world / "run", allow_changed=["optimizer.lr", "template"])
    assert "step_000003.json was damaged or of other weights or settings" in "".join(
        capsys.readouterr().out.split("\n")
    )
    assert told(world / "run")[3] < 1000
    assert result.after is not None


@pytest.mark.parametrize("text", ["", "{}", "[1]"])
def test_a_damaged_first_evaluation_is_left_out_of_the_result(world: Path, text: str) -> None:
    (world / "run/eval/step_000000.json").write_text(text)
    result = distill(resume=world / "run")
    assert result.before is None
    assert result.after is not None


def test_the_first_evaluation_is_left_out_beside_others_of_another_length(world: Path) -> None:
    edit(world / "run", "evaluation.max_tokens=9")
    assert distill(resume=world / "run").before is None


# --- configurations edited by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("find", "put", "said"),
    [
        ("  steps: 4", "  steps: 4\n  more: 5", "unknown key"),
        ("  steps: 4", "  steps: four", "found"),
        ("training:", "training: [", "config.yaml, line"),
        ("  steps: 4\n", "", "training.steps: 4 -> 200"),
    ],
)
def test_a_broken_configuration_is_one_message(world: Path, find: str, put: str, said: str) -> None:
    file = world / "run" / "config.yaml"
    assert find in file.read_text()
    file.write_text(file.read_text().replace(find, put, 1))
    before = files_in(world / "run")
    with pytest.raises((ConfigError, RunFolderError)) as error:
        distill(resume=world / "run")
    assert said in str(error.value)
    assert files_in(world / "run") == before


def test_keys_left_out_at_their_defaults_are_no_change(world: Path, straight: Path) -> None:
    file = world / "run" / "config.yaml"
    file.write_text(file.read_text().replace("  denominator: trajectory\n", ""))
    assert same_weights(distill(resume=world / "run"), straight)


def test_nothing_is_said_where_nothing_changed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distill(resume=world / "run")
    assert "changed since" not in capsys.readouterr().out
