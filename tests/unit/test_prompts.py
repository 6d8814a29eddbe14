import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.config.schema import PromptsConfig
from headstart.errors import DataError
from headstart.tasks.prompts import load_problems
from headstart.tasks.reading import _line_rows, read_rows, stem
from real_tokenizers import real_data

ROWS = [{"prompt": "2+2?", "answer": "4"}, {"prompt": "3\u20283?", "answer": "9"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def _parquet(path: Path, rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


def test_every_file_form_gives_the_same_rows(tmp_path: Path) -> None:
    forms = {
        "a.jsonl": LINES.encode(),
        "b.json": LINES.encode(),
        "c.json": json.dumps(ROWS, indent=2).encode(),
        "d.jsonl": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode(),
        "e.parquet": _parquet(tmp_path / "made", ROWS),
    }
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / (name + ".gz")).write_bytes(gzip.compress(data))
        assert read_rows(str(tmp_path / name)) == ROWS, name
        assert read_rows(str(tmp_path / (name + ".gz"))) == ROWS, name


@given(st.lists(st.dictionaries(st.text(), st.none() | st.text() | st.integers() | st.lists(st.text())), max_size=5))
def test_json_lines_round_trip(rows: list[dict[str, Any]]) -> None:
    for ascii_only in (True, False):
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        assert _line_rows(Path("x.jsonl"), text) == rows


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt": \n', "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n["x"]\n', "a.jsonl, line 2: expected a JSON object .* found list"),
        ("a.json", b'[{"prompt": "x"}, "y"]', "array item 2: expected a JSON object .* found str"),
        ("a.json", b'[{"prompt": "x"},\n]', "not a valid JSON array .*line 2"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}', "line 2: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "cannot be read"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet"),
        ("a.txt", b"x", "unknown file type '.txt'; expected .jsonl"),
    ],
)
def test_damaged_files_are_named_with_their_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


def test_missing_files_point_to_the_likely_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    with pytest.raises(DataError, match=r"train\.jsonl does not exist; did you mean .*train\.jsonl\.gz\?"):
        read_rows(str(tmp_path / "train.jsonl"))
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl\.gz\?"):
        read_rows(str(tmp_path / "trian.jsonl.gz"))
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist either"):
        read_rows(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(DataError, match=r"train does not exist; did you mean .*train\.jsonl\.gz\?"):
        read_rows(str(tmp_path / "train"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_rows(str(tmp_path / "folder.json"))


def test_hub_settings_are_not_ignored_for_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    with pytest.raises(DataError, match="split='test'"):
        read_rows(str(tmp_path / "a.jsonl"), split="test")


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load(name: str, subset: str | None, *, split: str) -> Any:
        calls.append((name, subset, split))
        if name == "some/absent":
            raise ConnectionError("Couldn't reach the hub\nmore lines")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("some/set", subset="main", split="test") == ROWS
    assert calls == [("some/set", "main", "test")]
    with pytest.raises(DataError, match=r"cannot load .*some/absent.*reach the hub\. .*pass a file instead: \.jsonl"):
        read_rows("some/absent")


def test_stem() -> None:
    names = ["data/train.jsonl.gz", "openai/gsm8k", "x.parquet", ".jsonl"]
    assert [stem(name) for name in names] == ["train", "gsm8k", "x", ".jsonl"]


def _problems(folder: Path, rows: list[Any], **settings: Any) -> Any:
    path = folder / "asked.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return load_problems(PromptsConfig(source=str(path), **settings))


def test_strings_become_user_messages_or_text(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "n": 4}, {"prompt": "b", "n": 2.5, "id": "own"}, {"prompt": "c", "n": None, "id": 7}]
    chat = _problems(tmp_path, rows, answer_column="n", system="Be brief.")
    assert [p.id for p in chat] == ["asked/0", "own", "7"]
    assert [p.answer for p in chat] == ["4", "2.5", None]
    assert chat[0].messages == ({"role": "user", "content": "a"},)
    assert chat[0].text is None
    plain = _problems(tmp_path, rows, chat=False, limit=2)
    assert [(p.text, p.messages, p.answer) for p in plain] == [("a", None, None), ("b", None, None)]


def test_message_lists_are_kept_as_they_are(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "3"},
    ]
    (problem,) = _problems(tmp_path, [{"prompt": turns}])
    assert problem.messages == (turns[0], {"role": "user", "content": "a"}, turns[2], turns[3])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "row 2: the prompt is an empty string"),
        ("  \n", "row 2: the prompt is an empty string"),
        ("\ud800", "row 2: the text holds a lone surrogate"),
        (None, "row 2: 'prompt' is null or missing"),
        (3, "row 2: 'prompt' is a int; expected a string or a list"),
        ([], "row 2: the list of messages is empty"),
        ([["x"]], "row 2, message 1: expected an object with role and content, found list"),
        (
            [{"speaker": "x", "value": "x"}],
            "message 1: role and content must be strings; found the keys speaker, value",
        ),
        ([{"role": "user", "content": None}], "role and content must be strings"),
        ([{"role": "human", "content": "x"}], "unknown role 'human'; expected one of system, user"),
        ([{"role": "user", "content": ""}], "message 1: the prompt is an empty string"),
        ([{"role": "assistant", "content": "y"}], "this one ends with 'assistant'"),
        ([{"role": "system", "content": "x"}], "this one ends with 'system'"),
    ],
)
def test_bad_prompts_are_refused_with_their_row(tmp_path: Path, prompt: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _problems(tmp_path, [{"prompt": "fine"}, {"prompt": prompt}])


def test_columns_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'promt'; did you mean 'prompt'\? Columns present: prompt, answer"):
        _problems(tmp_path, ROWS, column="promt")
    with pytest.raises(DataError, match="no column 'gold'"):
        _problems(tmp_path, ROWS, answer_column="gold")
    with pytest.raises(DataError, match="the answer is a list"):
        _problems(tmp_path, [{"prompt": "a", "answer": [1]}], answer_column="answer")
    with pytest.raises(DataError, match=r"holds chat messages, but prompts\.chat is false"):
        _problems(tmp_path, [{"prompt": [{"role": "user", "content": "x"}]}], chat=False)


def test_the_bundled_world_is_a_source() -> None:
    problems = load_problems(PromptsConfig(source="tiny", split="train", limit=3))
    assert len(problems) == 3
    assert all(problem.answer for problem in problems)


@pytest.mark.parametrize(
    ("name", "column", "count", "unanswered"),
    [("gsm8k/train.jsonl.gz", "question", 7473, 0), ("math/train_7474.json.gz", "problem", 7474, 4)],
)
def test_real_prompt_files(name: str, column: str, count: int, unanswered: int) -> None:
    problems = load_problems(PromptsConfig(source=str(real_data(name)), column=column, answer_column="answer"))
    assert len(problems) == count
    assert all(problem.messages for problem in problems)
    assert sum(not problem.answer for problem in problems) == unanswered


def test_conversations_with_answers_are_cut_before_the_first(tmp_path: Path) -> None:
    sharegpt = [
        {"from": "human", "value": "weather in Bern?"},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    tools = [{"name": "weather", "parameters": {"type": "object", "properties": {}}}]
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"conversations": sharegpt, "tools": json.dumps(tools)}]))
    config = PromptsConfig(source=str(path), column="conversations", tools_column="tools")
    (problem,) = load_problems(config)
    assert problem.messages == ({"role": "user", "content": "weather in Bern?"},)
    assert problem.meta == {"tools": tools}
