"""The page that explains messages quotes messages that exist, and the page for users of TRL its arguments."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"timeout", "tokens/s"}
"""Words of tables, not of messages."""


def quoted() -> list[str]:
    """What stands in backticks in the first cells of the page's tables."""
    page = (ROOT / "docs/how-to/troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    return [text for cell in cells for text in re.findall("`([^`]+)`", cell) if text not in ELSEWHERE]


def source() -> str:
    """All of the source, with strings that go on in another line in one piece."""
    files = (ROOT / "src").rglob("*.py")
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))


def test_every_message_of_the_page_is_one_of_ours() -> None:
    messages, text = quoted(), source()
    assert len(messages) > 25
    assert [message for message in messages if message not in text] == []


def test_every_argument_of_trl_stands_beside_ours() -> None:
    trl = pytest.importorskip("trl", reason="needs the extra `bench` (TRL)")
    from transformers import TrainingArguments

    general = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(trl.DistillationConfig)} - general
    page = (ROOT / "docs/how-to/from-trl.md").read_text(encoding="utf-8")
    assert sorted(name for name in own if f"`{name}`" not in page) == []
