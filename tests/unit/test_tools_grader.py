"""The parser and the checker of function calls."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headstart.tasks.grading.tools import MAX_CHARACTERS, MAX_DEPTH, Call, grade_calls, parse_calls
from tool_calls import RENDERINGS, glm, llama, python, qwen_xml

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "scale": {"type": "number"},
    "metric": {"type": "boolean"},
    "points": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    "filter": {"type": "object"},
    "free": {},
}


def _tools(*required: str) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": PROPERTIES, "required": list(required)}
    return [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("w.get", "other")]


# ---------------------------------------------------------------- parser


@pytest.mark.parametrize(
    "response",
    [
        '<tool_call>\n{"name": "w.get", "arguments": {"city": "Rome", "days": -2}}\n</tool_call>',
        'I look it up.\n<tool_call>{"name": "w.get", "arguments": {"city": "Rome", "days": -2}}',
        '<think>other(a=1) or <tool_call>?</think>\n{"name": "w.get", "parameters": {"city": "Rome", "days": -2}}',
        '<|python_tag|>{"type": "function", "name": "w.get", "parameters": {"city": "Rome", "days": -2}}',
        '[{"name": "w.get", "arguments": {"city": "Rome", "days": -2}}]',
        '```json\n{"name": "w.get", "arguments": {"city": "Rome", "days": -2}}\n```',
        '{"function": {"name": "w.get", "arguments": "{\\"city\\": \\"Rome\\", \\"days\\": -2}"}}',
        "[w.get(city='Rome', days=-2)]",
        'w.get(\n    city="Rome",\n    days=-2,\n)',
        '```python\n[w.get(city="Ro" "me", days=-2)]\n```',
        "```[w.get(city='Rome', days=-2)]```",
        "<tool_call>w.get(city='Rome', days=-2)</tool_call>",
    ],
)
def test_one_call_is_read_from_every_rendering(response: str) -> None:
    assert parse_calls(response) == (Call("w.get", {"city": "Rome", "days": -2}),)


def test_python_literals() -> None:
    text = "f(a=[1, (2.5, -3)], b={'k': {'n': None}, 2: True}, c='it''s \\d \\n', d=r'\\d', e=+1, g=\"\")"
    expected = {"a": [1, [2.5, -3]], "b": {"k": {"n": None}, 2: True}, "c": "its \\d \n", "d": "\\d", "e": 1, "g": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_calls(text.replace("d=r'\\d', ", "")) == (
            Call("f", {key: value for key, value in expected.items() if key != "d"}),
        )
    assert parse_calls("f(d=r'\\d')") == (Call("f", {"d": "\\d"}),)


@pytest.mark.parametrize("separator", ["; ", "\n", ", ", " "])
def test_several_json_calls(separator: str) -> None:
    found = parse_calls(separator.join(['{"name": "f", "parameters": {}}', '{"name": "g", "parameters": {"a": []}}']))
    assert found == (Call("f", {}), Call("g", {"a": []}))


@pytest.mark.parametrize(
    "response",
    [
        "", "[]", "I cannot help with that.", "Use f(a=1) for this.", "The answer is [1, 2].", "42", "null", '"f(a=1)"',
        '{"name": "Ada"}', '{"name": "f", "arguments": [1]}', '{"name": 1, "arguments": {}}', "[f(a=1), 2]", "[f(a=1)",
        '{"name": "f", "arguments": {"a": 1, "a": 2}}', "f(a=1, a=2)", "(lambda: 1)()", "f()()", "x = f(a=1)",
        "<think>[f(a=1)]</think>", "<think>\n[f(a=1)]", "[f(a=1)] calls f", "f(a=1)\n\nExplanation",
    ],
)  # fmt: skip
def test_other_text_calls_nothing(response: str) -> None:
    assert parse_calls(response) == ()


@pytest.mark.parametrize("block", ["", "{", "f", '{"name": "f"}', '{"name": "f", "arguments": {', "[1]"])
def test_a_broken_block_spoils_the_answer(block: str) -> None:
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse_calls(good) == (Call("f", {}),)
    assert parse_calls(f"{good}<tool_call>{block}</tool_call>") is None


@pytest.mark.parametrize("value", ["x", "1 + 1", "g(1)", "f'{1}'", "{1, 2}", "b'x'", "...", "1j", "[*'ab']", "{**{}}"])
def test_what_is_not_a_literal_is_a_call_that_matches_nothing(value: str) -> None:
    calls = parse_calls(f"[w.get(free={value})]")
    assert calls is not None
    assert [call.name for call in calls] == ["w.get"]
    options = ["x", 2, value, "g(1)", "1", [1, 2], "ab", ["a", "b"], {}, None]
    assert not grade_calls(f"[w.get(free={value})]", _tools(), [{"w.get": {"free": options}}]).correct


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    attack = f"open({str(trace)!r}, 'w').write('x')"
    responses = [f"[f(a={attack})]", f"[{attack}]", attack, f"<tool_call>{attack}</tool_call>"]
    responses += [f"[f(a=__import__('os').system('touch {trace}'))]", f"[f(a=[{attack} for i in [1]])]"]
    for response in responses:
        parse_calls(response)
        assert not grade_calls(response, _tools(), [{"w.get": {"city": ["x"]}}]).correct
    assert not trace.exists()


NOTE = "end </tool_call> with </think> or <think>\n<tool_call>"


@pytest.mark.parametrize(
    "note", [NOTE, NOTE.replace("\n", " "), "</tool_call>", "<tool_call>", "[/THINK] ok", '{"a": "</think> b"}']
)
@pytest.mark.parametrize(
    "before", ["", "<think>\nhm\n</think>\n", "a draft </think>", "<think>[w.get(days=9)]</think>\n\n"]
)
def test_a_tag_inside_an_argument_cuts_nothing(note: str, before: str) -> None:
    calls = [("w.get", {"city": note, "days": 3}), ("other", {"days": 1})]
    expected = tuple(Call(*call) for call in calls)
    for rendering in (*RENDERINGS, qwen_xml, glm):
        assert parse_calls(before + rendering(calls), _tools()) == expected


DRAFT = '<tool_call>\n{"name": "f", "arguments": {"note": "not </think> yet"}}\n</tool_call>'
XML_DRAFT = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
FINAL = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("draft", [DRAFT, XML_DRAFT, '{"name": "f", "arguments": {}}', "[f(a=1)]"])
@pytest.mark.parametrize(
    ("frame", "called"),
    [
        ("<think>\nDRAFT\n</think>\nNo.", ()),
        ("<think>\nDRAFT", ()),
        ("Hm. <think>DRAFT", ()),
        ("DRAFT\n</think>\n\nNo.", ()),
        ("<think>\nDRAFT\n</think>\n" + FINAL, ("g",)),
        ("DRAFT</think>" + FINAL, ("g",)),
        ("[THINK]DRAFT[/THINK]So: " + FINAL, ("g",)),
        ("<think>DRAFT</think>g()", ("g",)),
        (FINAL + "\n<think>\nDRAFT\n</think>", ("g",)),
        (FINAL + " <think>DRAFT", ("g",)),
    ],
)
def test_a_draft_in_a_thought_is_no_call(frame: str, called: tuple[str, ...], draft: str) -> None:
    calls = parse_calls(frame.replace("DRAFT", draft))
    assert calls is not None
    assert tuple(call.name for call in calls) == called


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<function=w.get>\n<parameter=days>\n3\n</parameter>\n</function>", {"days": 3}),
        ("<function=w.get>\n</function>", {}),
        ('<function=w.get>{"days": 3}</function>', {"days": 3}),
        ("<tool_call>\n<function=w.get><parameter=days>3</parameter></function>", {"days": 3}),
        ("<tool_call>w.get\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>", {"days": 3}),
        ('[TOOL_CALLS][{"name": "w.get", "arguments": {"city": "[TOOL_CALLS]"}, "id": "a"}]', {"city": "[TOOL_CALLS]"}),
        ('I look.[TOOL_CALLS]w.get[CALL_ID]a1b[ARGS]{"days": 3}', {"days": 3}),
        ("<|tool_call_start|>[w.get(days=3)]<|tool_call_end|>", {"days": 3}),
    ],
)
def test_the_syntax_of_other_templates(response: str, expected: dict[str, Any]) -> None:
    assert parse_calls(response, _tools()) == (Call("w.get", expected),)


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("city", "3", "3"),
        ("city", "true", "true"),
        ("city", '{"a": 1}', '{"a": 1}'),
        ("city", "\n  if x:\n    y()\n", "\n  if x:\n    y()\n"),
        ("city", "a </parameter> b\n</function> c </tool_call>\n", "a </parameter> b\n</function> c </tool_call>\n"),
        ("city", "", ""),
        ("city", "<arg_key>a</arg_key>\n<arg_value>b</arg_value>", "<arg_key>a</arg_key>\n<arg_value>b</arg_value>"),
        ("city", "<function=f>\n<parameter=a>", "<function=f>\n<parameter=a>"),
        ("days", "3", 3),
        ("days", " 3 ", 3),
        ("days", "three", "three"),
        ("scale", "1e3", 1000.0),
        ("metric", "True", True),
        ("metric", "false", False),
        ("points", "[[1, 2]]", [[1, 2]]),
        ("points", "[(1, 2)]", [(1, 2)]),
        ("filter", '{"a": "\\u00e9"}', {"a": "é"}),
        ("filter", "{'a': None}", {"a": None}),
        ("free", "5", 5),
        ("free", "five", "five"),
        ("free", "__import__('os')", "__import__('os')"),
        ("unknown", "5", 5),
    ],
)
def test_values_without_quotes_have_the_type_of_their_schema(key: str, written: str, value: Any) -> None:
    calls = parse_calls(qwen_xml([("w.get", {key: written}), ("other", {"days": 2})]), _tools())
    assert calls == (Call("w.get", {key: value}), Call("other", {"days": 2}))
    assert calls is not None
    assert type(calls[0].arguments[key]) is type(value)


@pytest.mark.parametrize(
    "block",
    [
        "<function=f>", "<function=f><parameter=a>1</function>", "<function=f>words</function>",
        "f<arg_key>a</arg_key>", "<function=f></function> and",
        "<function=f><parameter=a>1</parameter><parameter=a>2</parameter></function>",
    ],
)  # fmt: skip
def test_broken_elements_are_no_calls(block: str) -> None:
    assert parse_calls(f"<tool_call>{block}</tool_call>") is None
    assert parse_calls(block) == ()


@pytest.mark.parametrize("response", ['Result {"a": 1}', 'Answer\n```json\n{"a": 1}\n```', "Use <tool> f", "a[1] </b>"])
def test_prose_with_json_or_tags_calls_nothing(response: str) -> None:
    assert parse_calls(response) == ()


# ---------------------------------------------------------------- checker


@pytest.mark.parametrize(
    ("arguments", "allowed", "correct"),
    [
        ({"city": "new york, NY."}, {"city": ["New York NY"]}, True),
        ({"city": "it's"}, {"city": ['it"s']}, True),
        ({"city": "York"}, {"city": ["New York"]}, False),
        ({"city": 5}, {"city": ["5"]}, False),
        ({"city": ""}, {"city": ["a", ""]}, True),
        ({"days": 5}, {"days": [4, 5]}, True),
        ({"days": 5.0}, {"days": [5]}, False),
        ({"days": True}, {"days": [1]}, False),
        ({"days": ""}, {"days": [5, ""]}, False),
        ({"days": "5"}, {"days": [5]}, False),
        ({"scale": 5}, {"scale": [5.0]}, True),
        ({"scale": float("nan")}, {"scale": [5.0]}, False),
        ({"metric": 1}, {"metric": [True]}, False),
        ({"metric": True}, {"metric": [True]}, True),
        ({"metric": "true"}, {"metric": [True]}, False),
        ({"points": [(1, 2), [3, 4]]}, {"points": [[[1, 2], [3, 4]]]}, True),
        ({"points": [[1, 2.0]]}, {"points": [[[1, 2]]]}, False),
        ({"points": [[1, 2], [3, 4]]}, {"points": [[[3, 4], [1, 2]]]}, False),
        ({"points": [[1]]}, {"points": [[[1, 1]]]}, False),
        ({"filter": {"age": 3}}, {"filter": [{"age": [3, 4], "name": ["x", ""]}]}, True),
        ({"filter": {"age": 3, "name": "X"}}, {"filter": [{"age": [3, 4], "name": ["x", ""]}]}, True),
        ({"filter": {"name": "x"}}, {"filter": [{"age": [3, 4], "name": ["x", ""]}]}, False),
        ({"filter": {"age": 3, "more": 1}}, {"filter": [{"age": [3]}]}, False),
        ({"free": [{"f": "A"}]}, {"free": [[{"f": ["a"]}]]}, True),
        ({"free": None}, {"free": [None]}, True),
        ({"scale": None}, {"scale": [None]}, True),  # the reference breaks its own schema: it decides
        ({}, {"city": ["a", ""]}, True),
        ({}, {"city": ["a"]}, False),
        ({"city": "a"}, {}, False),
        ({"city": "a", "unknown": 1}, {"city": ["a"], "unknown": ["", 1]}, False),
        ({"city": "a"}, {"city": ["a"], "unknown": [1]}, True),
    ],
)
def test_values(arguments: dict[str, Any], allowed: dict[str, Any], correct: bool) -> None:
    verdict = grade_calls(python([("w.get", arguments)]).replace("nan", "1e999"), _tools(), [{"w.get": allowed}])
    assert verdict.correct == correct
    assert verdict.status == ("correct" if correct else "wrong")
    assert verdict.details == {"parsed": True, "right_function": True}


def test_required_parameters_and_names() -> None:
    expected = [{"w.get": {"city": ["a", ""]}}]
    assert grade_calls("w.get()", _tools(), expected).correct
    assert not grade_calls("w.get()", _tools("city"), expected).correct
    for name in ("w.Get", "w_get", "get", "other"):
        verdict = grade_calls(f"{name}(city='a')", _tools("city"), expected)
        assert (verdict.status, verdict.details["right_function"]) == ("wrong", False)
    for positional in ("w.get('a')", "w.get(*'a')", "w.get(**{'city': 'a'})"):
        assert grade_calls(positional, _tools("city"), expected).status == "wrong"


def test_parallel_calls_are_paired_in_any_order_even_where_the_first_fit_is_the_wrong_one() -> None:
    tools, expected = _tools(), [{"w.get": {"city": ["a", "b"]}}, {"w.get": {"city": ["a"]}}, {"other": {"days": [1]}}]
    a, b, c = (("w.get", {"city": "a"}), ("w.get", {"city": "b"}), ("other", {"days": 1}))
    for order in ([a, b, c], [c, b, a], [b, c, a]):
        assert grade_calls(python(order), tools, expected).correct
    for order in ([a, b], [a, b, c, c], [a, b, b], [b, b, c], []):
        assert not grade_calls(python(order), tools, expected).correct


def test_statuses() -> None:
    expected = [{"w.get": {"city": ["a"]}}]
    assert grade_calls("I cannot do that.", _tools(), expected).status == "no_answer"
    assert grade_calls("<tool_call>{", _tools(), expected).status == "no_answer"
    assert grade_calls("I cannot do that.", _tools(), []).status == "correct"
    assert grade_calls("", _tools(), []).correct
    for attempt in ("w.get(city='a')", "unheard_of()", "w.get(city=x)", "<tool_call>{", llama([("f", {})])):
        assert grade_calls(attempt, _tools(), []).status == "wrong"


# ---------------------------------------------------------------- hostile text

PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<think>", "</think>", "```", "```json\n", "<|python_tag|>"),
        *("[", "]", "(", ")", "{", "}", ",", ":", ";", "=", "*", "-", "'", '"', "\\", "\n", "\x00", "\ud800", "é"),
        *("f", "w.get", "city", '"name"', '"arguments"', "1", "1e999", "None", "lambda ", " if ", " for x in "),
        *('{"name": "f", "arguments": {"a": 1}}', "f(a=1)"),
    ]
)


@given(st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=80))
@example("[f(a=" + "9" * 5000 + ")]")
@example('{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}")
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_grading_never_raises(response: str) -> None:
    for expected in ([], [{"w.get": {"city": ["a"]}}], [{"w.get": {}}, {"other": {"days": [1, ""]}}]):
        verdict = grade_calls(response, _tools(), expected)
        assert verdict.correct == (verdict.status == "correct")


HOSTILE = (
    *(unit * 200_000 for unit in ("(", "[", "{", "<tool_call>", "<think>", "```", '"', "\\", "[f(a=1),", "9", "f")),
    *(
        "[f(a=" + unit * 10_000
        for unit in ("(", "[", "-", "{1:", "not ", "lambda:", "2**", "1 if 1 else ", "'\\", "a.")
    ),
    *("[f(a=" + unit * (MAX_DEPTH - 1) + "1" + end for unit in "([{" for end in ("", ")" * 99, "]" * 99)),
    "[f(a=" + "-" * 5000 + "1)]",
    "f" + "()" * 30_000,
    "[" + "f(a=1)," * 9_000 + "]",
    '{"name": "f", "arguments": ' + '{"a":' * 30_000,
    '{"name": "f", "arguments": {"a": ' + "[" * 30_000 + "]" * 30_000 + "}}",
    json.dumps({"name": "w.get", "arguments": {"city": "x" * 2_000_000}}),
    '{"name": "f", "arguments": "' * 10_000,
    *(
        unit * 50_000
        for unit in ("</think>[f(", '</think>["', "<tool_call><function=f>", "<tool_call>f<arg_key>", "[ARGS]{")
    ),
    '<tool_call>f(a="' * 20_000,
    "<function=f>" + "<parameter=a>x</parameter>" * 2_000 + "y</function>",
    "<tool_call><function=f>" + ("</function>" + " " * 50) * 1_000,
)


@pytest.mark.parametrize("response", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_hostile_text_is_read_in_one_pass(response: str) -> None:
    # The slowest takes half a second; anything quadratic would take minutes here, deep recursion would crash.
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(grade_calls, response, _tools(), [{"w.get": {"city": ["x"]}}]).result()
    assert not verdict.correct


def test_the_bounds_leave_room() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH - 3):
        value = [value]
    calls = [("w.get", {"free": value, "city": "x" * (MAX_CHARACTERS - 500)})]
    expected = [{name: {key: [option] for key, option in arguments.items()}} for name, arguments in calls]
    for rendering in RENDERINGS:
        assert grade_calls(rendering(calls), _tools(), expected).correct
