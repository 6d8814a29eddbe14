"""How EvalPlus problems are judged: the program against the reference, input by input (arXiv 2305.01210)."""

from __future__ import annotations

import json
import math

from headstart.tasks.grading.inside.values import decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

RELATIVE = 1e-7  # that of numpy's assert_allclose, which EvalPlus uses
ITEM_LIMIT = 1_500_000
DEFAULT_ABSOLUTE = 1e-6  # for results that are floats, where the problem sets no tolerance of its own


def check(
    candidate: Callable[..., Any], reference: Callable[..., Any], inputs: str, atol: float, oracle: str | list[Any]
) -> None:
    """Raise AssertionError at the first input (tagged JSON) for which the two do not agree in the oracle's sense.

    Inputs whose right result has more than ITEM_LIMIT items are left out: 5 of the 40,924 of MBPP+, all of
    problem 255, and none of HumanEval+.
    """

    def refuse(index: int) -> Any:
        raise ValueError("inputs hold plain values only")

    for number, arguments in enumerate(json.loads(inputs)):
        try:
            expected = reference(*decode(arguments, refuse))
        except MemoryError:  # the largest result, 130 million items
            continue
        if _items(expected) > ITEM_LIMIT:
            continue
        # Decoded again: a reference that sorts its argument in place must not sort the candidate's.
        result = candidate(*decode(arguments, refuse))
        if not agrees(result, expected, atol, oracle, arguments):
            raise AssertionError(f"input {number}: {result!r:.80} instead of {expected!r:.80}")


def agrees(result: Any, expected: Any, atol: float, oracle: str | list[Any], arguments: Any) -> bool:
    """Whether a result counts as right.

    Oracles: `equal` (with tolerance for floats), `set` (order and repetitions are free), `truth` (the problem asks for
    a condition, the reference returns a match object), `root` (any root of the polynomial), or `["or", value]`.
    """
    match oracle:
        case "set":
            return bool(set(result) == set(expected))
        case "truth":
            return bool(result) == bool(expected)
        case "root" if isinstance(result, (int, float)):
            coefficients = decode(arguments, int)[0]
            return bool(abs(sum(factor * result**power for power, factor in enumerate(coefficients))) <= atol)
        case ["or", other] if type(result) is type(other) and result == other:
            return True
    if type(result).__name__ != "Remote" and result == expected:
        return True
    return close(result, expected, atol or (DEFAULT_ABSOLUTE if _floats(expected) else 0.0))


def close(result: Any, expected: Any, atol: float) -> bool:
    """Numbers within the tolerance, in sequences item by item; NaN is close to NaN."""
    if atol == 0:
        return False
    if isinstance(expected, (list, tuple)) and isinstance(result, (list, tuple)):
        return len(result) == len(expected) and all(close(a, b, atol) for a, b in zip(result, expected, strict=True))
    if isinstance(expected, (int, float)) and isinstance(result, (int, float)):
        return bool(math.isnan(result) and math.isnan(expected)) or (
            result == expected or abs(result - expected) <= atol + RELATIVE * abs(expected)
        )
    return bool(result == expected)


def _floats(value: Any) -> bool:
    return isinstance(value, float) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, float) for item in value)
    )


def _items(value: Any) -> int:
    """Items of a container and of the containers in it."""
    if not isinstance(value, (list, tuple, set, frozenset, dict)):
        return 0
    return len(value) + sum(len(item) for item in value if isinstance(item, (list, tuple, set, frozenset, dict)))
