"""Tests for EvalPlus problems (HumanEval+ and MBPP+): typed inputs, and what counts as the same result.

The files hold inputs as JSON, which has neither tuples nor sets. Their types are read off the calls in the problem's
own `assertion`; upstream keeps a list per task. The same holds for the way of comparing, read off the assertion in the
prompt. Only what cannot be read there is listed here.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Sequence
from typing import Any

from headstart.errors import DataError
from headstart.tasks.grading.inside.values import encode

SETS = ("intersection_array", "find_dissimilar", "Diff")  # any order is right, though the prompt compares lists
OTHERWISE = {"are_equivalent": True, "sum_div": 0}  # ambiguous prompts, for which EvalPlus takes this as well
ROOTS = ("find_zero",)
COMPLEX = ("angle_complex", "convert")  # complex numbers are written as strings
NESTED = ("extract_even", "remove_nested")  # tuples to any depth


def plus_tests(entry_point: str, reference: str, inputs: Sequence[Any], atol: float, prompt: str, examples: str) -> str:
    """Test code that compares `entry_point` with the `reference` program on every input.

    `prompt` shows how results are compared, `examples` (the problem's assertions, may be empty) the types of inputs.
    Raises DataError for inputs that are not lists of arguments.
    """
    shapes = _argument_shapes(examples, entry_point)
    typed = []
    for arguments in inputs:
        if not isinstance(arguments, list):
            raise DataError(f"{entry_point}: an input must be a list of arguments, found {type(arguments).__name__}")
        shaped = [
            _typed(value, shapes[place] if place < len(shapes) else None, entry_point)
            for place, value in enumerate(arguments)
        ]
        typed.append(encode(shaped, _refuse))
    return "\n".join(
        (
            # No plain names: one problem of MBPP+ asks for a function `check`.
            "from headstart.tasks.grading.inside.compare import check as __check__",
            "__reference__ = {'__name__': 'reference'}",
            f"exec({reference!r}, __reference__)",
            f"__check__({entry_point}, __reference__[{entry_point!r}], {json.dumps(typed)!r}, {atol!r}, "
            f"{_oracle(entry_point, prompt)!r})",
        )
    )


def patience(entry_point: str) -> int:
    """How many times the usual time limit a problem gets: there are many inputs, and one reference needs 24 s."""
    return 6 if entry_point == "sum_average" else 2


def _oracle(entry_point: str, prompt: str) -> str | list[Any]:
    if entry_point in OTHERWISE:
        return ["or", OTHERWISE[entry_point]]
    if entry_point in ROOTS:
        return "root"
    match _assertion(prompt):
        case ast.Compare(left=ast.Call(func=ast.Name(id="set"))):
            return "set"
        case ast.Call(func=ast.Name(id=name)) | ast.UnaryOp(operand=ast.Call(func=ast.Name(id=name))):
            return "truth" if name == entry_point else "equal"
    return "set" if entry_point in SETS else "equal"


def _assertion(prompt: str) -> ast.expr | None:
    """The condition of the first `assert` line of a prompt."""
    line = next((line.strip() for line in prompt.splitlines() if line.strip().startswith("assert ")), "")
    try:
        statements = parse(line).body
    except SyntaxError:  # an assertion over several lines
        return None
    return statements[0].test if statements and isinstance(statements[0], ast.Assert) else None


def parse(code: str) -> ast.Module:
    """Trusted code of a benchmark. Raises SyntaxError (or ValueError for null bytes)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes such as "\\d" in plain strings
        return ast.parse(code)


class _Shape:
    """Which container stands at a place, and what its items are."""

    def __init__(self, kind: type, items: _Shape | None) -> None:
        self.kind, self.items = kind, items


def _argument_shapes(examples: str, entry_point: str) -> list[_Shape | None]:
    """The shape of each argument, from all calls in the examples together."""
    shapes: list[_Shape | None] = []
    for node in ast.walk(parse(examples)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == entry_point):
            continue
        shapes += [None] * (len(node.args) - len(shapes))
        for place, argument in enumerate(node.args):
            try:
                value = ast.literal_eval(argument)
            except ValueError:  # an expression such as 14 * 14: a number, which needs no shape
                continue
            shapes[place] = _merge(shapes[place], _shape(value))
    return shapes


def _shape(value: Any) -> _Shape | None:
    if not isinstance(value, (list, tuple, set, dict)):
        return None
    items: _Shape | None = None
    for item in value.values() if isinstance(value, dict) else value:
        items = _merge(items, _shape(item))
    return _Shape(type(value), items)


def _merge(one: _Shape | None, other: _Shape | None) -> _Shape | None:
    if one is None or other is None:
        return one or other
    return _Shape(one.kind, _merge(one.items, other.items))


def _typed(value: Any, shape: _Shape | None, entry_point: str) -> Any:
    match value:
        case list():
            items = [_typed(item, shape and shape.items, entry_point) for item in value]
            if entry_point in NESTED or (shape and shape.kind is tuple):
                return tuple(items)
            return set(items) if shape and shape.kind is set else items
        case dict():
            return {key: _typed(item, shape and shape.items, entry_point) for key, item in value.items()}
        case str() if entry_point in COMPLEX:
            number = complex(value)
            return number if number.imag or entry_point == "convert" else number.real
    return value


def _refuse(value: Any) -> int:
    raise DataError(f"an input of a plus problem holds a {type(value).__name__}; expected plain values")
