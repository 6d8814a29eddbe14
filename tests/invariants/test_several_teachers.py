"""Training with several teachers: what must be the run with one, and what memory, batches and kills must not change."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quick
from headstart.assemble import several
from headstart.assemble.several import Panel
from headstart.checks.plan import Outlines, World
from headstart.checks.run import run_preflight
from headstart.config.loader import for_teacher
from headstart.config.render import resolved
from headstart.config.schema import Config
from headstart.distillation.run import build, distill, load
from headstart.errors import ConfigError, DataError, VocabularyError
from headstart.models.memory import GIB, MicroMemory
from headstart.ranks.runtime import Runtime
from headstart.records import Rollout
from headstart.testing import random_model, word_tokenizer, write_checkpoint
from headstart.train.folder import RunFolder
from headstart.train.metrics import Clock
from headstart.train.parts import Parts
from headstart.train.step import backward, sample_rollouts, train_step
from ranks import on_ranks
from support import make_config, make_parts

CROSS = [{"name": "word", "path": "tiny:teacher"}, {"name": "bytes", "path": "tiny:teacher-cross"}]


def panel(folder: Path, teachers: list[dict[str, Any]], *overrides: str, column: bool = False) -> Config:
    """The small run with these teachers in place of its own; with `column`, rows name them in turn."""
    make_config(folder)
    if not (folder / "third").exists():
        write_checkpoint(folder / "third", random_model("llama", 46, hidden=32, seed=3), word_tokenizer())
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    named = [row | {"by": teachers[i % len(teachers)]["name"]} for i, row in enumerate(rows)]
    (folder / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    routes = [f"prompts.source={folder / 'named.jsonl'}", "prompts.teacher_column=by"] if column else []
    return make_config(folder, "teacher=null", f"teachers={json.dumps(teachers)}", *routes, *overrides)


def of(folder: Path, *names: str, **settings: Any) -> list[dict[str, Any]]:
    return [{"name": f"{name}{i}", "path": str(folder / name), **settings} for i, name in enumerate(names)]


def gradient(parts: Parts, rollouts: list[Rollout]) -> torch.Tensor:
    parts.optimizer.zero_grad(set_to_none=True)
    backward(parts, rollouts, 0, Clock(parts.runtime))
    return torch.cat([p.grad.flatten().clone() for p in parts.student.trainable().values() if p.grad is not None])


def trained(folder: Path, config: Config) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What three steps measure, but for the clock and what each teacher counts, and the weights after them."""
    parts = make_parts(folder, config)
    found = []
    for step in range(3):
        metrics = train_step(parts, step, 0)[0].metrics
        skipped = ("second", "memory", "nats_", "tokens_teacher", "tokens_third")
        found.append({k: v for k, v in metrics.items() if not any(word in k for word in skipped)})
    return found, {name: p.detach().clone() for name, p in parts.student.trainable().items()}


@pytest.mark.parametrize("kind", ["losses", "distributions", "routed"])
def test_one_teacher_among_several_is_that_teacher_bit_for_bit(tmp_path: Path, kind: str) -> None:
    alone = trained(tmp_path / "alone", make_config(tmp_path))
    mixture = [] if kind == "routed" else [f"divergence.mixture={kind}"]
    config = panel(tmp_path, of(tmp_path, "teacher"), *mixture, column=kind == "routed")
    among = trained(tmp_path / "among", config)
    assert among[0] == alone[0]
    assert all(torch.equal(among[1][name], weight) for name, weight in alone[1].items())


@pytest.mark.parametrize("kind", ["losses", "distributions", "routed"])
def test_two_identical_teachers_are_one(tmp_path: Path, kind: str) -> None:
    parts = make_parts(tmp_path / "alone", make_config(tmp_path))
    rollouts = sample_rollouts(parts, 0, 6)
    mixture = [] if kind == "routed" else [f"divergence.mixture={kind}", "teachers.1.weight=3"][:1]
    config = panel(tmp_path, of(tmp_path, "teacher", "teacher"), *mixture, column=kind == "routed")
    two = make_parts(tmp_path / "two", config)
    again = sample_rollouts(two, 0, 6)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in rollouts]
    alone = gradient(parts, rollouts)
    torch.testing.assert_close(gradient(two, again), alone, rtol=1e-4, atol=2e-6 * float(alone.abs().max()))


@pytest.mark.parametrize("column", [True, False])
def test_the_gradient_is_made_of_those_of_the_teachers(tmp_path: Path, column: bool) -> None:
    """Routed: of each one's own rows, as many parts of the whole. Mixed: the weighted sum of the losses."""
    weights = [1.0, 1.0] if column else [0.25, 0.75]
    teachers = of(tmp_path, "teacher", "third")
    if not column:
        teachers = [teacher | {"weight": 2 * w} for teacher, w in zip(teachers, weights, strict=True)]
    config = panel(tmp_path, teachers, column=column)
    parts = make_parts(tmp_path / "run", config)
    rollouts = sample_rollouts(parts, 0, 6)
    whole = gradient(parts, rollouts)
    total = torch.zeros_like(whole)
    for teacher, weight in zip(teachers, weights, strict=True):
        name = teacher["name"]
        single = make_parts(tmp_path / name, make_config(tmp_path, f"teacher.path={teacher['path']}"))
        mine = [r for r in rollouts if name in dict(r.prompt.views)]
        assert 0 < len(mine) <= len(rollouts)
        total += weight * len(mine) / len(rollouts) * gradient(single, mine)
    torch.testing.assert_close(whole, total, rtol=1e-4, atol=2e-6 * float(whole.abs().max()))


@pytest.mark.parametrize("kind", ["routed", "losses", "distributions", "cross"])
def test_micro_batches_never_change_the_gradient(tmp_path: Path, kind: str) -> None:
    if kind == "cross":
        config = panel(tmp_path, CROSS, "student.path=tiny:student", "prompts.source=tiny", "horizon.tokens=20")
    else:
        mixture = [] if kind == "routed" else [f"divergence.mixture={kind}"]
        config = panel(tmp_path, of(tmp_path, "teacher", "third"), *mixture, column=kind == "routed")
    parts = make_parts(tmp_path / "run", config)
    rollouts = sample_rollouts(parts, 0, 20)
    whole = gradient(parts, rollouts)
    assert whole.abs().max() > 1e-4
    for size in (1, 4):
        training = parts.config.training.model_copy(update={"micro_batch": size})
        split = gradient(replace(parts, config=parts.config.model_copy(update={"training": training})), rollouts)
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=2e-6 * float(whole.abs().max()))


@pytest.mark.parametrize("kind", ["routed", "losses", "distributions"])
def test_teachers_one_after_the_other_are_the_same_run_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    mixture = [] if kind == "routed" else [f"divergence.mixture={kind}"]
    config = panel(tmp_path, of(tmp_path, "teacher", "third"), "training.memory_budget_gib=1", *mixture,
                   column=kind == "routed")  # fmt: skip
    stay = trained(tmp_path / "stay", config)
    monkeypatch.setattr(several, "free_bytes", lambda device: 200_000)
    parts = make_parts(tmp_path / "look", config)
    assert parts.teacher.visits
    memory = (tmp_path / "look" / "diagnose" / "preflight.json").read_text()
    assert "each is loaded for its part of a step and dropped again" in memory
    held = {id(p) for m in parts.teacher.models for p in m.projection.parameters()}
    for model in parts.teacher.models:  # between steps only the head is there
        body = [p for p in model.model.parameters() if id(p) not in held]
        assert body
        assert all(p.untyped_storage().nbytes() == p.element_size() and bool(p.isnan().all()) for p in body)
    visit = trained(tmp_path / "visit", config)
    assert visit[0] == stay[0]
    assert all(torch.equal(visit[1][name], weight) for name, weight in stay[1].items())
    metrics = train_step(parts, 0, 0)[0].metrics
    assert metrics["seconds_teacher_loading"] > 0


def steps_on(runtime: Runtime, folder: Path, config: Config) -> tuple[list[float], torch.Tensor, float]:
    """Losses of two steps on a rank, its weights after them, and the tokens that the first teacher scored."""
    parts = build(config, runtime, lambda: RunFolder.create(folder, config))
    metrics = [train_step(parts, step, 0)[0].metrics for step in range(2)]
    weights = torch.cat([p.detach().flatten() for p in parts.student.trainable().values()])
    return [m["loss"] for m in metrics], weights, metrics[-1]["tokens_teacher0"]


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Ranks have rows of other teachers, and other numbers of them."""
    config = panel(tmp_path, of(tmp_path, "teacher", "third"), column=True)
    ((losses, weights, tokens),) = on_ranks(1, steps_on, tmp_path / "one", config)
    for other, own, count in on_ranks(2, steps_on, tmp_path / "two", config):
        assert other == pytest.approx(losses, rel=1e-5)
        assert count == tokens > 0
        torch.testing.assert_close(own, weights, rtol=0, atol=2e-5)


def test_memory_counts_all_teachers_or_all_heads_and_the_largest_rest(tmp_path: Path) -> None:
    config = panel(tmp_path, of(tmp_path, "teacher", "third"), column=True)
    found = load(config, Runtime.start("cpu")).pair
    models = [model.model for model in found.models[1:]]
    sizes = [sum(p.numel() * 4 for p in m.parameters()) + sum(b.numel() * 4 for b in m.buffers()) for m in models]
    heads = [m.get_output_embeddings().weight.numel() * 4 for m in models]
    stay, turns = (MicroMemory.of(found.student, found.models[1:], config, visits=visits) for visits in (False, True))
    own = stay.student_weights.resident
    assert stay.weights - own == sum(sizes)
    assert turns.weights - own == sum(heads)
    assert turns.teacher_weights is not None
    assert turns.teacher_weights.gathered == max(s - h for s, h in zip(sizes, heads, strict=True))
    rollout = Rollout(found.prompts(["w1"])[0], 0, (5, 6, 7), False)
    assert turns.scoring([rollout], 0) - stay.scoring([rollout], 0) == turns.teacher_weights.gathered
    planned = Outlines(config, "cpu")
    assert planned.plan(World(gib=1.0), 10).memory.items.teacher_weights * GIB == sum(sizes)  # type: ignore[union-attr]
    short = (stay.student_weights.resident + stay.least(10, 6) - 1) / 0.9 / GIB
    assert planned.plan(World(gib=short - 1e-5), 10).memory.items.teacher_weights * GIB == sum(heads)  # type: ignore[union-attr]


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = panel(tmp_path, of(tmp_path, "teacher", "third"), "training.steps=40", "checkpoint.every=3", column=True)
    straight, run, file = tmp_path / "straight", tmp_path / "run", tmp_path / "run.yaml"
    distill(config, out=straight)
    file.write_text(resolved(config))
    process = subprocess.Popen(quick.command("distill", file, "--out", run), stderr=subprocess.PIPE)
    while process.poll() is None and not (run / "checkpoints" / "step_000006").exists():
        pass
    quick.kill(process)
    process.communicate()
    assert not (run / "model").exists()
    subprocess.run(quick.command("distill", "--resume", run), check=True, capture_output=True)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, straight))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    parts = json.loads((run / "inputs.json").read_text())["parts"]
    assert {"teacher/teacher0/model.safetensors", "tokenizer/teacher/third1"} <= parts.keys()


def test_every_teacher_has_its_own_view_and_horizon(tmp_path: Path) -> None:
    teachers = of(tmp_path, "teacher", "third")
    teachers[0] |= {"view": {"system": "w7 w8"}, "horizon": 2}
    config = panel(tmp_path, teachers, column=True)
    parts = make_parts(tmp_path / "run", config)
    longer = {name: len(ids) - len(p.token_ids) for p in parts.prompts for name, ids in p.views}
    assert longer["teacher0"] > 0 == longer["third1"]
    lengths: dict[str, list[int]] = {"teacher0": [], "third1": []}
    for rollout in sample_rollouts(parts, 0, 6):
        lengths[rollout.prompt.views[0][0]].append(len(rollout.completion_ids))
    assert max(lengths["teacher0"]) == 2
    assert max(lengths["third1"]) == 6
    one = for_teacher(config, "teacher0")
    assert one.horizon.longest == 2
    alone = load(one, Runtime.start("cpu"))
    mine = {p.problem_id: dict(p.views)["teacher0"] for p in parts.prompts if "teacher0" in dict(p.views)}
    assert {p.problem_id.split("/")[-1]: p.teacher_token_ids for p in alone.prompts.prompts} == {
        name.split("/")[-1]: ids for name, ids in mine.items()
    }


def test_a_teacher_s_context_is_that_of_its_own_rows(tmp_path: Path) -> None:
    """The first teacher's context has no room for the run's horizon, and for its own."""
    teachers = of(tmp_path, "teacher", "third")
    panel(tmp_path, teachers)
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 20}))
    long = "horizon.tokens=30"
    with pytest.raises(ConfigError, match="the teacher's context is 20 tokens"):
        load(panel(tmp_path, teachers, long, column=True), Runtime.start("cpu"))
    teachers[0] |= {"horizon": 4}
    load(panel(tmp_path, teachers, long, column=True), Runtime.start("cpu"))


def test_every_teacher_has_its_own_stop_class(tmp_path: Path) -> None:
    """One declares the student's stop token, one another: rows of the first stay plain, those of the second are
    compared over one event, and the student ends a row where any of them would."""
    teachers = of(tmp_path, "teacher", "third")
    panel(tmp_path, teachers)
    path = tmp_path / "third" / "generation_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | {"eos_token_id": 9}))
    found = load(panel(tmp_path, teachers, column=True), Runtime.start("cpu")).pair
    assert isinstance(found, Panel)
    plain, merged = (found.pairs[name].vocabulary for name in ("teacher0", "third1"))
    assert plain.merge_ids == ()
    assert 9 in merged.merge_ids
    assert found.vocabulary.stop_ids == merged.stop_ids
    mixed = load(panel(tmp_path, teachers, "divergence.mixture=distributions"), Runtime.start("cpu")).pair
    assert mixed.vocabulary.merge_ids == merged.merge_ids
    assert mixed.student.events is not None


def test_routing_and_losses_take_teachers_with_other_tokenizers(tmp_path: Path) -> None:
    tiny = ["student.path=tiny:student", "prompts.source=tiny", "horizon.tokens=20"]
    parts = make_parts(tmp_path / "losses", panel(tmp_path, CROSS, *tiny))
    rollouts = parts.teacher.align(sample_rollouts(parts, 0, 20))
    assert all(r.aligned is None for r in rollouts)  # one of the two scores every token
    shares = parts.teacher.score(rollouts).shares  # type: ignore[attr-defined]
    tokens = sum(len(r.completion_ids) for r in rollouts)
    assert len(shares[0].rows_m) == tokens > len(shares[1].rows_m) > 0
    total = torch.zeros(tokens)
    for share in shares:
        total.index_add_(0, share.rows_m, share.weight_m)
    torch.testing.assert_close(total, torch.ones(tokens))
    other = [CROSS[1] | {"name": "a"}, CROSS[1] | {"name": "b"}]
    parts = make_parts(tmp_path / "others", panel(tmp_path, other, *tiny))
    rollouts = parts.teacher.align(sample_rollouts(parts, 0, 20))
    assert all(r.aligned is not None and 0 < len(r.rows) < len(r.completion_ids) for r in rollouts)
    alone = make_parts(tmp_path / "alone", make_config(tmp_path, *tiny, "teacher.path=tiny:teacher-cross"))
    own = sample_rollouts(alone, 0, 20)
    one = gradient(alone, own)
    torch.testing.assert_close(gradient(parts, rollouts), one, rtol=1e-4, atol=2e-6 * float(one.abs().max()))
    with pytest.raises(VocabularyError, match="bytes has another tokenizer; use divergence"):
        make_parts(tmp_path / "refused", panel(tmp_path, CROSS, *tiny, "divergence.mixture=distributions"))


def test_rows_that_name_no_teacher_or_another_are_refused_and_unused_teachers_named(tmp_path: Path) -> None:
    teachers = of(tmp_path, "teacher", "third")
    config = panel(tmp_path, teachers, column=True)
    file = tmp_path / "named.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def written(by: list[str | None]) -> None:
        file.write_text("".join(json.dumps(row | {"by": name}) + "\n" for row, name in zip(rows, by, strict=True)))

    written(["teacher0", "thrid", *["third1"] * (len(rows) - 2)])
    with pytest.raises(DataError, match=r"1 of 24 prompts name the teacher 'thrid' \(the first is named/1\)"):
        load(config, Runtime.start("cpu"))
    found = run_preflight(config, quick=True)
    assert [f.severity for f in found.findings if "thrid" in f.message] == ["blocking"]
    written(["teacher0", None, *["third1"] * (len(rows) - 2)])
    with pytest.raises(DataError, match="1 of 24 prompts name no teacher"):
        load(config, Runtime.start("cpu"))
    written(["teacher0"] * len(rows))
    with pytest.warns(UserWarning, match="no prompt names the teacher third1"):
        load(config, Runtime.start("cpu"))
    with pytest.raises(DataError, match="teach"):
        load(panel(tmp_path, teachers, "prompts.teacher_column=teach", column=True), Runtime.start("cpu"))


def test_preflight_looks_at_every_teacher(tmp_path: Path) -> None:
    tiny = ["student.path=tiny:student", "prompts.source=tiny", "prompts.limit=12", "horizon.tokens=20"]
    found = run_preflight(panel(tmp_path, CROSS, *tiny))
    assert found.exit_code < 2
    checks = {finding.check for finding in found.findings}
    assert {"word: vocabulary", "bytes: vocabulary", "bytes: alignment", "word: self-test", "gradients"} <= checks
    assert len([f for f in found.findings if f.check == "memory"]) == 1
    assert not {"word: memory", "word: gradients"} & checks


MISTAKES = {
    "teacher={path: x}": "teacher: found beside teachers",
    "prompts.teacher=nobody": "prompts.teacher: found 'nobody'",
    "teachers.1.name=teacher0": "2 of them are called teacher0",
    "divergence.mixture=losses": "divergence.mixture: each row names",
    "sharding={type: fsdp}": "sharding.type: found fsdp",
    "probes.every=5": "probes go by one teacher",
    "horizon={type: diagnosed}": "horizon.type: diagnosed goes by one teacher",
    "student.chat_template=teacher": "student.chat_template: teacher is not one of several",
}


@pytest.mark.parametrize(("mistake", "said"), MISTAKES.items())
def test_mistakes_of_the_configuration(tmp_path: Path, mistake: str, said: str) -> None:
    teachers = of(tmp_path, "teacher", "third")
    if mistake.startswith("teachers.1"):
        teachers[1]["name"], mistake = "teacher0", "training.steps=4"
    with pytest.raises(ConfigError, match=said):
        panel(tmp_path, teachers, "prompts.teacher_column=by", mistake, column=True)


def test_mistakes_of_weights_and_names(tmp_path: Path) -> None:
    teachers = of(tmp_path, "teacher", "third")
    with pytest.raises(ConfigError, match="horizon is for the rows that name a teacher"):
        panel(tmp_path, [teachers[0] | {"horizon": 4}, teachers[1]])
    with pytest.raises(ConfigError, match="remove weight"):
        panel(tmp_path, [teachers[0] | {"weight": 2}, teachers[1]], column=True)
    with pytest.raises(ConfigError, match="no source names third1"):
        panel(tmp_path, teachers, "prompts.teacher=teacher0")
    with pytest.raises(ConfigError, match="there is only one; write teachers"):
        make_config(tmp_path, "prompts.teacher=x")
    with pytest.raises(ConfigError, match="teachers are called teacher0, third1"):
        for_teacher(panel(tmp_path, teachers), "fourth")
    with pytest.raises(ConfigError, match="found 1; allowed"):
        panel(tmp_path, [teachers[0] | {"name": 1}, teachers[1]])
    with pytest.raises(ConfigError, match=r"teachers.0.nam: unknown key"):
        panel(tmp_path, [teachers[0] | {"nam": "a"}, teachers[1]])


def test_what_goes_by_one_teacher_is_refused(tmp_path: Path) -> None:
    from headstart.diagnosis.run import diagnose

    with pytest.raises(ConfigError, match="headstart diagnose goes by one teacher, and this run has several"):
        diagnose(panel(tmp_path, of(tmp_path, "teacher", "third")), out=tmp_path / "diagnosis")
