"""What the public benchmarks have in common: rows of a file or a hub dataset, asked in chat turns or as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from headstart.errors import DataError
from headstart.records import Sampling
from headstart.tasks.reading import is_file_source, matching, read_rows


class Row(NamedTuple):
    """A row of the source with its place and what such rows look like, for messages."""

    values: Mapping[str, Any]
    where: str
    expected: str

    def get(self, column: str, *kinds: type) -> Any:
        """The value of a column. Raises DataError when it is missing or of another type."""
        value = self.values.get(column)
        if not isinstance(value, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            kind = "missing" if value is None else f"of type {type(value).__name__}, not {wanted}"
            columns = ", ".join(map(str, self.values))
            raise DataError(f"{self.where}: column {column!r} is {kind}, the columns are {columns}; {self.expected}")
        return value

    def text(self, column: str) -> str:
        """A column that holds text."""
        value: str = self.get(column, str)
        return value


class Benchmark:
    """`data` is a file (.jsonl, .json, .parquet, also .gz) or the name of a hub dataset; with `chat=False` a question
    is plain text, which a base model continues. Raises DataError when `data` is None, saying what to pass."""

    name: str
    hub: ClassVar[Mapping[str, tuple[str | None, str]]] = {}
    """Public hub datasets with their configuration and split; any other name is read from its split `test`."""
    splits: ClassVar[tuple[str, ...]] = ()
    """The splits that prompts can be taken from; none where there is no training split."""
    split: str | None = None
    """The split that is read; null is the test, or what a file holds."""
    where: Mapping[str, Any] = MappingProxyType({})
    """Rows that are read, see `reading.matching`."""
    files: str
    """What a file must look like."""
    training: tuple[str, ...]
    """Where training prompts for this task come from."""
    samples: int
    sampling: Sampling
    max_tokens: int

    def __init__(self, data: str | Path | None, *, chat: bool = True) -> None:
        if data is None:
            options = " or ".join([*(f"the hub dataset {name}" for name in self.hub), self.files])
            raise DataError(f"task {self.name} needs its data: pass {options}")
        self.data = str(data)
        self.chat = chat

    def rows(self) -> Iterator[Row]:
        """All rows of the source. Raises DataError when it cannot be read."""
        subset, split = self.part()
        for row, values in matching(read_rows(self.data, subset=subset, split=split), self.where, self.data):
            yield Row(values, f"{self.data}, row {row + 1}", f"task {self.name} reads {self.files}")

    def part(self) -> tuple[str | None, str]:
        """Configuration and split of the source."""
        if is_file_source(self.data):
            return None, "train"
        subset, split = self.hub.get(self.data, (None, "test"))
        return subset, self.split or split
