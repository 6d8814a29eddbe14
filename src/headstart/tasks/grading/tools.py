r"""Function calls in a response: a parser that evaluates nothing, and a checker against allowed values.

Blocks are read anywhere in the answer: `<tool_call>` (JSON in Qwen and Hermes, `<function=name>` in Qwen3-Coder and
Qwen 3.5, `<arg_key>` in GLM), `<|tool_call_start|>` (LFM) and `[TOOL_CALLS]` (Mistral). Without blocks the whole answer
is JSON (Llama: `{"name": ..., "parameters" or "arguments": ...}`, one or several), Python (`[f(a=1), g.h(b="x")]`) or
`<function=name>`; prose around those means that nothing was called, as on the public leaderboard. Thoughts and a code
fence around the answer do not count. Pure, bounded in time, and never raising.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from headstart.records import Verdict
from headstart.tasks.grading.thinking import answer_part

MAX_CHARACTERS = 65_536
"""Longer calls are not read: 512 tokens are about 2,000 characters, and a parser's memory grows with its input."""
MAX_DEPTH = 32
"""Deeper nesting is not read: the benchmarks need 6, and parsers meet hundreds of levels with recursion."""

MAX_TRIES = 32
"""Blocks and answers that cannot be read before a response is given up: one costs up to a tenth of a second."""

_OPEN = r"<tool_call>|<\|tool_call_start\|>|\[TOOL_CALLS\]"
_EDGE = re.compile(rf"(?P<open>{_OPEN})|</tool_call>|<\|tool_call_end\|>")
_TAG = re.compile(r"<(/?)[\w:]+>|\[(/?)\w+\]|◁(/?)\w+▷")
_READ = re.compile("\0(\\d+)\0")
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>(?=\s*(?:<function=|\Z))", re.DOTALL)
_ARGUMENT = re.compile(
    r"\s*<(?:parameter=|arg_key>)([^<>]+)(?:>\n?|</arg_key>\s*<arg_value>)(.*?)(?:\n?</parameter>|</arg_value>)"
    r"(?=\s*(?:<parameter=|<arg_key>|\Z))",
    re.DOTALL,
)
_NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(?={)")
_without_thought = lru_cache(answer_part)
_BRACKET = re.compile(r"[\[\](){}]")
_BETWEEN = re.compile(r"[\s;,]*")
_FENCE = re.compile(r"```(?:[a-z_]*\s)?(.*)```", re.DOTALL)
_LOOSE = re.compile(r"[ ,./\-_*^]")
_NAME = re.compile(r"[\w.]+")
_CALL_START = re.compile(r"[\[(\s]*[^\W\d][\w.]*\s*\(")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_RAW_STRING = re.compile(r"\b[rR][\"']")
_VALID_ESCAPES = frozenset("\n\\'\"abfnrtvxNuU01234567")
_UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)
_TYPES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": int | float,
    "array": list,
    "object": dict,
}
_NOT_LITERAL = object()
"""The value of an argument that is no literal, such as `x + 1`: equal to nothing."""


@dataclass(frozen=True, slots=True)
class Call:
    """One function call. A positional argument has the key `*0`, `*1`, ..., which no schema knows."""

    name: str
    arguments: Mapping[str, Any]


def grade_calls(
    response: str, tools: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Mapping[str, Sequence[Any]]]]
) -> Verdict:
    """Compare the calls of `response` with `expected`, in any order; with nothing expected, no call is correct.

    `tools` are `{"type": "function", "function": {"name", "parameters"}}` with JSON Schema types. `expected` holds for
    every call `{function: {parameter: [allowed values]}}`; `""` among them means that the parameter may be left out,
    and an object's fields have lists of allowed values again. Names are exact, required parameters present, unknown
    ones refused, types as in the schema (an integer passes as a number, never the other way round), strings compared
    in lower case without ` ,./-_*^`. Status is `correct`, `wrong` or `no_answer` (no readable call where one is due).
    Details: `parsed`, whether a call was read, and `right_function`, whether the functions called are the right ones.
    Source of the rules: the abstract-syntax-tree check of the Berkeley Function Calling Leaderboard.
    """
    calls = parse_calls(response, tools)
    names = Counter(call.name for call in calls or ())
    right = calls is not None and names == Counter(name for reference in expected for name in reference)
    details = {"parsed": bool(calls), "right_function": right}
    if expected and not calls:
        return Verdict(correct=False, status="no_answer", details=details)
    correct = right and _all_matched(calls or (), expected, _schemas(tools))
    return Verdict(correct=correct, status="correct" if correct else "wrong", details=details)


def parse_calls(response: str, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[Call, ...] | None:
    """The calls of a response in their order; `()` when it makes none, None when a call block cannot be read.

    `tools`, as for `grade_calls`, give the types of arguments that are written without quotes.
    """
    schemas = _schemas(tools)
    # A closing tag ends a thought or stands in an argument: what follows is the answer if all of it reads as calls.
    ends = [tag.end() for tag in _TAG.finditer(response) if any(tag.groups()) and not _without_thought(tag[0])]
    for start in (0, *ends[-MAX_TRIES:]):
        if len(response) - start <= MAX_CHARACTERS and (calls := _read(response[start:], schemas)):
            return calls
    marked, blocks = _blocks(response.replace("\0", " "), schemas)
    # What tags are left are the response's own, wherever they stand in a line.
    answer = answer_part(_TAG.sub(lambda tag: tag[0] if _without_thought(tag[0]) else f"\n{tag[0]} ", marked))
    if re.search(_OPEN, answer):
        return None
    numbers = [int(number) for number in _READ.findall(answer)]
    return tuple(call for number in numbers for call in blocks[number]) if numbers else _read(answer, schemas) or ()


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}


def _blocks(text: str, schemas: Mapping[str, Any]) -> tuple[str, list[tuple[Call, ...]]]:
    """`text` with a number in place of every block that can be read, and the calls of each.

    A block ends where all of it reads as calls, not at the first closing tag: that may stand inside an argument.
    """
    blocks: list[tuple[Call, ...]] = []
    edges, pieces, place, tries = [*_EDGE.finditer(text)], [], 0, 0
    for number, opening in enumerate(edges):
        if not opening["open"] or opening.start() < place:
            continue
        for edge in (*edges[number + 1 : number + 9], None):
            end = len(text) if edge is None else edge.start()
            if tries == MAX_TRIES or end - opening.end() > MAX_CHARACTERS:
                break
            if calls := _read(text[opening.end() : end], schemas):
                pieces += [text[place : opening.start()], f"\0{len(blocks)}\0"]
                place = end if edge is None or edge["open"] else edge.end()
                blocks.append(calls)
                break
            tries += 1
    return "".join([*pieces, text[place:]]), blocks


def _read(text: str, schemas: Mapping[str, Any]) -> tuple[Call, ...] | None:
    text = text.strip().removeprefix("<|python_tag|>").strip()
    fenced = _FENCE.fullmatch(text)
    text = text if fenced is None else fenced[1].strip()
    if not text or len(text) > MAX_CHARACTERS or _depth(text) > MAX_DEPTH:
        return None
    for reader in (_json_calls, _python_calls, partial(_tagged_calls, schemas)):
        try:
            return reader(text)
        except _UNREADABLE:
            continue
    return None


def _depth(text: str) -> int:
    """The deepest nesting of brackets; those inside strings count too, which only makes the bound stricter."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def _json_calls(text: str) -> tuple[Call, ...]:
    values: list[Any] = []
    place = 0
    while place < len(text):
        head = _NAMED.match(text, place)
        value, place = _DECODER.raw_decode(text, head.end() if head else place)
        values += [{"name": head[1], "arguments": value}] if head else value if isinstance(value, list) else [value]
        separator = _BETWEEN.match(text, place)
        place = place if separator is None else separator.end()
    return tuple(_json_call(value) for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is repeated")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _json_call(value: Any) -> Call:
    match value:
        case {"function": dict(inner)}:
            return _json_call(inner)
        case {"name": str(name), "arguments": arguments} | {"name": str(name), "parameters": arguments}:
            # Some models write the arguments as a string that holds JSON, as the OpenAI interface does.
            arguments = _DECODER.decode(arguments) if isinstance(arguments, str) else arguments
            if isinstance(arguments, dict):
                return Call(name, arguments)
    raise ValueError("not a call")


def _tagged_calls(schemas: Mapping[str, Any], text: str) -> tuple[Call, ...]:
    """`<function=name>` elements, or a name in front of `<arg_key>` pairs."""
    head, mark, pairs = text.partition("<arg_key>")
    calls = []
    for name, body in _elements(_FUNCTION, text) if not mark or "<" in head else [(head.strip(), mark + pairs)]:
        known = schemas.get(name, {}).get("properties", {})
        if body.lstrip().startswith("{"):  # Llama 3.1
            calls.append(_json_call({"name": name, "arguments": body}))
        else:
            given = [(key, _typed(value, known.get(key, {}))) for key, value in _elements(_ARGUMENT, body.rstrip())]
            calls.append(Call(name, _unique(given)))
    return tuple(calls)


def _elements(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """The two groups of every element; ValueError where there is something else."""
    place = 0
    while place < len(text):
        element = pattern.match(text, place)
        if element is None:
            raise ValueError("not a call")
        yield element[1], element[2]
        place = element.end()


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """What was written without quotes as a value of the schema's type; what cannot be one stays text."""
    kind = schema.get("type")
    if "string" not in (kind if isinstance(kind, list) else [kind]):
        for read, value in ((_DECODER.decode, text), (ast.literal_eval, _sound_escapes(text.strip()))):
            with suppress(*_UNREADABLE):
                return read(value)
    return text


def _python_calls(text: str) -> tuple[Call, ...]:
    if not _CALL_START.match(text):
        raise ValueError("not a call")  # most responses are prose, which need not be parsed to know it
    body = ast.parse(_sound_escapes(text), mode="eval").body
    nodes = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
    return tuple(_python_call(node) for node in nodes)


def _sound_escapes(text: str) -> str:
    r"""Double the backslash of escapes such as `\d`: the same value, without the warning that `ast.parse` would give.

    A warning can only be silenced for the whole process, and graders run in threads.
    """
    if _RAW_STRING.search(text):
        return text
    return _ESCAPE.sub(lambda escape: escape[0] if escape[1] in _VALID_ESCAPES else "\\" + escape[0], text)


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise ValueError("not a call")
    pairs = [(f"*{place}", _literal(value)) for place, value in enumerate(node.args)]
    pairs += [(keyword.arg or "**", _literal(keyword.value)) for keyword in node.keywords]
    name = ast.unparse(node.func)
    if not _NAME.fullmatch(name):
        raise ValueError("not the name of a function")
    return Call(name, _unique(pairs))


def _literal(node: ast.expr | None) -> Any:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.UnaryOp(op=ast.UAdd(), operand=ast.Constant(value=int() | float() as number)):
            return +number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {_literal(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case _:
            return _NOT_LITERAL


def _all_matched(
    calls: Sequence[Call], expected: Sequence[Mapping[str, Mapping[str, Sequence[Any]]]], schemas: Mapping[str, Any]
) -> bool:
    """Whether calls and references can be paired one to one (augmenting paths: taking the first fit can miss it)."""
    fits = [
        [place for place, call in enumerate(calls) if _matches(call, *pair, schemas.get(pair[0], {}))]
        for reference in expected
        for pair in reference.items()
    ]
    owner: dict[int, int] = {}

    def settle(reference: int, tried: set[int]) -> bool:
        for place in fits[reference]:
            if place in tried:
                continue
            tried.add(place)
            if place not in owner or settle(owner[place], tried):
                owner[place] = reference
                return True
        return False

    return len(fits) == len(calls) and all(settle(reference, set()) for reference in range(len(fits)))


def _matches(call: Call, name: str, allowed: Mapping[str, Sequence[Any]], schema: Mapping[str, Any]) -> bool:
    properties: Mapping[str, Any] = schema.get("properties", {})
    given = call.arguments
    if call.name != name or any(key not in properties or key not in allowed for key in given):
        return False
    if any(key not in given for key in schema.get("required", ())):
        return False
    # A parameter that the schema does not know could not be given: some references list one.
    return all(_accepts(given, key, allowed[key], properties[key]) for key in allowed if key in properties)


def _accepts(given: Mapping[str, Any], key: str, options: Sequence[Any], schema: Mapping[str, Any]) -> bool:
    if key not in given:
        return "" in options
    value = given[key]
    # "" stands for "left out"; it is a value only where a string is.
    values = [option for option in options if option != "" or schema.get("type", "string") == "string"]
    # A few references break their own schema (True for a string): there the reference decides.
    return any(_same(value, option) and (_fits(value, schema) or not _fits(option, schema)) for option in values)


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value has the type of its schema; an unknown or missing type accepts everything."""
    kind = schema.get("type")
    if not isinstance(kind, str) or kind not in _TYPES:
        return True
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    return kind != "array" or all(_fits(item, schema.get("items", {})) for item in value)


def _same(value: Any, option: Any) -> bool:
    match option:
        case None | bool():
            return value is option
        case int() | float():
            return isinstance(value, int | float) and not isinstance(value, bool) and value == option
        case str():
            return isinstance(value, str) and _loose(value) == _loose(option)
        case list():
            return (
                isinstance(value, list)
                and len(value) == len(option)
                and all(_same(item, other) for item, other in zip(value, option, strict=True))
            )
        case dict():
            return (
                isinstance(value, dict)
                and value.keys() <= option.keys()
                and all(_accepts(value, key, options, {}) for key, options in option.items())
            )
        case _:
            return False


def _loose(text: str) -> str:
    return _LOOSE.sub("", text).lower().replace("'", '"')
