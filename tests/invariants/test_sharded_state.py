"""The state of a sharded student: saved by all ranks, resumed by any number of them, exported like a whole one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from headstart.config import loader
from headstart.config.render import resolved
from headstart.distillation import ending
from headstart.distillation.run import build, distill
from headstart.errors import CheckpointError, ConfigError
from headstart.models.export import exportable
from headstart.ranks import shards
from headstart.ranks.runtime import ALONE, Runtime
from headstart.ranks.sharding import full_tensor, is_sharded, local_tensor
from headstart.ranks.shards import any_sharded
from headstart.testing import Architecture, random_model
from headstart.train import loop
from headstart.train.checkpoint import (
    Checkpoint,
    ShardedCheckpoint,
    damage,
    load_newest,
    rotate,
    save_checkpoint,
    weights_sha256,
)
from headstart.train.sharded import restore_sharded, save_sharded, weights_in
from ranks import on_ranks
from support import make_config

Named = dict[str, nn.Parameter]


def student(runtime: Runtime, architecture: Architecture = "llama") -> Any:
    """A small model, divided where there are several ranks: 47 words over two ranks make parts of two sizes."""
    model = random_model(architecture, 47)
    if runtime.world_size > 1:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert any_sharded(model.parameters())
    return model


class World:
    """A student in training, and all that a checkpoint keeps of it."""

    def __init__(self, runtime: Runtime, architecture: Architecture = "llama") -> None:
        self.runtime, self.model = runtime, student(runtime, architecture)
        self.weights: Named = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=1e-2, fused=True)
        self.step = 0

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            ids = (torch.arange(12).view(2, 6) * 5 + self.step) % 47
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(float(loss.detach()))
        return losses

    def save(self, folder: Path) -> None:
        state = {"at": self.step}
        if any_sharded(self.weights.values()):
            place = folder if self.runtime.is_main else None
            save_sharded(place, self.step, self.weights, self.optimizer, state, self.runtime)
        else:
            model = {name: p.detach() for name, p in self.weights.items()}
            save_checkpoint(folder, Checkpoint(self.step, model, self.optimizer.state_dict(), state))

    def restore(self, folder: Path) -> None:
        checkpoint = load_newest(folder, pytest.fail, self.runtime)
        assert checkpoint is not None
        assert checkpoint.state == {"at": checkpoint.step}
        stored = {name: (tensor.shape, tensor.dtype) for name, tensor in weights_in(checkpoint).items()}
        assert stored == {name: (p.shape, p.dtype) for name, p in self.weights.items()}
        restore_sharded(checkpoint, self.weights, self.optimizer)
        self.step = checkpoint.step

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments, whole."""
        found = {name: full_tensor(p.detach()).clone() for name, p in self.weights.items()}
        for name, p in self.weights.items():
            found |= {f"{name} {key}": full_tensor(value).clone() for key, value in self.optimizer.state[p].items()}
        return found


def straight(runtime: Runtime, folder: Path, architecture: Architecture) -> tuple[list[float], dict[str, Tensor], str]:
    """Two steps, a checkpoint, two more steps; what they gave, and the digest of the weights that were saved."""
    torch.manual_seed(0)
    world = World(runtime, architecture)
    world.train(2)
    world.save(folder)
    saved, digest = world.tensors(), weights_sha256(world.weights)
    losses = world.train(2)
    return losses, world.tensors() | {f"saved {name}": t for name, t in saved.items()}, digest


def resumed(runtime: Runtime, folder: Path, architecture: Architecture) -> tuple[list[float], dict[str, Tensor], str]:
    world = World(runtime, architecture)
    with torch.no_grad():
        for p in world.weights.values():
            local_tensor(p).fill_(7.0)
    world.restore(folder)
    saved, digest = world.tensors(), weights_sha256(world.weights)
    losses = world.train(2)
    return losses, world.tensors() | {f"saved {name}": t for name, t in saved.items()}, digest


@pytest.mark.parametrize(
    ("before", "after", "architecture"), [(2, 2, "llama"), (2, 1, "qwen2"), (1, 2, "llama"), (2, 3, "qwen2")]
)
def test_any_number_of_ranks_resumes(tmp_path: Path, architecture: Architecture, before: int, after: int) -> None:
    """Tied and untied heads. What was saved comes back bit for bit; then as many ranks give the same bits, another
    number the same losses."""
    losses, tensors, digest = on_ranks(before, straight, tmp_path, architecture)[0]
    for again_losses, again, again_digest in on_ranks(after, resumed, tmp_path, architecture):
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensors[name]) for name in tensors if name.startswith("saved "))
        assert again_digest == digest
        if before == after:
            assert again_losses == losses
            assert all(torch.equal(again[name], tensors[name]) for name in tensors)
        assert again_losses == pytest.approx(losses, abs=1e-6)


def arrange(runtime: Runtime, folder: Path | None, shape: tuple[int, ...], saved: bool) -> dict[str, Tensor]:
    """Weights of two types and of fewer rows than ranks, on a mesh of `shape`, saved in many files or restored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 5).to(torch.bfloat16))
    if runtime.world_size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]))
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    if saved:
        assert folder is not None
        restore_sharded(load_newest(folder, pytest.fail, runtime), weights, optimizer)  # type: ignore[arg-type]
    else:
        shards.FILE = 8
        for p in weights.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        save_sharded(folder if runtime.is_main else None, 1, weights, optimizer, {}, runtime)
    moments = {f"{name} {k}": v for name, p in weights.items() for k, v in optimizer.state[p].items()}
    return {name: full_tensor(t.detach()).clone() for name, t in (weights | moments).items()}


def test_copies_of_a_divided_model_and_weights_of_fewer_rows_than_ranks(tmp_path: Path) -> None:
    before = on_ranks(4, arrange, tmp_path, (2, 2), False)[0]
    assert len(list((tmp_path / "step_000001" / "shards").iterdir())) > 4
    for world_size, shape in ((1, ()), (3, (3,))):
        after = on_ranks(world_size, arrange, tmp_path, shape, True)[0]
        assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
        assert all(torch.equal(after[name], before[name]) for name in before)


# --- what goes wrong while it is written -----------------------------------------------------------------------------


def saved_twice(runtime: Runtime, folder: Path) -> World:
    """A student with checkpoints of its first two steps."""
    world = World(runtime)
    for _ in range(2):
        world.train(1)
        world.save(folder)
    return world


def save_with_a_limit(runtime: Runtime, folder: Path, limited: int) -> tuple[str, bool, int]:
    """The third save, with a file size limit (as a full disk would be) on one rank; its message there."""
    world = saved_twice(runtime, folder)
    world.train(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if runtime.rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    with pytest.raises(CheckpointError) as refused:
        world.save(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return str(refused.value), refused.value.everywhere, os.getpid()


@pytest.mark.parametrize("limited", [0, 1])
def test_a_full_disk_of_one_rank_is_one_message_and_keeps_the_last_checkpoint(tmp_path: Path, limited: int) -> None:
    (message, everywhere, _), other = on_ranks(2, save_with_a_limit, tmp_path, limited)
    assert other[:2] == (message, everywhere)
    assert everywhere
    assert f"cannot be written: rank {limited}: File too large. It needs about" in message
    assert "step_000002, is kept. Free space, then continue with --resume" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]
    assert all(damage(path) is None for path in tmp_path.iterdir())


def save_and_be_killed(runtime: Runtime, folder: Path, moment: int) -> None:
    """Rank 1 ends as by kill -9 before its `moment`-th flush, rename or new file of the third save."""
    world = saved_twice(runtime, folder)
    world.train(1)
    left = [moment]

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    if runtime.rank == 1:
        for name in ("fsync", "open"):
            setattr(os, name, before(getattr(os, name)))
    world.save(folder)


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_rank_killed_while_it_writes_leaves_the_last_checkpoint(tmp_path: Path, moment: int) -> None:
    with pytest.raises(AssertionError, match="another rank has ended"):
        on_ranks(2, save_and_be_killed, tmp_path, moment)
    whole = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".incomplete"))
    assert whole == ["step_000001", "step_000002"]
    loaded = load_newest(tmp_path, pytest.fail)
    assert isinstance(loaded, ShardedCheckpoint)
    assert loaded.step == 2


def read_damaged(runtime: Runtime, folder: Path) -> tuple[int, list[str]]:
    warnings: list[str] = []
    loaded = load_newest(folder, warnings.append, runtime)
    assert loaded is not None
    return loaded.step, warnings


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_damage_is_named_on_every_rank_and_the_previous_one_used(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    on_ranks(2, saved_twice_and_nothing, tmp_path)
    newest = tmp_path / "step_000002"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) == 4
    for name in files:
        content = (newest / name).read_bytes()
        harm(newest / name)
        step, (warning,) = read_damaged(ALONE, tmp_path)
        assert step == 1
        assert "step_000002" in warning
        assert name.name in warning
        if name.name.startswith("shard-00002"):
            assert on_ranks(2, read_damaged, tmp_path) == [(1, [warning])] * 2
        (newest / name).write_bytes(content)
    (newest / "shards" / "more").write_bytes(b"x")
    assert damage(newest) == "shards/more is more than there was by manifest.json"
    (newest / "shards").rename(tmp_path / "elsewhere")
    assert damage(newest) == "shards cannot be read (No such file or directory)"


def saved_twice_and_nothing(runtime: Runtime, folder: Path) -> None:
    saved_twice(runtime, folder)


def save_again(runtime: Runtime, folder: Path) -> None:
    """Saving twice writes once; a damaged one is replaced; later ones go; rotation keeps what it should."""
    world = saved_twice(runtime, folder)
    second = folder / "step_000002"
    inode = second.stat().st_ino
    world.save(folder)
    assert second.stat().st_ino == inode
    runtime.barrier()
    if runtime.is_main:
        flip(next((second / "shards").iterdir()))
        (folder / "step_000009").mkdir()
    runtime.barrier()
    world.save(folder)
    assert damage(second, runtime) is None
    runtime.barrier()
    if runtime.is_main:
        assert sorted(path.name for path in folder.iterdir()) == ["step_000001", "step_000002"]
        rotate(folder, keep_last=1, best_step=None)
        assert [path.name for path in folder.iterdir()] == ["step_000002"]


def test_saving_again_and_rotation(tmp_path: Path) -> None:
    on_ranks(2, save_again, tmp_path)
    manifest = json.loads((tmp_path / "step_000002" / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert list(manifest["files"]) == [
        "shards/shard-00001-model-00001-of-00001.safetensors",
        "shards/shard-00002-model-00001-of-00001.safetensors",
        "state.json",
    ]


# --- export ----------------------------------------------------------------------------------------------------------

LORA = "tuning={type: lora, r: 4, alpha: 8, dropout: 0.0, targets: [q_proj, down_proj]}"
FULL = "tuning.type=full"


def export_untrained(runtime: Runtime, run: str, out: Path, overrides: list[str]) -> None:
    """The student as it is loaded, with an adapter that changes something, exported without a step of training."""
    config = loader.load(run, overrides)
    parts = build(config, runtime, lambda: None)
    if runtime.world_size > 1:
        assert is_sharded(parts.student.model)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in parts.student.trainable().items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model = exportable(parts.student.model, config.output.format)
    if runtime.is_main:
        parts.export(model, out, 7, None)
    assert is_sharded(parts.student.model) == (runtime.world_size > 1)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", [FULL]),
        ("qwen2", [FULL, "student.dtype=bfloat16"]),
        ("gemma3", [LORA, "student.dtype=bfloat16", "output.format=both"]),
        ("llama", ["tuning={type: lora, r: 2, targets: [q_proj, lm_head]}", "output.format=merged"]),
        ("llama", [LORA, "output.format=adapter"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_the_same_weights_are_the_same_files(tmp_path: Path, architecture: Architecture, settings: list[str]) -> None:
    """Exported from two ranks and from one: every file is the same, byte for byte."""
    run = written(tmp_path, architecture, settings)
    on_ranks(2, export_untrained, run, tmp_path / "two", ["sharding.type=fsdp"])
    on_ranks(1, export_untrained, run, tmp_path / "one", [])
    one, two = ({p.relative_to(tmp_path / w): p for p in (tmp_path / w).rglob("*")} for w in ("one", "two"))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name].is_file() and content(one[name]) != content(two[name])] == []
    assert any(name.name.endswith(".safetensors") for name in one)


def content(path: Path) -> object:
    """A file's bytes; of an adapter's settings what they say, as peft writes its targets in no order."""
    if path.name != "adapter_config.json":
        return path.read_bytes()
    settings = json.loads(path.read_text())
    return settings | {"target_modules": sorted(settings["target_modules"])}


def written(folder: Path, architecture: Architecture, settings: list[str]) -> str:
    (folder / "run.yaml").write_text(resolved(make_config(folder, *settings, architecture=architecture)))
    return str(folder / "run.yaml")


# --- whole runs ------------------------------------------------------------------------------------------------------


def run(runtime: Runtime, config: str, out: Path, kill_at: int | None = None) -> None:
    """Start, or go on with, the run in `out`; rank 1 is killed when it begins its step `kill_at`."""
    step = loop.train_step

    def killed(parts: Any, number: int, *rest: Any) -> Any:
        if (runtime.rank, number) == (1, kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(parts, number, *rest)

    if kill_at is not None:
        loop.train_step = killed
    if (out / "config.yaml").exists():
        distill(resume=out)
    else:
        distill(loader.load(config, []), out=out)


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A configuration, and its run of two ranks from start to end, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    task = folder / "task.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"w{i} w3", "answer": f"w{i}"}) + "\n" for i in range(4)))
    evaluation = f"evaluation={{task: {{type: jsonl, path: {task}}}, every: 3, samples: 1, max_tokens: 4}}"
    settings = ["sharding.type=fsdp", "training.steps=6", "checkpoint={every: 1, keep_last: 10}", evaluation]
    config = written(folder, "llama", settings)
    on_ranks(2, run, config, folder / "run")
    return config, folder / "run"


def test_kill_9_of_a_rank_and_resume_is_the_straight_run(sharded_run: tuple[str, Path], tmp_path: Path) -> None:
    config, straight = sharded_run
    begun = time.monotonic()
    with pytest.raises(AssertionError, match="LostRankError: another rank has ended") as ended:
        on_ranks(2, run, config, tmp_path / "run", 4)
    assert "ended without a word" in str(ended.value)
    assert time.monotonic() - begun < 60
    assert (tmp_path / "run" / "checkpoints" / "step_000004").is_dir()
    on_ranks(2, run, config, tmp_path / "run")
    assert timeless(tmp_path / "run") == timeless(straight)
    one, two = (load_file(path / "model" / "model.safetensors") for path in (straight, tmp_path / "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one.keys() == two.keys()


def test_a_run_goes_on_with_another_number_of_ranks(sharded_run: tuple[str, Path], tmp_path: Path) -> None:
    """From two ranks to one after step 2, and back to two after step 4: the same tokens, losses within 1e-6."""
    _, straight = sharded_run
    moved = tmp_path / "run"
    shutil.copytree(straight, moved)
    for world_size, step in ((1, 2), (2, 4)):
        shutil.rmtree(moved / "model")
        for later in range(step + 1, 7):
            shutil.rmtree(moved / "checkpoints" / f"step_{later:06d}")
        on_ranks(world_size, run, "", moved)
        assert (moved / "checkpoints" / f"step_{step + 1:06d}" / "shards").is_dir() == (world_size == 2)
        for a, b in zip(timeless(moved), timeless(straight), strict=True):
            same = ("event", "step", "tokens", "generated_tokens", "accuracy")
            assert [a.get(key) for key in same] == [b.get(key) for key in same]
            assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-6)
    one, two = (load_file(path / "model" / "model.safetensors") for path in (straight, moved))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)


def timeless(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock or the machine's memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if "second" not in k and "memory" not in k} for x in lines]


def start_otherwise(runtime: Runtime, config: str, out: Path, what: str) -> str:
    """Rank 1 has another number of steps, or another file of the student."""
    if what == "file" and runtime.rank == 1:
        own = ending.model_parts
        ending.model_parts = lambda who, model: own(who, model) | {f"{who}/model.safetensors": "others"}
    steps = 7 if what == "steps" and runtime.rank == 1 else 6
    with pytest.raises(ConfigError) as refused:
        distill(loader.load(config, [f"training.steps={steps}"]), out=out)
    assert refused.value.everywhere
    return str(refused.value)


@pytest.mark.parametrize(("what", "named"), [("steps", "training.steps is 6"), ("file", "student/model.saf")])
def test_ranks_that_disagree_are_refused_together(
    sharded_run: tuple[str, Path], tmp_path: Path, what: str, named: str
) -> None:
    one, two = on_ranks(2, start_otherwise, sharded_run[0], tmp_path / "run", what)
    assert one == two
    assert one.startswith(f"the ranks were not started alike:\n  {named}")
    assert f"on rank 0 and {'7' if what == 'steps' else 'others'} on rank 1" in one
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["memory", "kill"])
def test_what_a_user_of_torchrun_sees_of_a_rank_that_fails(
    sharded_run: tuple[str, Path], tmp_path: Path, fault: str
) -> None:
    """Its own message and one line of the others, or of a killed one the signal's number from torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).parents[1] / "failing_rank.py"
    done = subprocess.run(
        [*torchrun, str(script), fault, "distill", sharded_run[0], "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"},
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert 'Traceback (most recent call last):\n  File "' + str(script) not in done.stderr
    if fault == "memory":
        assert len(errors) == 2
        assert any(line.startswith("error: memory ran out: the fault of rank 1") for line in errors)
        (other,) = [line for line in errors if "MemoryError: the fault of rank 1" in line]
        assert other.startswith("error: rank 1 on ")
        assert other.endswith("; --resume continues from the last checkpoint")
    else:
        assert len(errors) == 1
        assert errors[0].startswith("error: another rank has ended: ")
        assert errors[0].endswith("--resume continues from the last checkpoint")
        assert "SIGKILL" in done.stderr
