"""Images in rows: where they are looked for, where they stand in messages, and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from headstart.config.loader import parse
from headstart.config.prompts import PromptsConfig
from headstart.errors import ConfigError, DataError
from headstart.models.templates import _with_images
from headstart.records import Problem
from headstart.tasks import images
from headstart.tasks.overlap import overlap
from headstart.tasks.prompts import load_problems
from small_image_models import picture, png

ASKED = {"role": "user", "content": "what is it"}


def loaded(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> list[Problem]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_problems(PromptsConfig(source=str(path), **settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(8, 6, n))
    return tmp_path


def test_a_column_of_paths_seen_from_the_file(folder: Path) -> None:
    rows = [{"prompt": "what", "picture": f"pictures/{n}.png"} for n in range(2)] + [{"prompt": "two", "picture": None}]
    a, b, c = loaded(folder, rows, image_column="picture")
    assert [len(p.images) for p in (a, b, c)] == [1, 1, 0]
    assert a.images[0].content == folder / "pictures" / "0.png"
    assert a.images != b.images
    assert a.messages == ({"role": "user", "content": "what"},), "messages hold text alone"
    assert "png" not in repr(a.messages)


def test_the_same_image_in_every_form(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (folder / "pictures" / "1.png").read_bytes()
    monkeypatch.setattr(images, "_fetched", lambda address, where: data)
    text = base64.b64encode(data).decode()
    forms: list[Any] = [
        "pictures/1.png",
        ["pictures/1.png"],
        {"path": "pictures/1.png"},
        {"bytes": None, "path": "pictures/1.png"},
        {"base64": text},
        f"data:image/png;base64,{text}",
        "https://example.org/1.png",
        {"url": "https://example.org/1.png"},
    ]
    problems = loaded(
        folder, [{"prompt": "what", "image": form} for form in forms], image_column="image", images="urls"
    )
    assert len({p.images for p in problems}) == 1
    given = [{"prompt": "what", "image": form} for form in (data, {"bytes": data, "path": "1.png"}, bytearray(data))]
    config = PromptsConfig(source="in memory", image_column="image")
    assert {p.images for p in load_problems(config, given)} == {problems[0].images}
    (pillow,) = load_problems(config, [{"prompt": "what", "image": picture(8, 6, 1)}])
    assert pillow.images == problems[0].images, "Pillow wrote these bytes"


@pytest.mark.parametrize(
    ("content", "column", "text", "places"),
    [
        ("what is it", ["0"], "what is it", [0]),
        ("what is it", ["0", "1"], "what is it", [0, 0]),
        ([{"type": "image"}, {"type": "text", "text": "what"}], ["0"], "what", [0]),
        (
            [{"type": "text", "text": "left"}, {"type": "image"}, {"type": "text", "text": "right"}],
            ["0"],
            "leftright",
            [4],
        ),
        ([{"type": "image", "path": "pictures/0.png"}], None, "", [0]),
        ([{"type": "image", "image": "pictures/0.png"}, {"type": "image"}], ["1"], "", [0, 0]),
        ("<image>\nwhat", ["0"], "\nwhat", [0]),
        ("is <image> like <image>?", ["0", "1"], "is  like ?", [3, 9]),
        ([{"text": "a"}, {"text": "b"}, {"type": "image"}, {"text": "c"}], ["0"], "a\nbc", [3]),
    ],
)
def test_places(folder: Path, content: Any, column: list[str] | None, text: str, places: list[int]) -> None:
    row = {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]}
    row["image"] = None if column is None else [f"pictures/{name}.png" for name in column]  # type: ignore[assignment]
    (problem,) = loaded(folder, [row], image_column="image")
    assert problem.messages is not None
    assert problem.messages[1]["content"] == text
    assert [(p.turn, p.place) for p in problem.images] == [(1, place) for place in places]
    parts: Any = _with_images(problem)[1]["content"]
    assert [part["type"] for part in parts].count("image") == len(places)
    assert "".join(part.get("text", "") for part in parts) == text
    assert all(part.get("text", "x") for part in parts)


def test_conversations_are_cut_before_their_first_answer_images_too(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nwhat"},
        {"from": "gpt", "value": "a dog"},
        {"from": "human", "value": [{"type": "image", "path": "pictures/1.png"}]},
        {"from": "gpt", "value": "a cat"},
    ]
    (problem,) = loaded(folder, [{"prompt": turns, "image": "pictures/0.png"}], image_column="image")
    assert problem.messages == ({"role": "user", "content": "\nwhat"},)
    assert len(problem.images) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": "pictures/9.png"},
            r"row 1: the image 'pictures/9.png' cannot be read \(No such file or directory; seen",
        ),
        ({"image": "pictures"}, "the image 'pictures' cannot be read"),
        ({"image": "https://example.org/1.png"}, "is an address, and addresses are fetched only when asked for: set"),
        ({"image": 7}, "an image is a int; expected a path or bytes"),
        ({"image": {"pixels": []}}, "an image is an object with pixels; expected bytes or base64 or image"),
        ({"image": {"base64": "%%"}}, "an image is no base64 text"),
        ({"prompt": [{**ASKED, "content": [{"type": "image"}]}]}, "an image part without an image; name the column"),
        ({"prompt": "a <image>", "image": ["pictures/0.png"] * 2}, "2 images for 1 places in the messages"),
        (
            {"prompt": [{**ASKED, "content": [{"type": "image", "path": "pictures/0.png"}, {"type": "video"}]}]},
            "'video'",
        ),
    ],
)
def test_bad_images_are_refused_with_their_row(folder: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        loaded(folder, [{"prompt": "what", "image": None, **row}], image_column="image")


def test_a_column_that_is_not_there(folder: Path) -> None:
    with pytest.raises(DataError, match=r"has no column 'image'; did you mean 'images'\?"):
        loaded(folder, [{"prompt": "what", "images": "pictures/0.png"}], image_column="image")


def test_parts_need_the_setting(folder: Path) -> None:
    row = {"prompt": [{**ASKED, "content": [{"type": "image", "path": "pictures/0.png"}]}]}
    with pytest.raises(DataError, match=r"part of type 'image', but models are loaded .*: set prompts\.images=files"):
        loaded(folder, [row])
    assert loaded(folder, [row], images="files")[0].images


def test_the_same_question_about_another_image_is_another_problem(folder: Path) -> None:
    rows = [{"prompt": "what is on the left of it", "image": f"pictures/{n}.png"} for n in (0, 1, 2)]
    train = loaded(folder, rows[:2], image_column="image")
    assert not overlap(train, loaded(folder, rows[2:], image_column="image")).matches
    assert len(overlap(train, loaded(folder, rows[1:2], image_column="image")).matches) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts.chat": False}, "prompts.chat: found false, but images stand in chat messages"),
        ({"teacher": {"type": "server", "urls": ["http://a"]}}, "teacher.type: a teacher at a URL is sent token ids"),
        ({"rollout": {"engine": "server", "urls": ["http://a"], "sync_dir": "/x"}}, "rollout.engine: found server"),
        (
            {"teachers": [{"name": "a", "path": "a/c"}, {"name": "b", "path": "a/d"}]},
            "teachers: several teachers are shown",
        ),
        ({"sharding.type": "fsdp"}, "sharding.type: found fsdp, but models that see are not divided"),
    ],
)
def test_what_a_run_with_images_cannot_do(settings: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"student": {"path": "a/b"}, "teacher": {"path": "a/c"}}
    base["prompts"] = {"source": "x.jsonl", "image_column": "image"}
    if "teachers" in settings:
        del base["teacher"]
    if "teacher" in settings:
        base["divergence"] = {"support": {"type": "top_k"}}
    with pytest.raises(ConfigError, match=message):
        parse(
            base | {k: v for k, v in settings.items() if "." not in k}, [kv for kv in settings.items() if "." in kv[0]]
        )


def test_when_a_run_sees(folder: Path) -> None:
    base: dict[str, Any] = {"student": {"path": "a/b"}, "teacher": {"path": "a/c"}, "prompts": {"source": "x.jsonl"}}
    assert not parse(base).sees
    assert parse(base, [("prompts.images", "files")]).sees
    assert parse(base, [("prompts.image_column", "image")]).sees
    task = {"type": "jsonl", "path": "t.jsonl", "image_column": "image"}
    assert parse(base | {"evaluation": {"task": task}}).sees
    assert parse(base, [("prompts.mix", [{"source": "y.jsonl", "weight": 1, "image_column": "image"}])]).sees
    with pytest.raises(ConfigError, match="image_column: found 'image', but tiny brings its own"):
        parse(base, [("prompts.source", "tiny"), ("prompts.image_column", "image")])
