"""Rows become problems: what is asked, and where it has one, the reference answer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, TypeVar, cast

from headstart.config.models import IN_MEMORY
from headstart.config.prompts import PromptsConfig, SourceConfig
from headstart.errors import DataError
from headstart.progress import doing
from headstart.records import Message, Problem
from headstart.tasks.code import CODE, CodeTask, Mbpp
from headstart.tasks.images import Gallery, lifted
from headstart.tasks.late import WORLDS
from headstart.tasks.math import MATH, MathTask
from headstart.tasks.reading import dataset_rows, is_file_source, matching, parse_json, read_rows, require_column, stem

T = TypeVar("T")
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "system": "system",
}
"""Role names of the other common conversation format, `{"from": ..., "value": ...}`."""
MAX_DEPTH = 100
"""Levels of nesting in messages and tools that are still rendered: templates walk them by recursion."""
_TURNS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"}, {"messages"}, {"conversations"})
_LIKE_TURNS = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value|messages|conversations)["']\s*:""")
BENCHMARKS: dict[str, type[MathTask] | type[CodeTask]] = {**MATH, **CODE, "mbpp": Mbpp}
GIVEN = "headstart problem"
"""Column of a row that came from Python as a Problem."""
TINY_SIZE = 4096
"""Problems of a bundled world when no limit is set."""


@doing("reading the prompts")
def load_problems(
    config: PromptsConfig, given: Iterable[Any] | None = None, say: Callable[[str], None] = lambda text: None
) -> list[Problem]:
    """The problems of all sources, mixed as `mixed` does; those of one in its order, at most its `limit`; at least one.

    An id comes from the `id` column, else it is `<stem>/<row>` with rows counted from 0 (messages of errors count
    from 1). A string becomes one user message with `config.chat`, plain text without. The system prompt is not put in
    here but where a model's view is rendered, because student and teacher may have different ones. `given` are the
    prompts of the first source where they came from Python; `say` is told what was chosen.
    Raises DataError for missing columns and for empty or malformed rows.
    """
    found = [_of_source(s, config, None if place else given, say) for place, s in enumerate(config.sources)]
    for place, source in enumerate(config.sources):
        if source.teacher:
            found[place] = [replace(p, meta={**p.meta, "teacher": source.teacher}) for p in found[place]]
    problems = mixed(found[0], [(part.weight, more) for part, more in zip(config.mix, found[1:], strict=True)])
    if config.mix:
        counts = Counter(problem.meta.get("mix", 0) for problem in problems)
        texts = [f"{counts[n]:,} from {len(found[n]):,} of {source.source}" for n, source in enumerate(config.sources)]
        say(f"a pass over the prompts has {', '.join(texts)}")
    return problems


def mixed(main: Sequence[Problem], others: Sequence[tuple[float, Sequence[Problem]]]) -> list[Problem]:
    """`main` in its order; after its first n problems come, of each of `others`, as many as n times its weight rounds
    to, from its start again where it ends. So every beginning has the same shares, and is the same for a longer `main`.
    """
    problems, taken = [], [0] * len(others)
    for n, problem in enumerate(main, start=1):
        problems.append(problem)
        for place, (weight, more) in enumerate(others):
            while taken[place] < int(n * weight + 0.5):
                again, row = divmod(taken[place], len(more))
                problem, more_than_once = more[row], f"#{again + 1}" * bool(again)
                name = f"mix{place + 1}/{problem.id}{more_than_once}"
                problems.append(replace(problem, id=name, meta={**problem.meta, "mix": place + 1, "id": problem.id}))
                taken[place] += 1
    return problems


def _of_source(
    source: SourceConfig, config: PromptsConfig, given: Iterable[Any] | None, say: Callable[[str], None]
) -> list[Problem]:
    if given is None and source.source in WORLDS:
        return list(WORLDS[source.source](source.split, source.limit or TINY_SIZE).problems())
    if given is None and source.source in BENCHMARKS:
        problems = list(benchmark(source, config.chat).problems())
        if source.where:
            say(f"{source.source}: prompts.where keeps {len(problems):,} problems")
        return problems[: source.limit]
    if given is None and source.source == IN_MEMORY:
        raise DataError("the prompts were passed in from Python; pass the same again, as prompts=...")
    rows = read_rows(source.source, subset=source.subset, split=source.split) if given is None else _rows(given, source)
    kept = matching(rows, source.where, source.source)
    if source.where:
        say(f"{source.source}: prompts.where keeps {len(kept):,} of {len(rows):,} rows")
    columns = (source.answer_column, source.tools_column, source.completion_column, source.image_column)
    for column in (source.column, *columns, source.teacher_column, config.teacher_view.context_column):
        if column is not None and not all(GIVEN in row for row in rows):
            require_column(rows, column, source.source)
    images = Gallery.of(config, source, given=given is not None)
    return [row.get(GIVEN) or _problem(row, index, source, config, images) for index, row in kept[: source.limit]]


def benchmark(source: SourceConfig, chat: bool, **options: Any) -> MathTask | CodeTask:
    """The benchmark that `source` names, asking the problems of its split. Raises DataError where it has none such."""
    kind = BENCHMARKS[source.source]
    if not kind.splits:
        raise DataError(
            f"prompts.source: {kind.name} has no training split; take prompts from {' or '.join(kind.training)}"
        )
    if source.split not in kind.splits:
        raise DataError(f"prompts.split: {kind.name} has no split {source.split!r}; it has {', '.join(kind.splits)}")
    task = kind(source.data, chat=chat, **options)
    if is_file_source(task.data) and not issubclass(kind, Mbpp) and source.split != "train":
        raise DataError(f"{source.data} is a file, but prompts.split={source.split!r} chooses a part of a hub dataset")
    task.split, task.where = source.split, source.where
    return task


def _rows(given: Iterable[Any], source: SourceConfig) -> list[dict[str, Any]]:
    """What came from Python as rows: of a dataset, mappings, texts, lists of messages; a Problem stays itself."""
    if hasattr(given, "with_format"):
        return list(dataset_rows(given, source.source))
    rows: list[dict[str, Any]] = []
    for number, item in enumerate(given, start=1):
        match item:
            case Problem():
                rows.append({GIVEN: item})
            case Mapping():
                rows.append(dict(item))
            case str() | list() | tuple():
                rows.append({source.column: item if isinstance(item, str) else list(item)})
            case _:
                raise DataError(
                    f"prompt {number} is a {type(item).__name__}; pass texts, lists of messages, rows (a mapping with "
                    f"the column {source.column!r}) or headstart.Problem objects, but no mixture with Prompts"
                )
    if not rows:
        raise DataError("the list of prompts is empty; pass at least one")
    return rows


def _problem(
    row: Mapping[str, Any], index: int, config: SourceConfig, prompts: PromptsConfig, images: Gallery
) -> Problem:
    where = f"{config.source}, row {index + 1}"
    identity = row.get("id")
    name = f"{stem(config.source)}/{index}" if identity is None else _sound(str(identity), where, "the id holds")
    answer = None if config.answer_column is None else _answer(row.get(config.answer_column), where)
    context, chat = prompts.teacher_view.context_column, prompts.chat
    meta: dict[str, Any] = {} if config.tools_column is None else {"tools": _tools(row.get(config.tools_column), where)}
    if context is not None:
        meta["context"] = _context(row.get(context), f"{where}, column {context!r}")
    if config.teacher_column is not None and row.get(config.teacher_column) is not None:
        meta["teacher"] = str(row[config.teacher_column])
    completion = None if config.completion_column is None else _completion(row.get(config.completion_column), where)
    shown = [] if config.image_column is None else [*images.pictures(row.get(config.image_column), where)]
    match _asked(row.get(config.column), where):
        case str(text) if not chat:
            text = _filled(_sound(text, where), where)
            return Problem(id=name, text=text, answer=answer, meta=meta, completion=completion)
        case str(text):
            turns: list[Any] = [{"role": "user", "content": _filled(_sound(text, where), where)}]
        case list(turns) if chat:
            pass
        case list():
            raise DataError(
                f"{where}: {config.column!r} holds chat messages, but prompts.chat is false; set it to true"
            )
        case other:
            kind = "null or missing" if other is None else f"a {type(other).__name__}"
            raise DataError(f"{where}: {config.column!r} is {kind}; expected a string or a list of chat messages")
    turns, pictures = lifted(turns, images, shown, where)
    messages = _messages(turns, where, {picture.turn for picture in pictures})
    pictures = tuple(picture for picture in pictures if picture.turn < len(messages))
    return Problem(name, messages, answer=answer, meta=meta, completion=completion, images=pictures)


def _asked(value: Any, where: str) -> Any:
    """The prompt of a row; where its text is that of messages, these."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{", '"'):
        return value
    try:
        parsed = _asked(parse_json(value), where)
    except ValueError as error:
        # Prose may begin with JSON. What ends like JSON, or inside it, is a Python list's text or cut off.
        cut = getattr(error, "pos", 0) >= len(value) or str(error).startswith("Unterminated")
        if _LIKE_TURNS.match(value) and (cut or value.rstrip()[-1] in "]}"):
            raise DataError(f"{where}: the prompt looks like messages but is not JSON ({error}); mend it") from error
        return value
    turns = parsed if isinstance(parsed, list) else [parsed]
    return parsed if any(isinstance(t, dict) and any(keys <= t.keys() for keys in _TURNS) for t in turns) else value


def _answer(value: Any, where: str) -> str | None:
    match value:
        case None:
            return None
        case str() | int() | float() | Decimal():
            return _sound(str(value), where, "the answer holds")
        case _:
            raise DataError(f"{where}: the answer is a {type(value).__name__}; expected a string or a number")


def _context(value: Any, where: str) -> str | None:
    """What only the teacher sees: a text, or several (documents) with a blank line between them."""
    texts = value if isinstance(value, list) else [value] if value is not None else []
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: the teacher's context is a {type(value).__name__}; expected text or a list of texts")
    return _sound("\n\n".join(texts), where, "the context holds") if texts else None


def _completion(value: Any, where: str) -> str | None:
    """A response: text, or of messages that end with the assistant its first turn, where `_messages` cuts the prompt;
    None where there is none."""
    if (turns := _asked(value, where)) is None or isinstance(turns, str):
        return None if turns is None else _sound(turns, where, "the completion holds")
    messages = [_message(t, f"{where}, completion") for t in (turns if isinstance(turns, list) else [turns])]
    ends = bool(messages) and messages[-1]["role"] == "assistant"
    answers = [message for message in messages if ends and message["role"] == "assistant"]
    if any("tool_calls" in message for message in answers[:1]):
        raise DataError(f"{where}: the completion is a tool call, whose text is the template's; give it as text")
    return answers[0]["content"] if answers else None


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Function schemas: a list of objects, or the same as a JSON string; null and "" are no tools."""
    return _sound(_objects(value, where, "the tools"), where, "the tools hold")


def _objects(value: Any, where: str, what: str) -> list[dict[str, Any]]:
    objects = _parsed(value, where, what) or []
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise DataError(f"{where}: {what} must be a list of JSON objects; found {type(objects).__name__}")
    return objects


def _parsed(value: Any, where: str, what: str) -> Any:
    """`value`, or what it says where it is JSON text; blank text says null."""
    try:
        return (parse_json(value) if value.strip() else None) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{where}: {what} are not JSON ({error})") from error


def _sound(value: T, where: str, what: str = "the text holds") -> T:
    """`value`, when every text in it can be encoded and it is not nested too deeply."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        text.encode()
        if _depth(value) > MAX_DEPTH:
            raise RecursionError
    except UnicodeEncodeError as error:  # JSON can smuggle in half of a surrogate pair, which no tokenizer accepts
        before, half = text[max(0, error.start - 20) : error.start], ascii(text[error.start])
        raise DataError(f"{where}: {what} a lone surrogate ({half} after {before!r}); repair the row") from error
    except RecursionError as error:
        raise DataError(f"{where}: {what} JSON nested more than {MAX_DEPTH} levels deep") from error
    return value


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _filled(text: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: the prompt is an empty string; remove the row or fill it in")
    return text


def _messages(turns: Sequence[Any], where: str, pictured: Container[int] = ()) -> tuple[Message, ...]:
    """`pictured` turns, counted from 0, have images."""
    if not turns:
        raise DataError(f"{where}: the list of messages is empty")
    messages = tuple(_message(t, f"{where}, message {n + 1}", empty=n in pictured) for n, t in enumerate(turns))
    if messages[-1]["role"] == "assistant":
        # A conversation with its answers, as in fine-tuning sets: what the student has to answer comes before them.
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: answers[0]]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = messages[-1]["role"] if messages else "assistant"
        raise DataError(f"{where}: a prompt must end with a user (or tool) turn; this one ends with {last!r}")
    return messages


def _message(turn: Any, where: str, *, empty: bool = False) -> Message:
    """A turn, whose text may be `empty`."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: expected an object with role and content, found {type(turn).__name__}")
    keys = ", ".join(map(str, turn))
    if "from" in turn and "role" not in turn:
        speaker = turn["from"]
        turn = {"role": SHAREGPT.get(str(speaker), speaker), "content": turn.get("value")}
    role, content = turn.get("role"), _content(turn.get("content"), where)
    calls = [_call(call, where) for call in _objects(turn.get("tool_calls"), where, "the tool calls")]
    if content is None and (role == "tool" or calls):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        kinds = f"role: {type(role).__name__}, content: {type(content).__name__}"
        raise DataError(f"{where}: role and content must be strings; found the keys {keys} ({kinds})")
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
    # Further keys (tool calls, names) stay for the template; null ones say nothing.
    extra = {key: value for key, value in turn.items() if value is not None and key != "tool_calls"}
    extra |= {"role": role, "content": content if empty or role not in ("system", "user") else _filled(content, where)}
    return _sound(cast(Message, {**extra, "tool_calls": calls} if calls else extra), where)


def _content(value: Any, where: str) -> Any:
    """A turn's content; where it is a list of parts, their texts, which begin a line each."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = (part.get("type") or "text") if isinstance(part, Mapping) else type(part).__name__
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: the content has a part of type {kind!r} that is no text; remove the row")
    return "\n".join(part["text"] for part in value)


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, as transformers' templates want them: most print them through
    `tojson`, which would quote OpenAI's JSON text once more."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], where)}
    if "arguments" not in call:
        return dict(call)
    arguments = _parsed(call["arguments"], where, "the arguments of a tool call") or {}
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: the arguments of a tool call are a {type(arguments).__name__}; expected an object")
    return {**call, "arguments": arguments}
