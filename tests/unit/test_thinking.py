"""Thinking blocks: what is thought, what is answer, and which tags are only text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.tasks.grading.thinking import answer_part


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a</think>\n\nB", "\n\nB"),
        ("<think>a</think>The B", "The B"),
        ("<think>a\n```python\ncut\n</think>\n```python\nB\n```", "\n```python\nB\n```"),
        ("<think>I'm done</think>It's B", "It's B"),
        ('<think>He said "it is 5".</think>The "B"', 'The "B"'),
        ("Sure!\n<think>\na\n</think>\nB", "Sure!\n\nB"),
        ("B. <think>a</think> C", "B. C"),
        ("A <think>a</think> B", "A  B"),
        ("<think></think>\n\nB", "\n\nB"),
        # cut
        ("<think>a \\boxed{12}", ""),
        ("B\n<think>\na", "B\n"),
        ("<think>a</think>B\n<think>c", "B\n"),
        # opened by the prompt
        ("a\n</think>\nB", "\nB"),
        ("a</think>B", "B"),
        ("a</think>", ""),
        # several and nested
        ("<think>a</think>B\n<think>c</think>D", "B\nD"),
        ("<think>a<think>b</think>c</think>D", "D"),
        ("<think>\n<think>\na</think>B", "B"),
        # other tags
        ("<thinking>a</thinking>B", "B"),
        ("<Think>a</THINK>B", "B"),
        ("[THINK]a[/THINK]B", "B"),
        ("◁think▷a◁/think▷B", "B"),
        ("<seed:think>a</seed:think>B", "B"),
        ("<|begin_of_thought|>a<|end_of_thought|>B", "B"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>B", "B"),
        # a thought about tags
        ('<think>use s.split("</think>")[1]\nso\n</think>\nB', "\nB"),
        ("<think>the `</think>` tag\n</think>B", "B"),
    ],
)
def test_thoughts_are_left_out(response: str, answer: str) -> None:
    assert answer_part(response).strip(" ") == answer.strip(" ")


@pytest.mark.parametrize(
    "response",
    [
        "",
        "plain",
        'return re.sub(r"<think>.*?</think>", "", s)',
        'return s.split("</think>")[-1]',
        "return s.split('</think>')[-1].strip()",
        "if '<think>' in s and \"</think>\" in s:\n    s = s.partition('</think>')[2]",
        'x.replace("<think>", "").replace("</think>", "")',
        "return f'<think>{thought}</think>{answer}'",
        '```python\nP = """\n<think>\n{t}\n</think>\n"""\n```',
        'P = """\n<think>\n{t}\n</think>\n"""\nreturn P',
        "P = '''\n<think>\n'''\nreturn P",
        "    # what follows </think>\n    return s",
        "The `<think>` tag ends with `</think>`.",
        "The <think> tag opens a thought.",
    ],
)
def test_tags_that_are_text_do_not_count(response: str) -> None:
    assert answer_part(response) == response


@given(st.lists(st.sampled_from([*"ab'\"`# \n.", "<think>", "</think>", "```"]), max_size=30).map("".join))
def test_any_text_has_an_answer_part(response: str) -> None:
    assert len(answer_part(response)) <= len(response)


@pytest.mark.parametrize(
    "text",
    ["<think>" * 50_000, "</think>" * 50_000, '"</think>' * 40_000, "\n<think>" * 40_000, "<think" + " " * 300_000,
     "' " * 200_000, "'''" * 100_000, "# " * 200_000, "\n" + " \t" * 150_000, "```\n" * 80_000,
     "<think></think>" * 20_000],
)  # fmt: skip
def test_long_hostile_text_is_read_in_one_pass(text: str) -> None:
    answer_part(text)  # anything quadratic would take minutes
