"""Files and folders that are whole or absent, one process in a folder, and lone surrogates on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from headstart.errors import RunFolderError, StopRequested
from headstart.evaluation.run import Work, evaluate_into
from headstart.files import atomic_folder, is_temporary, locked, write_atomic, write_json

SURROGATES = ["\ud800", "a\udcffb", 'quote "\udfff" and \\', "\udc80\udc81 é \u2028 😀"]


@pytest.mark.parametrize("text", SURROGATES)
def test_a_lone_surrogate_is_the_same_character_in_json_and_quoted_yaml(tmp_path: Path, text: str) -> None:
    write_json(tmp_path / "x.json", {text: [text]})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {text: [text]}
    write_atomic(tmp_path / "x.yaml", yaml.safe_dump({"key": text}, allow_unicode=True))
    assert yaml.safe_load((tmp_path / "x.yaml").read_text(encoding="utf-8")) == {"key": text}


@pytest.mark.parametrize("error", [StopRequested(15), MemoryError(), KeyboardInterrupt()])
def test_what_ends_a_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_atomic(tmp_path / "x", "old")

    def cut(descriptor: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cut)
        with pytest.raises(type(error)):
            write_atomic(tmp_path / "x", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "old")]


FILL = """
import os, sys
from pathlib import Path
from headstart.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    os.kill(os.getpid(), 9)
"""


def cut(model: Path, error: BaseException) -> None:
    with atomic_folder(model) as folder:
        assert not folder.exists(), "what the kill left is gone"
        folder.mkdir()
        raise error


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert subprocess.run([sys.executable, "-c", FILL, str(model)]).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["model.incomplete"]
    for error in (StopRequested(2), OSError(28, "No space left on device")):
        with pytest.raises(type(error)):
            cut(model, error)
        assert not list(tmp_path.iterdir())
    with atomic_folder(model) as folder:
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_text("w")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "model", "model/adapter", "model/adapter/weights",
    ]  # fmt: skip


HOLD = "import sys; from pathlib import Path; from headstart.files import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"


def test_the_second_process_in_a_folder_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    work = Work("task", (), {"0": 1}, lambda left, keep: pytest.fail("graded in a folder that is in use"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        for attempt in (
            lambda: evaluate_into(folder, work, {}, k=None, progress=lambda done, total: None),
            lambda: locked(folder).__enter__(),
        ):
            with pytest.raises(RunFolderError, match=rf"in use by another process \(process {other.pid} on .*--out"):
                attempt()
        assert [path.name for path in folder.iterdir()] == [".lock"]
        other.kill()
        other.wait()
    with locked(folder):
        pass


def test_a_lock_that_cannot_be_taken_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be made"), locked(tmp_path / "file" / "folder"):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("name", "temporary"), [(".x.json.12.tmp", True), ("x.tmp", False), (".lock", False), ("tmp", False)]
)
def test_what_a_kill_leaves_is_told_from_a_file_of_ones_own(name: str, temporary: bool) -> None:
    assert is_temporary(Path(name)) is temporary
