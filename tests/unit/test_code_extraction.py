"""Finding the program in a model's response."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

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


WRONG = "def f(x):\n    return 0\n"
BODY = "    return sum(x)\n"


def fence(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}```\n"


def right(response: str, *, prompt: str = PROMPT, chat: bool = True) -> bool:
    """Whether the (trusted) program in a response sums up."""
    program = extract_code(response, "f", prompt, chat=chat)
    if program is None:
        return False
    space: dict[str, object] = {"__name__": "solution"}
    try:
        exec(program, space)
        return space["f"]([1, 2]) == 3  # type: ignore[operator]
    except Exception:
        return False


USES = [
    "print(undefined)\n",
    "n = int(input())\nprint(f(n))\n",
    "assert f([1]) == 7\n",
    "import sys\nsys.exit(1)\n",
    "import unittest\n\nclass T(unittest.TestCase):\n    pass\n\nunittest.main()\n",
    "while True:\n    pass\n",
    "while True:\n    line = input()\n    print(f(line))\n",
    "f([1, 2]) -> 3\n",
    "x = f(1, 2, 3)\n",
    "def main():\n    print(f(input()))\n\nmain()\n",
    "for x in 5:\n    print(f(x))\n",
    "with open('missing') as file:\n    print(f(file.read()))\n",
    "print(f([1, 2],\n",
    "'''\nWrite a function\nassert hal",
    "list = [1, 2]\nsum = f(list)\n",
    "import missing_module\n",
    "x: int = undefined\n",
    "1 / 0\n",
    "This sums the items.\n",
]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("use", USES)
def test_what_follows_a_finished_program_does_not_decide(use: str, chat: bool) -> None:
    for response in (f"{WHOLE}\n{use}", fence(f"{WHOLE}\n{use}"), f"Sure:\n```python\n{WHOLE}\n{use}"):
        assert right(response, chat=chat)
        assert right(response, chat=chat, prompt="")
    assert right(f"{BODY}\n\n{use}", chat=chat)


@pytest.mark.parametrize(
    "again",
    [
        WRONG,
        "def f(x):\n    '''Sum.'''\n",
        "def f(x):\n    '''Sum.",
        "from typing import List\n\n\ndef f(x):\n    return None\n",
        "f = lambda x: 0\n",
        "class f:\n    pass\n",
    ],
)
def test_the_first_definition_of_a_base_model_counts(again: str) -> None:
    assert right(f"{BODY}\n\n{again}", chat=False)
    assert right(f"{BODY}\n\n{again}")
    assert right(f"{WHOLE}\n\n{again}", chat=False, prompt="")
    assert right(f"{fence(WHOLE)}Next:\n{fence(again)}", chat=False)


def test_the_last_complete_definition_of_a_chat_model_counts() -> None:
    assert right(fence(WRONG) + "Better:\n" + fence(WHOLE))
    assert not right(fence(WHOLE) + "Worse:\n" + fence(WRONG))
    assert right(fence(f"{WRONG}\n{WHOLE}"))
    assert right(fence(WHOLE) + "Again:\n```python\ndef f(x):\n    total = sum(")
    assert right(fence(WHOLE) + "Again:\n```python\ndef f(x):\n    '''Sum of")
    assert right(fence(WRONG) + f"Again:\n```python\n{WHOLE}")
    assert right(f"{WHOLE}\n\ndef f(x):\n    '''Sum.'''\n")


@pytest.mark.parametrize(
    "program",
    [
        "def f(x):\n    return sum(x) + TABLE[0]\n\nTABLE = [0]\n",
        "TABLE = []\n\ndef f(x):\n    return sum(x) + TABLE[2]\n\nfor i in range(9):\n    TABLE.append(0)\n",
        "TABLE = {}\ndef f(x):\n    return sum(x) + TABLE['a']\nTABLE['a'] = 0\n",
        "TABLE = {}\ndef f(x):\n    return sum(x) + TABLE['a']\nTABLE.update(a=0)\n",
        "def f(x):\n    return sum(x) + TABLE\ndef init():\n    global TABLE\n    TABLE = 0\ninit()\n",
        "T = {}\ndef f(x):\n    return sum(x) + T[0]\ndef one():\n    T[0] = 0\ndef two():\n    one()\ntwo()\n",
        "def f(x):\n    return g(x)\n\ndef g(x):\n    return sum(x)\n",
        "def f(x):\n    return f.add(x)\nf.add = sum\n",
        "def f(x):\n    return K().a(x)\n\n\nclass K:\n    def a(self, x):\n        return add(x)\n\n\nadd = sum\n",
        "import heapq\nh = [3, 0]\ndef f(x):\n    return sum(x) + h[0]\nheapq.heapify(h)\n",
        "def f(x):\n    return 0\ndef fix(g):\n    return lambda x: sum(x)\nf = fix(f)\n",
        "R = {}\ndef f(x):\n    return R[0](x)\n"
        "def put(g):\n    R[0] = g\n    return g\n@put\ndef g(x):\n    return sum(x)\n",
        "try:\n    from missing import f\nexcept ImportError:\n    def f(x):\n        return sum(x)\n",
        "from functools import partial\ndef g(a, x):\n    return sum(x)\nf = partial(g, 1)\n",
        "f = sum\n",
        "f = lambda x: (\n    sum(x)\n)\n",
        "from builtins import sum as f\n",
        "class f:\n    def __new__(cls, x):\n        return sum(x)\n",
        "import functools\n\n\n@functools.cache\n\n# cached\n"
        "def g(x):\n    return x\n\ndef f(x):\n    return sum(map(g, x))\n",
        "import sys\ndef f(x):\n    return sys.getrecursionlimit() - 2344\nsys.setrecursionlimit(2347)\n",
    ],
)
def test_what_a_program_needs_stays(program: str) -> None:
    limit = sys.getrecursionlimit()
    try:
        for response in (program, fence(program), f"```\n{program}"):
            assert right(response)
            assert right(response, prompt="", chat=False)
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    "body",
    [
        "    return sum(\n        x\n)\n",
        "    '''Text\nat the margin\n'''\n    return sum(x)\n",
        "    y = 0\n# comment\n    return sum(x)\n",
        "    y = [\n1,\n2,\n]\n    return sum(x)\n",
        "    return sum(\\\nx)\n",
        "total = 0\nfor v in x:\n    total += v\nreturn total\n",
        "if x:\n    return sum(x)\nelse:\n    return 0\n",
        "  total = 0\n  for v in x:\n    total += v\n  return total\n",
        "   total = 0\n    for v in x:\n        total += v\n    return total\n",
        "    return sum(x)\n    print(",
        "    return sum(x)\n\n    Explanation: this sums.\n",
        "    return g(x)\n\n\ndef g(x):\n    return sum(x)\n",
        "    return sum(x)  # it's\n\nprint(\n",
        "    return sum(x)\r\n\r\n\r\nprint(\r\n",
    ],
)
def test_bodies(body: str) -> None:
    assert right(body, chat=False)
    assert right(body)
    assert right(f"Sure:\n```python\n{body}\n```\nDone.")


@pytest.mark.parametrize(
    "response",
    [
        f"{WHOLE}```\nThis sums.",
        f"{WHOLE.strip()}```",
        f"Sure:\n```python\n{WHOLE.strip()}```\nThis sums.",
        f"Here is the code: ```python\n{WHOLE}```\nUse ```f```.",
        f"Let me\nimport the function and\nclass it as\n\n{WHOLE}\nfrom it you see the sum.",
        "Many words. " * 20_000 + f"\n\n{fence(WHOLE)}",
        f"{WHOLE}\n```\n\nIt's `sum`.\n\n```\n3\n```\n",
        f"{WHOLE}\n```\n\nThen\n```python\ndef g():\n    return 1\n```\n",
        f"```python\n{WHOLE}\n```python\nprint(f(1))\n```\n",
        f"````markdown\n```python\n{WHOLE}```\n````\n",
        f"```python title='a b'\n{WHOLE}```\n",
        "```python\n    def f(x):\n        return sum(x)\n```\n",
        '```python\n"""Module.\n```\nf([1])\n```\n"""\n\n' + f"{WHOLE}```\n",
        '```python\ndef f(x):\n    """Sum.\n    return 0\n```\nFixed:\n'
        '```python\ndef f(x):\n    """Sum."""\n    return sum(x)\n```',
    ],
)
def test_fences(response: str) -> None:
    assert right(response)
    assert right(response, prompt="")


@pytest.mark.parametrize("quote", ['"""', "'''"])
@pytest.mark.parametrize(
    "text",
    ["    ```\n    f([1])\n    ```\n", "    ```python\n    f([1])\n    ```\n", "```\nf([1])\n```\n", "    ~~~\n"],
)
def test_a_fence_in_a_docstring_does_not_end_the_block(text: str, quote: str) -> None:
    code = f"def f(x):\n    {quote}Sum.\n\n{text}    {quote}\n    return sum(x)\n"
    assert right(fence(code) + "\nUse:\n\n" + fence("print(f([1]))\n"))
    assert right(fence(code).strip())


@pytest.mark.parametrize(
    ("helper", "main"),
    [
        ("from math import prod\n", "def f(x):\n    return prod([1]) * sum(x)\n"),
        ("import math\n\ndef g(x):\n    return int(math.fsum(x))\n\nprint(g(0))\n", "def f(x):\n    return g(x)\n"),
        ("K = 0\n", "def f(x):\n    return sum(x) + K\n"),
        ("class N:\n    def __init__(self, v): self.v = v\n", "def f(x):\n    return sum(N(v).v for v in x)\n"),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_helpers_in_other_blocks(helper: str, main: str, chat: bool) -> None:
    assert right("First:\n" + fence(helper) + "Then:\n" + fence(main) + "Output:\n" + fence("3\n", ""), chat=chat)
    assert right(fence(main) + "Helper:\n" + fence(helper) + "Run:\n" + fence("f([1], undefined)\n"), chat=chat)


def test_other_blocks_change_nothing_else() -> None:
    assert right(fence(WHOLE) + fence("sum = f([1, 2])\nprint(sum)\n"))
    assert right(fence(WHOLE) + fence("f = f([1, 2])\n"))
    assert right(fence("pip install numpy\n", "bash") + fence(WHOLE) + fence('{"a": 1}\n', "json"))


def test_a_thought_is_no_answer() -> None:
    assert right(f"<think>\n{fence(WRONG)}</think>\n{WHOLE}")
    assert not right(f"<think>\n{fence(WHOLE)}</think>\n{WRONG}")
    assert extract_code(f"<think>\n{fence(WHOLE)}", "f", PROMPT) is None


@pytest.mark.parametrize(
    "response",
    [
        WRONG,
        fence("def f(x:\n    return sum(x)\n"),
        fence("def f(x):\n    return sum(x)\n    else:\n"),
        fence("def f(x):\nreturn sum(x)\n"),
        fence(f"raise ValueError\n{WHOLE}"),
        fence(f"import missing_module\n{WHOLE}"),
        fence(f"import os,\n{WHOLE}"),
        fence("def g(x):\n    return sum(x)\n"),
        fence("def f(x):\n    return helper(x)\n") + fence("def helpers(x):\n    return sum(x)\n"),
        "    return None\n",
    ],
)
def test_what_is_wrong_stays_wrong(response: str) -> None:
    assert extract_code(response, "f", PROMPT) is not None
    assert not right(response)
    assert not right(response, chat=False)


@pytest.mark.parametrize(
    "unit", ["(", "[", "{0:", "f(", "lambda: ", "not ", "-", "1+", "x.", "x if x else ", "(x for x in "]
)
def test_deep_nesting_crashes_nothing(unit: str) -> None:
    """Also in a thread, whose stack is smaller."""
    with ThreadPoolExecutor(1) as pool:
        for response in (unit * 20_000, f"{WHOLE}\ny = {unit * 20_000}1\n", f"    return {unit * 20_000}"):
            pool.submit(extract_code, response, "f", PROMPT).result()


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
