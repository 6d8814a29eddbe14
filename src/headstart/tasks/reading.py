"""Rows from files and from the hub: the one door to `datasets`."""

from __future__ import annotations

import difflib
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from headstart.errors import DataError

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".parquet.gz")
_SUPPORTED = ".jsonl, .json or .parquet (also .gz)"


def read_rows(source: str, *, subset: str | None = None, split: str = "train") -> list[dict[str, Any]]:
    """All rows of a file (chosen by its suffix) or of a hub dataset, in their order; at least one.

    A `.json` file may hold an array of objects or one object per line. `subset` and `split` are for hub datasets.
    Raises DataError when the source is missing, empty or malformed, naming file and line.
    """
    path = Path(source).expanduser()
    if not is_file_source(source):
        if path.is_file():
            raise DataError(f"{source}: unknown file type {path.suffix!r}; expected {_SUPPORTED}")
        if not path.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
            # No hub name looks like this, and asking the hub takes half a minute of retries without network.
            raise DataError(f"{source} does not exist{_similar_file(path)}")
        return _hub_rows(source, subset, split)
    if subset is not None or split != "train":
        found = f"subset={subset!r}, split={split!r}"
        raise DataError(f"{source} is a file, but {found} choose parts of a hub dataset; remove them")
    rows = _file_rows(path)
    if not rows:
        raise DataError(f"{source} is empty; expected at least one row")
    return rows


def is_file_source(source: str) -> bool:
    """Whether `source` names a data file (by its suffix) rather than a hub dataset."""
    return source.lower().endswith(FILE_SUFFIXES)


def stem(source: str) -> str:
    """The short name of a source: `data/train.jsonl.gz` is `train`, `openai/gsm8k` is `gsm8k`."""
    name = Path(source).name
    ending = max((suffix for suffix in FILE_SUFFIXES if name.lower().endswith(suffix)), key=len, default="")
    return name[: len(name) - len(ending)] or name


def _file_rows(path: Path) -> list[dict[str, Any]]:
    data = _read_bytes(path)
    if ".parquet" in path.suffixes[-2:]:
        return _parquet_rows(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from error
    if not text.strip():
        return []
    if ".json" in path.suffixes[-2:] and text.lstrip().startswith("["):
        return _array_rows(path, text)
    return _line_rows(path, text)


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {kind}{_similar_file(path)}")
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _similar_file(path: Path) -> str:
    """A hint for a missing file, or nothing."""
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file() and is_file_source(entry.name))
    close = [name for name in names if stem(name) == stem(path.name)] or difflib.get_close_matches(path.name, names)
    return f"; did you mean {path.parent / close[0]}?" if close else "; check the path"


def _line_rows(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    # Only "\n" ends a line: str.splitlines would also split inside strings that hold U+2028 and the like.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error}); expected one object per line") from error
        rows.append(_object(row, f"{path}, line {number}"))
    return rows


def _array_rows(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        # The error of the parser ends with "line L column C".
        raise DataError(f"{path}: not a valid JSON array ({error})") from error
    return [_object(row, f"{path}, array item {number}") for number, row in enumerate(rows, start=1)]


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with named columns, found {type(row).__name__}")
    return row


def _parquet_rows(path: Path, data: bytes) -> list[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    return rows


def _hub_rows(source: str, subset: str | None, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        rows = [dict(row) for row in datasets.load_dataset(source, subset, split=split)]
    except Exception as error:  # the hub client raises over a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load the hub dataset {source!r} (subset {subset!r}, split {split!r}): {reason}. "
            f"Check name, subset and split; without network pass a file instead: {_SUPPORTED}"
        ) from error
    if not rows:
        raise DataError(f"the hub dataset {source!r} has no rows in split {split!r}; choose another split")
    return rows
