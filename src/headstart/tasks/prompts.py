"""Rows become problems: what is asked, and where it has one, the reference answer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, cast

from headstart.config.schema import PromptsConfig
from headstart.errors import DataError
from headstart.records import Message, Problem
from headstart.tasks.late import WORLDS
from headstart.tasks.reading import read_rows, stem

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "system": "system",
}
"""Role names of the other common conversation format, `{"from": ..., "value": ...}`."""
TINY_SIZE = 4096
"""Problems of a bundled world when no limit is set."""


def load_problems(config: PromptsConfig) -> list[Problem]:
    """The problems of a source, in its order, at most `config.limit`; at least one.

    An id comes from the `id` column, else it is `<stem>/<row>` with rows counted from 0 (messages of errors count
    from 1). A string becomes one user message with `config.chat`, plain text without. The system prompt is not put in
    here but where a model's view is rendered, because student and teacher may have different ones.
    Raises DataError for missing columns and for empty or malformed rows.
    """
    if config.source in WORLDS:
        return list(WORLDS[config.source](config.split, config.limit or TINY_SIZE).problems())
    rows = read_rows(config.source, subset=config.subset, split=config.split)[: config.limit]
    for column in (config.column, config.answer_column, config.tools_column):
        if column is not None:
            _require_column(rows, column, config.source)
    return [_problem(row, index, config) for index, row in enumerate(rows)]


def _require_column(rows: Sequence[Mapping[str, Any]], column: str, source: str) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if column in columns:
        return
    close = difflib.get_close_matches(column, columns, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise DataError(f"{source} has no column {column!r}{hint} Columns present: {', '.join(columns) or 'none'}")


def _problem(row: Mapping[str, Any], index: int, config: PromptsConfig) -> Problem:
    where = f"{config.source}, row {index + 1}"
    identity = row.get("id")
    name = f"{stem(config.source)}/{index}" if identity is None else str(identity)
    answer = None if config.answer_column is None else _answer(row.get(config.answer_column), where)
    meta = {} if config.tools_column is None else {"tools": _tools(row.get(config.tools_column), where)}
    match row.get(config.column):
        case str(text) if config.chat:
            messages: tuple[Message, ...] = ({"role": "user", "content": _text(text, where)},)
            return Problem(id=name, messages=messages, answer=answer, meta=meta)
        case str(text):
            return Problem(id=name, text=_text(text, where), answer=answer)
        case list(turns) if config.chat:
            return Problem(id=name, messages=_messages(turns, where), answer=answer, meta=meta)
        case list():
            raise DataError(
                f"{where}: {config.column!r} holds chat messages, but prompts.chat is false; set it to true"
            )
        case other:
            kind = "null or missing" if other is None else f"a {type(other).__name__}"
            raise DataError(f"{where}: {config.column!r} is {kind}; expected a string or a list of chat messages")


def _answer(value: Any, where: str) -> str | None:
    match value:
        case None | str():
            return value
        case int() | float() | Decimal():
            return str(value)
        case _:
            raise DataError(f"{where}: the answer is a {type(value).__name__}; expected a string or a number")


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Function schemas: a list of objects, or the same as a JSON string; null and "" are no tools."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value or []
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: the tools are not JSON ({error.msg} at character {error.pos})") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: the tools must be a list of JSON objects; found {type(tools).__name__}")
    return tools


def _text(text: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: the prompt is an empty string; remove the row or fill it in")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can smuggle in half of a surrogate pair, which no tokenizer accepts
        raise DataError(
            f"{where}: the text holds a lone surrogate (character {error.start}); repair the row"
        ) from error
    return text


def _messages(turns: Sequence[Any], where: str) -> tuple[Message, ...]:
    if not turns:
        raise DataError(f"{where}: the list of messages is empty")
    messages = tuple(_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, start=1))
    if messages[-1]["role"] == "assistant":
        # A conversation with its answers, as in fine-tuning sets: what the student has to answer comes before them.
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: answers[0]]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        found = messages[-1]["role"] if messages else "assistant"
        raise DataError(f"{where}: a prompt must end with a user (or tool) turn; this one ends with {found!r}")
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: expected an object with role and content, found {type(turn).__name__}")
    if "from" in turn and "role" not in turn:
        turn = {"role": SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")}
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where}: role and content must be strings; found the keys {', '.join(map(str, turn))}")
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
    # Further keys (tool calls, names) stay for the template; null ones come from Parquet's padding of records.
    extra = {key: value for key, value in turn.items() if value is not None}
    return cast(Message, {**extra, "role": role, "content": content if role == "assistant" else _text(content, where)})
