"""Rows from files and from the hub: the one door to `datasets`."""

from __future__ import annotations

import difflib
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.errors import DataError, first_line

MAX_BYTES, MAX_RATIO = 2**30, 50
"""A compressed file may unfold to the first, a larger one to that many times its own size; text rarely reaches 20."""
ROW_BYTES, BATCH = 256, 128
"""What a row of one column takes in Python at least, and rows of a Parquet file that are unfolded at once."""
FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".parquet.gz")
SHOWN = 12
"""Values of a column that are named in a message."""
_SUPPORTED = ".jsonl, .json or .parquet (also .gz)"


def read_rows(source: str, *, subset: str | None = None, split: str = "train") -> list[dict[str, Any]]:
    """All rows of a file (chosen by its suffix) or of a hub dataset, in their order; at least one.

    A `.json` file may hold an array of objects or one object per line. `subset` and `split` are for hub datasets.
    Raises DataError when the source is missing, empty or malformed, naming file and line.
    """
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long for the file system, a home folder of nobody
        raise DataError(f"{source[:100]!r} cannot be looked up: {getattr(error, 'strerror', error)}") from error
    if not is_file_source(source):
        if is_file:
            raise DataError(f"{source}: unknown file type {path.suffix!r}; expected {_SUPPORTED}")
        if not is_folder and (source.startswith((".", "/", "~")) or source.count("/") > 1):
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


def matching(rows: list[dict[str, Any]], where: Mapping[str, Any], source: str) -> list[tuple[int, dict[str, Any]]]:
    """The rows whose columns hold what `where` says (a value, or one of a list), with their numbers from 0.

    Raises DataError for a column that is not there, for a value that no row has, and where no row has all of them.
    """
    kept = list(enumerate(rows))
    for column, wanted in where.items():
        require_column(rows, column, source)
        values = list(map(_same, wanted if isinstance(wanted, list | tuple) else [wanted]))
        held = Counter(_same(row.get(column)) for row in rows)
        if absent := [value for value in values if value not in held]:
            shown = ", ".join(f"{value} ({count:,} rows)" for value, count in held.most_common(SHOWN))
            more = f" and {len(held) - SHOWN:,} other values" if len(held) > SHOWN else ""
            raise DataError(f"{source}: no row has {column} = {absent[0]}; the column holds {shown}{more}")
        kept = [(number, row) for number, row in kept if _same(row.get(column)) in values]
    if not kept:
        raise DataError(f"{source}: no row has all of prompts.where = {dict(where)} at once; ask for less")
    return kept


def require_column(rows: Sequence[Mapping[str, Any]], column: str, source: str) -> None:
    """Raise DataError where no row has `column`."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if column in columns:
        return
    close = difflib.get_close_matches(column, columns, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise DataError(f"{source} has no column {column!r}{hint} Columns present: {', '.join(columns) or 'none'}")


def _same(value: Any) -> str:
    """A value as JSON, which tells 1 from "1" and from true."""
    number = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if number else value, sort_keys=True, default=str, ensure_ascii=False)


def is_file_source(source: str) -> bool:
    """Whether `source` names a data file (by its suffix) rather than a hub dataset."""
    return source.lower().endswith(FILE_SUFFIXES)


def parse_json(text: str) -> Any:
    """What a JSON text says. Raises ValueError where it is not valid, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


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
        return _unzipped(path) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; it may be damaged, or not what its name says") from error


def _unzipped(path: Path) -> bytes:
    unzipped = io.BytesIO()
    with gzip.open(path) as stream:
        while piece := stream.read(2**20):
            unzipped.write(piece)
            _require_size(unzipped.tell(), path.stat().st_size, path)
    return unzipped.getvalue()


def _require_size(unfolded: int, stored: int, path: Path) -> None:
    if unfolded > max(MAX_BYTES, MAX_RATIO * stored):
        raise DataError(
            f"{path} unfolds to more than {unfolded / 2**30:.1f} GiB, over {MAX_RATIO} times its own size: no prompts "
            "are so much alike; if that is right, give it as plain .jsonl"
        )


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
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error}); expected one object per line") from error
        rows.append(_object(row, f"{path}, line {number}"))
    return rows


def _array_rows(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = parse_json(text)
    except ValueError as error:
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

    rows: list[dict[str, Any]] = []
    unfolded = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(io.BytesIO(data)).iter_batches(BATCH):
            # A dictionary column is small in Arrow, however often it repeats a long text.
            columns = [c.dictionary_decode() if hasattr(c, "dictionary") else c for c in batch.columns]
            unfolded += sum(column.nbytes for column in columns) + ROW_BYTES * batch.num_rows
            _require_size(unfolded, len(data), path)
            rows += _arrow_rows(batch, str(path), len(rows) + 1)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    return rows


def _arrow_rows(table: Any, source: str, first: int) -> list[dict[str, Any]]:
    """Rows of an Arrow table or batch; `first` is the number of its first one."""
    try:
        kinds = {field.name: field.type for field in table.schema}
        return [{name: _value(cell, kinds[name]) for name, cell in row.items()} for row in table.to_pylist()]
    except (ValueError, OverflowError) as error:  # not UTF-8, a date out of range, two fields of one name
        if table.num_rows > 1:
            return [row for i in range(table.num_rows) for row in _arrow_rows(table.slice(i, 1), source, first + i)]
        raise DataError(f"{source}, row {first}: cannot be read ({error}); repair the row") from error


def _value(value: Any, kind: Any) -> Any:
    """An Arrow value of type `kind` as JSON has it.

    Every struct of a column has the fields of all its rows; null is how it says that a row's record lacks one, so these
    fields are left out. Nulls in lists, maps and JSON text pad nothing and are kept.
    """
    from pyarrow import types

    if value is None:
        return None
    if getattr(kind, "extension_name", None) == "arrow.json":
        return parse_json(value)
    kind = getattr(kind, "storage_type", kind)
    if types.is_struct(kind):
        return {field.name: _value(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if types.is_map(kind):
        return {key: _value(item, kind.item_type) for key, item in value}
    if isinstance(value, list):
        return [_value(item, kind.value_type) for item in value]
    return value


def dataset_rows(dataset: Any, source: str) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset` (streamed or not), called `source` in messages."""
    for number, table in enumerate(dataset.with_format("arrow").iter(BATCH)):
        yield from _arrow_rows(table, source, number * BATCH + 1)


def _hub_rows(source: str, subset: str | None, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        rows = list(dataset_rows(datasets.load_dataset(source, subset, split=split), source))
    except DataError:
        raise
    except Exception as error:  # the hub client raises over a dozen unrelated types
        reason, folder = first_line(error), Path(source)
        if folder.is_dir():
            held = ", ".join(sorted(entry.name for entry in folder.iterdir() if is_file_source(entry.name))[:SHOWN])
            raise DataError(
                f"cannot load the folder {source!r} as a dataset: {reason}. Give a file: {held or _SUPPORTED}"
            ) from error
        raise DataError(
            f"cannot load the hub dataset {source!r} (subset {subset!r}, split {split!r}): {reason}. "
            f"Check name, subset and split; without network pass a file instead: {_SUPPORTED}"
        ) from error
    if not rows:
        raise DataError(f"the hub dataset {source!r} has no rows in split {split!r}; choose another split")
    return rows
