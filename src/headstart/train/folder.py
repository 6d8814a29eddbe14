"""The run folder: what lies where, who may write it, and how a file gets there whole or not at all.

Every file is written under a temporary name, flushed to disk and renamed, so a reader (or a resumed run) sees the old
content or the new one, never half of it. One process owns a run folder at a time: a lock that the operating system
releases even after `kill -9`.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from headstart.config.render import resolved
from headstart.config.schema import Config
from headstart.errors import RunFolderError
from headstart.files import LOCK, is_temporary, take_lock, write_atomic, write_json

_PACKAGES = ("headstart", "torch", "transformers", "peft")
_CONFIG, _ENVIRONMENT = "config.yaml", "environment.json"
# config.yaml is written last, so it marks a complete folder; a killed start leaves these, and temporary files.
_STARTED = {LOCK, _ENVIRONMENT}


class RunFolder:
    """One run on disk. `RunFolder(path)` only names the places; `create` and `open` also take the lock, for writing.

    Use it as a context manager, or call `close`, to release the lock within a process that keeps running.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if str(path).encode(errors="replace") != os.fsencode(path):  # safetensors and tokenizers take UTF-8 alone
            raise RunFolderError(f"{path}: the name of a run folder must be UTF-8; choose another folder with --out")
        self._lock: IO[str] | None = None
        self._made = False

    @classmethod
    def create(cls, path: Path, config: Config) -> RunFolder:
        """A new, locked folder with `config.yaml` and `environment.json`.

        Raises RunFolderError when the folder exists and is not empty, cannot be written, or is used by another process.
        """
        folder = cls(path)
        with folder._taking():
            folder.refuse_content()  # before the lock, so that nothing is left in a folder that is not ours
            folder.path.mkdir(parents=True, exist_ok=True)
            folder._acquire()
            folder.refuse_content()  # another process may have made it in between
            write_json(folder.path / _ENVIRONMENT, environment())
            write_atomic(folder.config, resolved(config))
            folder._make_places()
        folder._made = True
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing folder, locked for resuming; half-written checkpoints of a killed run are removed.

        Raises RunFolderError when there is no run at `path`, it cannot be written, or another process uses it.
        """
        folder = cls(path)
        with folder._taking():
            folder.require()
            folder._acquire()
            folder._make_places()
            for leftover in folder.checkpoints.glob("*.incomplete"):
                shutil.rmtree(leftover)
        return folder

    @property
    def config(self) -> Path:
        """The resolved configuration, `config.yaml`."""
        return self.path / _CONFIG

    @property
    def metrics(self) -> Path:
        """One line per step and per evaluation, `metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    @property
    def model(self) -> Path:
        """Where the final model goes, in Hugging Face format. Made only when there is one."""
        return self.path / "model"

    def keep_model(self, step: int) -> Path:
        """Move the model of `step` out of the way of the next, to `model-step-<step>`; returns where it is now."""
        kept = self.path / f"model-step-{step}"
        if kept.exists():  # of a kill between this and the new config.yaml; `model` was written again since
            shutil.rmtree(kept)
        return self.model.rename(kept)

    def close(self) -> None:
        """Release the lock. Safe to call twice."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def abandon(self) -> None:
        """Close, and remove the folder if this object made it: for a run that failed before its first step."""
        if self._made:
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _taking(self) -> Iterator[None]:
        """Turn what the file system refuses into one clear error, and let go of the lock after any error."""
        try:
            yield
        except OSError as error:
            self.close()
            raise RunFolderError(
                f"the run folder {self.path} cannot be written: {error.strerror or error}. "
                "Make it writable, or choose another place with --out."
            ) from error
        except BaseException:
            self.close()
            raise

    def require(self) -> RunFolder:
        """This folder. Raises RunFolderError when there is no run in it."""
        if not self.config.is_file():
            found = "it has no config.yaml" if self.path.is_dir() else "no such folder"
            raise RunFolderError(
                f"{self.path} is not a run folder ({found}). Give --resume a folder that `headstart distill` made."
            )
        return self

    def refuse_content(self) -> None:
        """Raises RunFolderError when there is anything here that a new run could overwrite, or no way to write."""
        if not self.path.exists():
            place = next(parent for parent in self.path.absolute().parents if parent.exists())
            if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
                reason = os.strerror(errno.EACCES if place.is_dir() else errno.ENOTDIR)
                raise RunFolderError(
                    f"the run folder {self.path} cannot be written: {reason} ({place}). "
                    "Choose another place with --out."
                )
            return
        if not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file, not a run folder. Choose another place with --out.")
        names = {entry.name for entry in self.path.iterdir() if not is_temporary(entry)}
        if _CONFIG in names:
            raise RunFolderError(
                f"the run folder {self.path} already holds a run. "
                f"Continue it with --resume {self.path}, or choose another folder with --out."
            )
        if not names <= _STARTED:
            raise RunFolderError(
                f"the folder {self.path} is not empty (it holds {min(names - _STARTED)}) and is no run to --resume. "
                "Choose another folder with --out."
            )

    def _acquire(self) -> None:
        self._lock = take_lock(self.path)

    def _make_places(self) -> None:
        for place in (self.rollouts, self.checkpoints, self.eval):
            place.mkdir(exist_ok=True)


def truncate_metrics(path: Path, step: int) -> int:
    """Drop what a run resumed at `step` writes again, and lines that cannot be read (torn by a kill), atomically.

    Written again are the steps after `step` and the evaluations from `step` on. Returns how many lines were dropped; a
    missing file counts as empty. Kept lines stay byte for byte.
    """
    if not path.exists():
        return 0
    *whole, torn = path.read_bytes().split(b"\n")
    kept = [line for line in whole if _belongs(line, step)]
    dropped = len(whole) - len(kept) + bool(torn)
    if dropped:
        write_atomic(path, b"".join(line + b"\n" for line in kept).decode())
    return dropped


def environment() -> dict[str, Any]:
    """What this run runs on: versions, machine, command line, time. JSON-serialisable."""
    import torch  # here, so that a refused folder is reported before the slow import

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": _git_commit(),
    }


def _belongs(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line.decode())
        return bool(record["step"] < step or (record["step"] == step and record["event"] == "step"))
    except (ValueError, TypeError, KeyError):
        return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the current directory's checkout, or None outside one (or without git)."""
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
