"""The run folder: who may write it, what it refuses, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.config.schema import Config
from headstart.errors import RunFolderError
from headstart.files import write_atomic, write_json
from headstart.train import folder as folder_module
from headstart.train.folder import RunFolder, truncate_metrics

CONFIG = Config.model_validate(
    {"student": {"path": "student"}, "teacher": {"path": "teacher"}, "prompts": {"source": "prompts.jsonl"}}
)


def test_create_writes_config_and_environment(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "deep" / "run", CONFIG) as run:
        assert "prompts.jsonl" in run.config.read_text()
        environment = json.loads((run.path / "environment.json").read_text())
        assert run.checkpoints.is_dir()
        assert run.rollouts.is_dir()
        assert run.eval.is_dir()
        assert not run.metrics.exists()
        assert not run.model.exists()
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["torch"]
    assert environment["cpus"] == os.cpu_count()
    assert not list(run.path.glob(".*.tmp"))


def test_create_refuses_a_run_and_a_foreign_folder(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", CONFIG).close()
    before = (tmp_path / "run" / "environment.json").read_bytes()
    with pytest.raises(RunFolderError, match=r"already holds a run.*--resume.*--out"):
        RunFolder.create(tmp_path / "run", CONFIG)
    assert (tmp_path / "run" / "environment.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        RunFolder.create(tmp_path / "mine", CONFIG)
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_create_accepts_an_empty_folder_and_a_start_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException): ...

    def killed(config: Config) -> str:
        raise KilledError

    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "resolved", killed)
        with pytest.raises(KilledError):
            RunFolder.create(tmp_path / "run", CONFIG)
    assert (tmp_path / "run" / "environment.json").exists()
    RunFolder.create(tmp_path / "run", CONFIG).close()


def test_unwritable_places_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match=r"cannot be written: Not a directory.*--out"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(RunFolderError, match=r"is a file"):
        RunFolder.create(tmp_path / "file", CONFIG)
    with pytest.raises(RunFolderError, match=r"cannot be written"):
        RunFolder.create(Path("/proc/headstart-run"), CONFIG)


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no such folder.*--resume"):
        RunFolder.open(tmp_path / "missing")
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        RunFolder.open(tmp_path)
    assert not list(tmp_path.iterdir())


def test_open_removes_half_written_checkpoints_only(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", CONFIG).close()
    for name in ("step_000001", "step_000002.incomplete", "step_000000.removed.incomplete"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
        (tmp_path / "run" / "checkpoints" / name / "model.safetensors").write_text("x")
    with RunFolder.open(tmp_path / "run") as run:
        assert [path.name for path in run.checkpoints.iterdir()] == ["step_000001"]


def test_one_process_at_a_time_and_a_kill_frees_the_lock(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", CONFIG).close()
    code = "import sys; from pathlib import Path; from headstart.train.folder import RunFolder;"
    code += "run = RunFolder.open(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError, match="in use by another process"):
            RunFolder.open(tmp_path / "run")
        other.kill()
        other.wait()
    RunFolder.open(tmp_path / "run").close()


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match=r"config\.yaml cannot be written: No space left on device"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
    write_json(path, {"é": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}


@settings(deadline=None, max_examples=50)
@given(steps=st.lists(st.integers(1, 9), max_size=12).map(sorted), keep=st.integers(0, 9), data=st.data())
def test_truncate_metrics_keeps_exactly_the_whole_lines_up_to_the_step(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    lines = [
        json.dumps({"event": "step", "step": step, "ü": [i]}, ensure_ascii=False) + "\n" for i, step in enumerate(steps)
    ]
    content = "".join(lines).encode()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    ends = [len("".join(lines[: i + 1]).encode()) for i in range(len(lines))]
    expected = [line for line, step, end in zip(lines, steps, ends, strict=True) if end <= cut and step <= keep]
    truncate_metrics(path, keep)
    assert path.read_bytes() == "".join(expected).encode()
    assert truncate_metrics(path, keep) == 0


def test_truncate_metrics_counts_what_it_drops(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_metrics(path, 3) == 0
    assert not path.exists()
    kept = b'{"event": "evaluation", "step": 0}\n{"event": "step", "step": 3}\n'
    again = b'{"event": "evaluation", "step": 3}\n{"event": "step", "step": 4}\n'
    path.write_bytes(kept + b"\x00\x00\xff\n" + again + b'{"st')
    assert truncate_metrics(path, 3) == 4
    assert path.read_bytes() == kept
