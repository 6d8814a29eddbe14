import contextlib
import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.config.schema import PromptsConfig
from headstart.errors import DataError
from headstart.models.templates import View
from headstart.tasks import reading
from headstart.tasks.prompts import load_problems
from headstart.tasks.reading import _line_rows, read_rows, stem
from real_tokenizers import DATA, real_data, real_tokenizer

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
        ("a.json", b'[{"prompt": "x"},\n]', "not a valid JSON array .*line [12]"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}', "line 2: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "cannot be read"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet"),
        ("a.txt", b"x", "unknown file type '.txt'; expected .jsonl"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": ' + b"[" * 100_000, r"line 2: not valid JSON \(nested too deeply\)"),
        ("a.jsonl", b'{"prompt": ' + b'{"a":' * 100_000, r"line 1: not valid JSON \(nested too deeply\)"),
        ("a.json", b"[" * 100_000, r"not a valid JSON array \(nested too deeply\)"),
        ("a.json", b'[{"n": ' + b"1" * 5000 + b"}]", "not a valid JSON array .*5000 digits"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0) + b"more", "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-8] + b"12345678", "cannot be read: CRC check failed"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "not a readable Parquet"),
    ],
)
def test_damaged_files_are_named_with_their_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


def test_many_gzip_members_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()) * 2000 + gzip.compress(b""))
    assert read_rows(str(tmp_path / "a.jsonl.gz")) == ROWS * 2000


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_gzip_bombs_are_left_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 2**22)
    path = tmp_path / f"a{suffix}.gz"
    path.write_bytes(gzip.compress(b"\n" * 2**23))
    with pytest.raises(DataError, match=r"unfolds to more than 0\.0 GiB, over 50 times its own size"):
        read_rows(str(path))
    path.write_bytes(gzip.compress(b"\n" * 2**20) * 9)  # each member alone is within bounds
    with pytest.raises(DataError, match="unfolds to more"):
        read_rows(str(path))


def test_a_large_file_may_unfold_to_fifty_times_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 40))
    assert len(read_rows(str(tmp_path / "a.jsonl.gz"))) == 80


def test_parquet_bombs_are_left_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(reading, "MAX_BYTES", 2**22)
    texts = pyarrow.array(["x" * 10_000])
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5000, pyarrow.int32()), texts)
    for column in (same, same.dictionary_decode(), pyarrow.nulls(10**6, pyarrow.string())):
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path)
        assert path.stat().st_size < 20_000
        with pytest.raises(DataError, match=r"unfolds to more than .* over 50 times its own size"):
            read_rows(str(path))


def test_parquet_text_that_is_not_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    stored = pyarrow.array([b"a", b"b", b"\xed\xa0\x80"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, stored.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 3: cannot be read"):
        read_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("damage", range(40))
def test_damaged_parquet_is_refused_or_read(tmp_path: Path, damage: int) -> None:
    data = bytearray(_parquet(tmp_path / "a.parquet", [{"prompt": "x" * 50, "turns": [{"a": 1}]}] * 3))
    data[damage * len(data) // 40] ^= 0xFF
    (tmp_path / "a.parquet").write_bytes(data)
    with contextlib.suppress(DataError):
        read_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "source", ["x" * 5000 + ".jsonl", "./" + "x" * 300, "a/" + "x" * 5000, "~nobody-here/a.jsonl", "/" + "d/" * 2500]
)
def test_paths_that_cannot_be_looked_up(source: str) -> None:
    with pytest.raises(DataError, match="cannot be looked up") as caught:
        read_rows(source)
    assert len(str(caught.value)) < 300


def _tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = [
    [_tool("weather", city={"type": "string", "enum": ["Oslo", None]}), _tool("now")],
    [_tool("add", a={"type": "number", "default": 1.5}, b={"type": "number"})],
    [],
]
CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Oslo"}}}]}
CALLED_OTHERWISE = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"a": 1}}}]}
ASKED = {"role": "user", "content": "warm?"}


def test_nulls_that_pad_records_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow gives every record of a column the fields of all; a null in a list pads nothing."""
    import datasets

    turns = [[ASKED, CALLED], [{**ASKED, "name": "Ann"}, CALLED_OTHERWISE], [ASKED]]
    rows = [{"turns": t, "tools": tools} for t, tools in zip(turns, TOOLS, strict=True)]
    _parquet(tmp_path / "a.parquet", rows)
    assert read_rows(str(tmp_path / "a.parquet")) == rows
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert read_rows(str(tmp_path / "a.parquet.gz")) == rows
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    assert read_rows("some/set") == rows
    config = PromptsConfig(source=str(tmp_path / "a.parquet"), column="turns", tools_column="tools")
    assert [p.meta["tools"] for p in load_problems(config)] == TOOLS


def test_nulls_in_rows_lists_maps_and_json_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    mapped = pyarrow.array([[("x", "1"), ("y", None)], []], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    table = pyarrow.table({"map": mapped, "list": [[1, None], None], "text": [None, '{"default": null}']})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")) == [
        {"map": {"x": "1", "y": None}, "list": [1, None], "text": None},
        {"map": {}, "list": None, "text": '{"default": null}'},
    ]
    objects = [{"tools": [{"default": None}, {"enum": [1, None], "other": "x"}]}]
    features = datasets.Features({"tools": datasets.List(datasets.Json())})
    written = datasets.Dataset.from_list(objects, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: written)
    assert read_rows("some/set") == objects


@pytest.mark.parametrize("as_text", [False, True])
def test_nulls_of_json_files_are_the_authors_own(tmp_path: Path, as_text: bool) -> None:
    tools = [{"name": "f", "parameters": {"x": {"default": None, "enum": ["a", None]}}}]
    (problem,) = _problems(tmp_path, [{"prompt": "a", "t": json.dumps(tools) if as_text else tools}], tools_column="t")
    assert problem.meta["tools"] == tools


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
        ([{"role": "user", "content": {"a": 1}}], r"must be strings; .*\(role: str, content: dict\)"),
        ([ASKED, {"role": "tool", "content": 3}], r"message 2: role and content .*content: int"),
        ([ASKED, {"role": "assistant", "content": None}, ASKED], r"message 2: role and content .*content: NoneType"),
        ([{"from": 5, "value": "x"}], r"found the keys from, value \(role: int, content: str\)"),
        ([{"from": ["human"], "value": "x"}], r"\(role: list, content: str\)"),
        ([{"from": None, "value": "x"}], r"\(role: NoneType, content: str\)"),
        ([{"from": "human", "value": 5}], r"\(role: str, content: int\)"),
        ([{"from": "human"}], r"keys from \(role: str, content: NoneType\)"),
        ([{"from": "bot", "value": "x"}], "unknown role 'bot'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "part of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "text": ""}]}], "type 'image'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "part of type 'input_audio' that is no text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "part of type 'text' that is no text"),
        ([{"role": "user", "content": ["x"]}], "part of type 'str' that is no text"),
        ([{"role": "user", "content": []}], "message 1: the prompt is an empty string"),
        ([ASKED, {"role": "assistant", "tool_calls": "[{"}, ASKED], "message 2: the tool calls are not JSON"),
        ([ASKED, {"role": "assistant", "tool_calls": {"a": 1}}, ASKED], "must be a list of JSON objects; found dict"),
        ([ASKED, {"role": "assistant", "tool_calls": [None]}, ASKED], "must be a list of JSON objects"),
        *(
            (
                [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": a}]}, ASKED],
                f"message 2: .*{said}",
            )
            for a, said in (("{x}", "are not JSON"), ("[1]", "are a list"), ([1], "are a list"), ("5", "are a int"))
        ),
        *(
            (text, "row 2: the prompt looks like messages but is not JSON")
            for text in (
                "[{'role': 'user', 'content': 'Hi'}]",
                '[{"role": "user", "content": "Hi',
                '[{"from": "human", "value": "Hi"}, ',
                '[{"content": "x", "role": "user"} {"content": "y", "role": "user"}]',
                '[{"role": "user", "content": "Hi", "x": ' + "[" * 100_000 + "]" * 100_000 + "}]",
            )
        ),
        ('{"role": "user", "content": "Hi"}', "'prompt' is a dict; expected a string or a list"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "'prompt' is a dict"),
        ('[{"role": "user", "content": "Hi"}, 5]', "message 2: expected an object with role and content, found int"),
    ],
)
def test_bad_prompts_are_refused_with_their_row(tmp_path: Path, prompt: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _problems(tmp_path, [{"prompt": "fine"}, {"prompt": prompt}])


@pytest.mark.parametrize(
    "prompt",
    [
        "[1, 2, 3]",
        "[]",
        '{"a": 1}',
        '"Hello"',
        '[{"name": "Ann", "role": "nurse"}]',
        '[{"role": "user", "content": "x"}] Is this valid?',
        "[{'role': 'user', 'content': 'x'}] Why does this fail?",
        "{curly} [square",
        "[" + "1" * 5000 + "]",
    ],
)
def test_text_that_only_looks_like_json_stays_text(tmp_path: Path, prompt: str) -> None:
    (problem,) = _problems(tmp_path, [{"prompt": prompt}])
    assert problem.messages == ({"role": "user", "content": prompt},)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"role": "system", "content": "s"}, ASKED]),
        "\n " + json.dumps([{"role": "system", "content": "s"}, ASKED], indent=2) + "\n",
        json.dumps(json.dumps([{"role": "system", "content": "s"}, ASKED])),
        json.dumps([{"from": "system", "value": "s"}, {"from": "human", "value": "warm?"}]),
        json.dumps([{"content": "s", "role": "system"}, ASKED, {"role": "assistant", "content": "yes"}]),
    ],
)
def test_messages_stored_as_json_text_are_read(tmp_path: Path, text: str) -> None:
    (problem,) = _problems(tmp_path, [{"prompt": text}])
    assert problem.messages == ({"role": "system", "content": "s"}, ASKED)
    with pytest.raises(DataError, match=r"prompts\.chat is false"):
        _problems(tmp_path, [{"prompt": text}], chat=False)


HALF = "x\ud83d"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "low \udc00"}, "the text holds a lone surrogate"),
        *(
            ({"prompt": [ASKED, turn, ASKED]}, "message 2: the text holds a lone surrogate")
            for turn in (
                {"role": "user", "content": HALF},
                {"role": "system", "content": HALF},
                {"role": "assistant", "content": HALF},
                {"role": "tool", "content": HALF},
                {"role": "user", "content": [{"type": "text", "text": HALF}]},
                {"role": "user", "content": "x", "name": HALF},
                {"role": "user", "content": "x", HALF: "x"},
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": [HALF]}}]},
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": json.dumps({"x": HALF})}]},
            )
        ),
        ({"prompt": json.dumps([{"role": "user", "content": HALF}])}, "message 1: the text holds a lone surrogate"),
        ({"prompt": "a", "id": HALF}, "the id holds a lone surrogate"),
        ({"prompt": "a", "a": HALF}, "the answer holds a lone surrogate"),
        ({"prompt": "a", "t": [{"name": HALF}]}, "the tools hold a lone surrogate"),
        ({"prompt": "a", "t": json.dumps([{HALF: 1}])}, "the tools hold a lone surrogate"),
        ({"prompt": "a", "t": [{"name": "f", "x": json.loads("[" * 200 + "]" * 200)}]}, "nested more than 100 levels"),
        ({"prompt": "a", "t": "[" * 100_000}, r"the tools are not JSON \(nested too deeply\)"),
        ({"prompt": [{**ASKED, "x": json.loads("[" * 200 + "]" * 200)}]}, "nested more than 100 levels"),
    ],
)
def test_what_no_tokenizer_takes_is_refused_with_its_row(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    rows = [{"prompt": "fine", "a": "1", "t": []}, row]
    with pytest.raises(DataError, match=f"row 2.*{said}") as caught:
        _problems(tmp_path, rows, answer_column="a", tools_column="t")
    str(caught.value).encode()  # the message itself can be printed


def test_whole_surrogate_pairs_and_unused_columns_are_fine(tmp_path: Path) -> None:
    (problem,) = _problems(tmp_path, [{"prompt": "\U0001f600", "unused": HALF}])
    assert problem.messages == ({"role": "user", "content": "\U0001f600"},)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
@pytest.mark.parametrize(
    "arguments", [{"city": "Oslo", "unit": None}, '{"city": "Oslo", "unit": null}', ' {"city":"Oslo","unit":null}\n']
)
@pytest.mark.parametrize("bare", [False, True])
def test_tool_turns_without_content(tmp_path: Path, content: dict[str, Any], arguments: Any, bare: bool) -> None:
    def call(given: Any) -> dict[str, Any]:
        function = {"name": "weather", "arguments": given}
        return function if bare else {"id": "1", "type": "function", "function": function}

    turns = [
        ASKED,
        {"role": "assistant", **content, "tool_calls": [call(arguments)], "name": None},
        {"role": "tool", **content, "tool_call_id": "1", "name": "weather"},
    ]
    (problem,) = _problems(tmp_path, [{"prompt": turns}])
    right = call({"city": "Oslo", "unit": None})
    assert problem.messages == (
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [right]},
        {"role": "tool", "content": "", "tool_call_id": "1", "name": "weather"},
    )


@pytest.mark.parametrize("arguments", ["", "  ", "{}", "null", None, {}])
def test_calls_without_arguments(tmp_path: Path, arguments: Any) -> None:
    calls = [{"function": {"name": "now", "arguments": arguments}}]
    turn = {"role": "assistant", "tool_calls": json.dumps(calls)}
    (problem,) = _problems(tmp_path, [{"prompt": [ASKED, turn, {"role": "tool", "content": "5"}]}])
    assert problem.messages[1]["tool_calls"] == [{"function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize("calls", [None, [], ""])
def test_no_tool_calls_are_left_out(tmp_path: Path, calls: Any) -> None:
    turn = {"role": "assistant", "content": "yes", "tool_calls": calls}
    (problem,) = _problems(tmp_path, [{"prompt": [ASKED, turn, ASKED]}])
    assert problem.messages[1] == {"role": "assistant", "content": "yes"}


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a", "image_url": None}, {"text": "b"}, {"type": "input_text", "text": "c"}]
    (problem,) = _problems(
        tmp_path, [{"prompt": [{"role": "system", "content": parts[:1]}, {**ASKED, "content": parts}]}]
    )
    assert [m["content"] for m in problem.messages] == ["a", "a\nb\nc"]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tool_turns_reach_real_templates(tmp_path: Path, template: str, as_text: bool) -> None:
    tokenizer = copy.copy(real_tokenizer("qwen2_5"))
    tokenizer.chat_template = (DATA / "tokenizers" / "chat_templates" / f"{template}.jinja").read_text()
    arguments = {"city": "Oslo", "unit": None}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    if as_text:
        call["function"] = {"name": "weather", "arguments": json.dumps(arguments)}
    turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": None}]
    (problem,) = _problems(tmp_path, [{"prompt": turns}])
    text = tokenizer.decode(View(tokenizer).ids(problem))
    assert '{"name": "weather", "arguments": {"city": "Oslo", "unit": null}}' in text
    assert "<tool_response>\n\n</tool_response>" in text
    assert "None" not in text


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


def test_a_folder_that_is_no_dataset_is_answered_with_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "mbpp.jsonl").write_text('{"prompt": "one"}\n')
    (tmp_path / "other.json").write_text("[{")
    with pytest.raises(DataError, match=r"cannot load the folder .* Give a file: mbpp.jsonl, other.json"):
        read_rows(str(tmp_path))
