"""Finding the program in a model's response. Text only: nothing is parsed or run."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.tasks.grading.programs import extract_code

PROMPT = 'from typing import List\n\n\ndef f(x: List[int]) -> int:\n    """Sum."""\n'
WHOLE = "def f(x):\n    return sum(x)\n"


def result(program: str | None) -> object:
    """What `f([1, 2])` of an extracted (trusted) program gives."""
    assert program is not None
    space: dict[str, object] = {}
    exec(program, space)
    return space["f"]([1, 2])  # type: ignore[operator]


@pytest.mark.parametrize(
    "response",
    [
        f"```python\n{WHOLE}```",
        f"Sure, here it is:\n\n```python\n{WHOLE}```\n\nIt sums.",
        f"```\n{WHOLE}```",
        f"~~~py\n{WHOLE}~~~",
        "1. Step:\n   ```python\n   def f(x):\n       return sum(x)\n   ```",
        f"```python\n{WHOLE}",
        f"```python\ndef f(x):\n    return 0\n```\nThat is wrong. Better:\n```python\n{WHOLE}```",
        f"```python\n{WHOLE}```\nUse it so:\n```python\nprint(f([1]))\n```\n```\n3\n```",
        f"```python\nfrom __future__ import annotations\n{WHOLE}```",
        "```python\n    return sum(x)\n```",
        WHOLE,
        f"Here is the function.\n\n{WHOLE}\nThis function sums the items.",
        f"import math\n\n{WHOLE}\nprint(f([1, 2]))",
        'NOTE = """\nAny text.\n"""\n' + WHOLE,
        "    return sum(x)\n",
        "\n    total = 0\n    for item in x:\n        total += item\n\n    return total\n",
        "return sum(x)",
        "total = sum(x)\n    return total\n",
        "    return sum(x)\n\n\ndef g(x):\n    return broken(\n",
        "    return sum(x)\n\nThis sums the items.\n",
        "    return sum(x)\n\nif __name__ == '__main__':\n    exit()\n",
    ],
)
def test_ways_to_answer(response: str) -> None:
    assert result(extract_code(response, "f", PROMPT)) == 3


@pytest.mark.parametrize(
    "response", ["", "   \n\n", "I cannot help with that.", "The answer is the sum.", "```python\n```"]
)
def test_no_code(response: str) -> None:
    assert extract_code(response, "f", PROMPT) is None
    assert extract_code(response, "f") is None


def test_without_prompt() -> None:
    """A program on its own, also with constants in front of the function."""
    assert extract_code("K = 3\ndef f(x):\n    return K", "f") == "K = 3\ndef f(x):\n    return K"
    assert result(extract_code(f"Solution:\n{WHOLE}\n[DONE]\nMore text", "f")) == 3
    assert extract_code("x = 5", "f") == "x = 5"


def test_helpers_of_the_prompt_stay() -> None:
    prompt = "import math\n\ndef helper(x):\n    return math.floor(x)\n\ndef f(x):\n    '''Floor of the first.'''\n"
    assert result(extract_code("```python\ndef f(x):\n    return helper(x[0])\n```", "f", prompt)) == 1


@given(st.text() | st.text(alphabet="`~ \n\tdef(x):=a,#\"'[]"), st.sampled_from(["", PROMPT]))
def test_never_raises(response: str, prompt: str) -> None:
    assert isinstance(extract_code(response, "f", prompt), str | None)


@pytest.mark.parametrize(
    "unit", ["`", "```\n", "```a\n", "a,\n", "a,", "def f\n", "def f(x", " ", "\n", "\t\n", "@", "from a", "x[", "~~~~"]
)
def test_time_is_linear(unit: str) -> None:
    """A million characters take seconds at most; a quadratic search would take hours."""
    start = time.process_time()
    extract_code(unit * (1_000_000 // len(unit)), "f", PROMPT)
    extract_code("def f(x):\n" + unit * (1_000_000 // len(unit)), "f")
    assert time.process_time() - start < 20
