"""Files and folders that appear on disk whole or not at all, and locks that keep a second process out of a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from headstart.errors import RunFolderError

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # some network file systems


def write_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` so that it holds the old or the new content at any moment.

    A lone surrogate, which UTF-8 cannot hold, becomes its escape `\\udc80`: the same character in JSON and in quoted
    YAML. Raises RunFolderError when the file cannot be written, such as on a full disk; the old content is kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same report
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise refusal(path, error) from error
        raise


def refusal(path: Path, error: OSError) -> RunFolderError:
    """What to tell when `path` cannot be written."""
    return RunFolderError(
        f"{path} cannot be written: {error.strerror or error}. Free space or make its folder writable, then continue "
        "with --resume or with the same command."
    )


def append(path: Path, file: FileIO, line: bytes) -> None:
    """Add `line` to the open, unbuffered `file` of `path`. Raises RunFolderError when it cannot be written whole."""
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise refusal(path, error) from error


def is_temporary(path: Path) -> bool:
    """Whether this is the unfinished file of a `write_atomic` that was killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written like `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The name of a folder to make and fill, `<path>.incomplete`, which is flushed to disk and renamed to `path` at the
    end. After an error nothing of it is left; what a kill leaves, the next attempt removes.
    """
    incomplete = path.with_name(f"{path.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    try:
        yield incomplete
        for written in (*incomplete.rglob("*"), incomplete):
            sync(written)
        incomplete.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(incomplete, ignore_errors=True)
        raise


def take_lock(folder: Path) -> IO[str]:
    """An open file that keeps other processes out of `folder` until it is closed; a killed process leaves no lock.

    Raises RunFolderError when another process has it, or when `folder` cannot be written. On a file system without
    locks there is a warning instead.
    """
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except BlockingIOError:
        owner = (folder / LOCK).read_text(encoding="utf-8") or "which one is not known"
        raise RunFolderError(
            f"the folder {folder} is in use by another process ({owner}). Wait for it or stop it, or choose another "
            "folder with --out."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise refusal(folder, error) from error
        warnings.warn(
            f"{folder} lies on a file system without locks ({error.strerror}): make sure that no second process writes "
            "into it.",
            stacklevel=3,
        )
    return file


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """`take_lock` of a folder, which is made, for a `with` statement."""
    make_folder(folder)
    with take_lock(folder):
        yield


def make_folder(path: Path) -> None:
    """Make `path` and what is above it. Raises RunFolderError when that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be made: {error.strerror or error}; choose another folder") from error


def sync(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk: a rename survives a power cut only after the latter."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that a kill left unfinished, so that the next one does not continue it."""
    content = path.read_bytes() if path.exists() else b"\n"
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, none where there is no file, without a torn last line."""
    cut_torn_line(path)
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add records to a JSONL file, on disk before this returns."""
    with path.open("ab", buffering=0) as file:
        append(path, file, "".join(json.dumps(record) + "\n" for record in records).encode())
        os.fsync(file.fileno())
