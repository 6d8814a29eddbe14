"""Checkpoints: bit-equal, whole after a kill at any moment, damage found and named, a full disk survived."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from headstart.errors import CheckpointError
from headstart.train.checkpoint import Checkpoint, damage, load_newest, rotate, save_checkpoint

FILES = ("model.safetensors", "optimizer.pt", "state.json", "manifest.json")


def marked(step: int, width: int = 16) -> Checkpoint:
    """A small checkpoint whose every part says its step."""
    ones = torch.ones(width)
    return Checkpoint(step, {"w": ones * step}, {"m": ones * -step}, {"at": step})


def is_consistent(checkpoint: Checkpoint) -> bool:
    step = checkpoint.step
    return (
        checkpoint.state == {"at": step}
        and bool((checkpoint.model["w"] == step).all())
        and bool((checkpoint.optimizer["m"] == -step).all())
    )


def no_warning(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- content ---------------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_equal_with_adam_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3).to(torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model[1](model[0](torch.randn(4, 5)).bfloat16()).float() ** 2).mean().backward()
        optimizer.step()
    state = {"tokens": 2**60, "best": 0.1 + 0.2, "horizon": {"n": None}}
    save_checkpoint(tmp_path, Checkpoint(3, model.state_dict(), optimizer.state_dict(), state))
    loaded = load_newest(tmp_path, no_warning)
    assert loaded is not None
    assert (loaded.step, loaded.state) == (3, state)
    for name, tensor in model.state_dict().items():
        assert loaded.model[name].dtype == tensor.dtype
        assert torch.equal(loaded.model[name], tensor)
    fresh = torch.optim.AdamW(model.parameters())
    fresh.load_state_dict(loaded.optimizer)
    assert fresh.param_groups[0]["lr"] == 1e-2
    for parameter in model.parameters():
        assert optimizer.state[parameter].keys() == fresh.state[parameter].keys()
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(fresh.state[parameter][key], value), key


def test_tied_strided_and_later_changed_tensors(tmp_path: Path) -> None:
    embedding = torch.arange(12.0).reshape(3, 4)
    model = {"embed": embedding, "head": embedding, "turned": embedding.t(), "part": embedding[:, 1:3]}
    save_checkpoint(tmp_path, Checkpoint(1, model, {}, {}))
    expected = {name: tensor.clone() for name, tensor in model.items()}
    embedding.zero_()
    loaded = load_newest(tmp_path, no_warning)
    assert loaded is not None
    assert all(torch.equal(loaded.model[name], expected[name]) for name in expected)


def test_saving_twice_writes_once_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, marked(50))
    assert path.name == "step_000050"
    before = path.stat().st_ino
    save_checkpoint(tmp_path, marked(50))
    assert path.stat().st_ino == before
    (path / "state.json").write_text("{}")
    save_checkpoint(tmp_path, marked(50))
    assert damage(path) is None
    assert names(tmp_path) == ["step_000050"]


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "missing", no_warning) is None
    (tmp_path / "step_000001.incomplete").mkdir()
    (tmp_path / "notes").mkdir()
    assert load_newest(tmp_path, no_warning) is None


# --- damage ----------------------------------------------------------------------------------------------------------


def flips(path: Path) -> Iterator[bytes]:
    """The file with one byte changed: everywhere in a small file, at about 100 places of a larger one."""
    content = path.read_bytes()
    small = len(content) < 800
    for place in range(0, len(content), 1 if small else len(content) // 100):
        # White space for white space is the change that a JSON reader would not see.
        for other in {content[place] ^ 1, *(b" \r" if small else b"")} - {content[place]}:
            yield content[:place] + bytes([other]) + content[place + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_detected(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, marked(1, width=4))
    content = (path / name).read_bytes()
    for changed in flips(path / name):
        (path / name).write_bytes(changed)
        assert damage(path), f"{name} changed unseen"
    (path / name).write_bytes(content)
    assert damage(path) is None


def test_a_checkpoint_under_another_steps_name_is_detected(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, marked(1)).rename(tmp_path / "step_000009")
    assert damage(tmp_path / "step_000009") == "manifest.json does not describe this checkpoint"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("harm", [truncate, empty, flip, grow, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_previous_one_used(tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    save_checkpoint(tmp_path, marked(1))
    harm(save_checkpoint(tmp_path, marked(2)) / name)
    warnings: list[str] = []
    loaded = load_newest(tmp_path, warnings.append)
    assert loaded is not None
    assert loaded.step == 1
    assert is_consistent(loaded)
    (warning,) = warnings
    assert "step_000002" in warning
    assert name in warning


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save_checkpoint(tmp_path, marked(step)) / "optimizer.pt")
    warnings: list[str] = []
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints.*step_000001.*optimizer\.pt.*--out"):
        load_newest(tmp_path, warnings.append)
    assert len(warnings) == 2


# --- rotation --------------------------------------------------------------------------------------------------------


def test_rotation_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_checkpoint(tmp_path, marked(step))
    rotate(tmp_path, keep_last=2, best_step=3)
    assert names(tmp_path) == ["step_000003", "step_000005", "step_000006"]
    rotate(tmp_path, keep_last=1, best_step=None)
    assert names(tmp_path) == ["step_000006"]


def test_a_damaged_newer_checkpoint_does_not_crowd_out_the_good_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, marked(4))
    flip(save_checkpoint(tmp_path, marked(9)) / "model.safetensors")
    save_checkpoint(tmp_path, marked(5))  # resumed at 4, interrupted at 5
    rotate(tmp_path, keep_last=1, best_step=None)
    loaded = load_newest(tmp_path, no_warning)
    assert loaded is not None
    assert loaded.step == 5


# --- kills -----------------------------------------------------------------------------------------------------------


def save_forever(folder: Path, first: int) -> None:
    torch.set_num_threads(1)
    step = first
    while True:
        save_checkpoint(folder, marked(step, width=100_000))
        rotate(folder, keep_last=2, best_step=None)
        step += 1


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """Twelve processes in turn go on where the killed one stopped; what is left is always whole and never older."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["headstart.train.checkpoint"])
    random_moment, step, interrupted = random.Random(7), 0, 0
    save_checkpoint(tmp_path, marked(step))
    for _ in range(12):
        process = context.Process(target=save_forever, args=(tmp_path, step + 1))
        process.start()
        deadline = time.monotonic() + 30
        while not (tmp_path / f"step_{step + 1:06d}").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(random_moment.uniform(0, 0.1))
        process.kill()
        process.join()
        interrupted += any(name.endswith(".incomplete") for name in names(tmp_path))
        loaded = load_newest(tmp_path, no_warning)
        assert loaded is not None
        assert is_consistent(loaded)
        assert loaded.step > step
        step = loaded.step
    assert interrupted, "no kill fell inside a save"


class KilledError(BaseException):
    """Passes through `except Exception`, as a kill would: no cleaning up."""


def test_kill_before_every_change_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exhaustive where random kills are lucky: stop before the k-th flush, rename, removal or new folder, for all k."""
    for moment in range(200):
        folder = tmp_path / str(moment)
        for step in (1, 2):
            save_checkpoint(folder, marked(step))
        left = [moment]

        def before(real: Callable[..., object], left: list[int] = left) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                if left[0] == 0:
                    raise KilledError
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        finished = True
        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
                patch.setattr(os, name, before(getattr(os, name)))
            try:
                save_checkpoint(folder, marked(3))
                rotate(folder, keep_last=1, best_step=None)
            except KilledError:
                finished = False
        loaded = load_newest(folder, no_warning)
        assert loaded is not None
        assert loaded.step in (2, 3)
        assert is_consistent(loaded)
        assert not [name for name in names(folder) if not name.endswith(".incomplete") and damage(folder / name)]
        save_checkpoint(folder, marked(3))
        rotate(folder, keep_last=1, best_step=None)
        assert [name for name in names(folder) if not name.endswith(".incomplete")] == ["step_000003"]
        if finished:
            break
    assert finished
    assert moment > 15


# --- full disks ------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A file-size limit: writes beyond it fail with EFBIG, as writes over a quota do with EDQUOT."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "big",
    [
        Checkpoint(2, {"w": torch.zeros(500_000)}, {}, {}),
        Checkpoint(2, {}, {"m": torch.zeros(500_000)}, {}),
        Checkpoint(2, {}, {}, {"x": "x" * 2_000_000}),
    ],
    ids=["model", "optimizer", "state"],
)
def test_a_file_limit_keeps_the_last_good_checkpoint(tmp_path: Path, big: Checkpoint) -> None:
    save_checkpoint(tmp_path, marked(1))
    with largest_file(300_000), pytest.raises(CheckpointError, match=r"File too large.*step_000001, is kept.*--resume"):
        save_checkpoint(tmp_path, big)
    assert names(tmp_path) == ["step_000001"]
    loaded = load_newest(tmp_path, no_warning)
    assert loaded is not None
    assert is_consistent(loaded)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tiny disk needs root; the file-limit test covers the same path")
    try:
        save_checkpoint(disk, marked(1))
        for big in (
            Checkpoint(2, {"w": torch.zeros(1_000_000)}, {}, {}),
            Checkpoint(2, {}, {"m": torch.zeros(1_000_000)}, {}),
        ):
            needed = r"No space left on device.*It needs about 3\.8 MiB and \d\.\d MiB are free.*step_000001, is kept"
            with pytest.raises(CheckpointError, match=needed):
                save_checkpoint(disk, big)
            assert names(disk) == ["step_000001"]
        save_checkpoint(disk, marked(2))
        loaded = load_newest(disk, no_warning)
        assert loaded is not None
        assert loaded.step == 2
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"Not a directory.*no earlier one"):
        save_checkpoint(tmp_path / "file" / "checkpoints", marked(1))


def test_state_is_readable_json(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, marked(7))
    assert json.loads((path / "state.json").read_text()) == {"at": 7}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
