"""Function calling: the Berkeley Function Calling Leaderboard's single-turn Python categories."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from headstart.errors import DataError, first_line
from headstart.models.hub import download
from headstart.records import Message, PrefixState, Problem, Sampling, Verdict
from headstart.tasks.benchmark import Row
from headstart.tasks.grading.tools import grade_calls, parse_calls
from headstart.tasks.reading import read_rows

HUB_NAME = "gorilla-llm/Berkeley-Function-Calling-Leaderboard"
FILES = {
    "simple": ("BFCL_v4_simple_python.json", "BFCL_v3_simple.json"),
    "multiple": ("BFCL_v4_multiple.json", "BFCL_v3_multiple.json"),
    "parallel": ("BFCL_v4_parallel.json", "BFCL_v3_parallel.json"),
    "parallel_multiple": ("BFCL_v4_parallel_multiple.json", "BFCL_v3_parallel_multiple.json"),
    "irrelevance": ("BFCL_v4_irrelevance.json", "BFCL_v3_irrelevance.json"),
}
"""Question file of every category, the newest first; the answers lie under `possible_answer/` by the same name."""
CATEGORIES = tuple(FILES)
JSON_TYPES: dict[str, str | None] = {"dict": "object", "float": "number", "tuple": "array", "any": None}
"""The benchmark's Python types as JSON Schema types; None stands for no type at all."""
INSTRUCTION = """\
You can call the functions below. Answer only with the calls that the request needs, as a Python list:
[name(parameter=value, other_parameter=value), other_name(parameter=value)]
Use the exact names, name every parameter and write every value as a literal. Leave out optional parameters whose \
default is wanted. If no function fits the request, say so in words and call nothing.

Functions, one JSON object per line:
"""
"""System prompt of the `prompt` style; the functions follow."""


class BfclTask:
    """BFCL v4 (or v3) questions, graded by the calls in the response; fits `interfaces.Task`.

    `data` is a folder with `BFCL_v4_simple_python.json`, ... and `possible_answer/`, or the hub dataset
    `gorilla-llm/Berkeley-Function-Calling-Leaderboard` (version 3: the same questions, `simple_0` for
    `simple_python_0`). `categories` are those of arXiv 2605.27028 by default: simple
    (400) and multiple (200). Ids are the benchmark's own (`simple_python_0`). Prompt: the question alone, the functions
    through the chat template's `tools` (style `template`), or described in a system prompt that asks for Python calls
    (style `prompt`, for templates without a place for tools). Sampling: greedy, 1 sample, 512 tokens.

    Training prompts: a file or hub dataset with a column of conversations and one of tool schemas as JSON, with
    `prompts.source=... prompts.column=conversations prompts.tools_column=tools`.
    """

    name = "bfcl"
    training = ("llamafactory/glaive_toolcall_en (of glaiveai/glaive-function-calling-v2, its tools as JSON)",)
    """Where training prompts for this task come from."""
    samples = 1
    sampling = Sampling(temperature=0.0, top_p=1.0)
    max_tokens = 512

    def __init__(
        self,
        data: str | Path | None,
        *,
        categories: Sequence[str] = ("simple", "multiple"),
        style: Literal["template", "prompt"] = "template",
    ) -> None:
        if data is None:
            raise DataError(
                f"task bfcl needs its data: pass a folder that holds {FILES['simple'][0]}, {FILES['multiple'][0]}, ... "
                f"and possible_answer/, or the hub dataset {HUB_NAME}"
            )
        unknown = [category for category in categories if category not in FILES]
        if unknown or not categories:
            wrong = ", ".join(map(repr, unknown)) or "none"
            raise DataError(f"task bfcl: unknown category {wrong}; choose from {', '.join(CATEGORIES)}")
        self.data = str(data)
        self.categories = tuple(categories)
        self.style = style

    def problems(self) -> Sequence[Problem]:
        """All problems, category by category, in the files' order.

        `meta` holds `category`, `functions` (tool schemas), `expected` (allowed calls) and, in the template style,
        `tools` for the chat template. Raises DataError when a file is missing or a row malformed.
        """
        return self._problems

    def grade(self, problem: Problem, response: str) -> Verdict:
        """Judge one response by its calls; see `grading.tools.grade_calls`."""
        return grade_calls(response, problem.meta["functions"], problem.meta["expected"])

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        """`finished` once all expected calls are complete, `wrong` once one is made where none is due."""
        expected, calls = len(problem.meta["expected"]), len(parse_calls(prefix) or ())
        if calls and calls >= expected:
            return "finished" if expected else "wrong"
        return "unknown"

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        folder = _folder(self.data, self.categories)
        return tuple(problem for category in self.categories for problem in self._read(folder, category))

    def _read(self, folder: Path, category: str) -> list[Problem]:
        path = next((folder / name for name in FILES[category] if (folder / name).is_file()), None)
        if path is None:
            raise DataError(
                f"{folder} holds no {' or '.join(FILES[category])}; check the folder or leave {category} out"
            )
        answers = {} if category == "irrelevance" else _answers(folder / "possible_answer" / path.name)
        problems = []
        for row in _rows(path):
            identity = row.text("id")
            if category != "irrelevance" and identity not in answers:
                raise DataError(f"{row.where}: {identity!r} has no answer in {folder / 'possible_answer' / path.name}")
            meta = {
                "category": category,
                "functions": [_tool(function, row.where) for function in row.get("function", list)],
                "expected": answers.get(identity, []),
            }
            problems.append(self._problem(identity, _question(row), meta))
        return problems

    def _problem(self, identity: str, messages: tuple[Message, ...], meta: dict[str, Any]) -> Problem:
        if self.style == "template":
            meta["tools"] = meta["functions"]
        else:
            described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in meta["functions"])
            messages = _with_system(INSTRUCTION + described, messages)
        return Problem(id=identity, messages=messages, answer=json.dumps(meta["expected"]), meta=meta)


def categories_in(data: str) -> tuple[str, ...]:
    """The categories whose questions lie in the folder `data`; all of them for a hub dataset."""
    folder = _folder(data, CATEGORIES)
    return tuple(c for c, names in FILES.items() if any((folder / name).is_file() for name in names)) or CATEGORIES


def convert_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter schema with Python's type names as JSON Schema, all levels down; other keys stay as they are."""
    converted: dict[str, Any] = {}
    for key, value in schema.items():
        match key, value:
            case "type", str(kind):
                kind_or_none = JSON_TYPES.get(kind, kind)
                converted |= {} if kind_or_none is None else {"type": kind_or_none}
            case "properties", dict(fields):
                converted[key] = {name: convert_schema(field) for name, field in fields.items()}
            case (("items" | "additionalProperties"), dict(inner)):
                converted[key] = convert_schema(inner)
            case _:
                converted[key] = value
    return converted


def _folder(data: str, categories: Sequence[str]) -> Path:
    path = Path(data).expanduser()
    if path.is_dir():
        return path
    if path.exists() or data.startswith((".", "/", "~")) or data.count("/") != 1:
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(f"{data} {problem}; pass the folder with {FILES['simple'][0]}, or the hub dataset {HUB_NAME}")
    # The rows mix types freely, which `datasets` cannot put into a table: the files are fetched as they are.
    names = [name for category in categories for name in FILES[category]]
    try:
        return download(data, [*names, *(f"possible_answer/{name}" for name in names)])
    except Exception as error:  # the hub client raises over a dozen unrelated types
        reason = first_line(error)
        raise DataError(f"cannot load the hub dataset {data!r}: {reason}. Without network pass a folder") from error


def _rows(path: Path) -> Iterator[Row]:
    for number, values in enumerate(read_rows(str(path)), start=1):
        yield Row(values, f"{path}, row {number}", "the files are those of the leaderboard")


def _answers(path: Path) -> dict[str, Any]:
    answers = {}
    for row in _rows(path):
        calls = row.get("ground_truth", list)
        for call in calls:
            if not isinstance(call, dict) or not all(isinstance(allowed, dict) for allowed in call.values()):
                raise DataError(
                    f"{row.where}: every call of ground_truth must be {{function: {{parameter: [values]}}}}"
                )
        answers[row.text("id")] = [_with_lists(call) for call in calls]
    return answers


def _with_lists(call: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: {key: value if isinstance(value, list) else [value] for key, value in allowed.items()}
        for name, allowed in call.items()
    }


def _question(row: Row) -> tuple[Message, ...]:
    match row.values.get("question"):
        case [list(turns)] if turns and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in turns
        ):
            return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
        case _:
            raise DataError(f"{row.where}: question must be one list of messages with role and content")


def _tool(function: Any, where: str) -> dict[str, Any]:
    match function:
        case {"name": str(), "parameters": dict(parameters)} if isinstance(parameters.get("properties"), dict):
            return {"type": "function", "function": {**function, "parameters": convert_schema(parameters)}}
        case _:
            raise DataError(f"{where}: a function needs a name and parameters with properties")


def _with_system(text: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if messages[0]["role"] == "system":
        text, messages = f"{text}\n\n{messages[0]['content']}", messages[1:]
    return {"role": "system", "content": text}, *messages
