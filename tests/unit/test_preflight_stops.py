from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headstart.assemble.pair import Pair
from headstart.checks.vocabulary import declared, stop_apart, stops
from headstart.records import Rollout
from headstart.testing import word_tokenizer
from preflight_pairs import TURNS, Side, loaded, speak, write_sides
from real_tokenizers import real_tokenizer

TURN = len(word_tokenizer())


def chance(pair: Pair, rollout: Rollout, who: str, ids: list[int]) -> float:
    """The probability of `ids` in place of the last token, from one plain forward pass of the whole model."""
    view = rollout.prompt.token_ids if who == "student" else rollout.prompt.teacher_token_ids
    context = torch.tensor([[*view, *rollout.completion_ids[:-1]]])
    model = (pair.student if who == "student" else pair.teacher).model
    with torch.no_grad():
        logits_V = model(context).logits[0, -1, : pair.vocabulary.size].double()
    return float(logits_V.softmax(-1)[ids].sum())


def test_equal_stops_are_ok_with_their_sources(tmp_path: Path) -> None:
    pair, _ = loaded(write_sides(tmp_path, Side(), Side()))
    finding = stops(pair)
    assert finding.severity == "ok"
    assert finding.figures["student_ids"] == finding.figures["teacher_ids"] == [1]
    assert finding.figures["teacher_from"] == {"generation_config": [1], "tokenizer": [1], "chat_template": [1]}


def test_different_declared_stops_are_merged_and_measured(tmp_path: Path) -> None:
    pair, prompts = loaded(write_sides(tmp_path, Side(), Side(eos=9, seed=2)))
    student, teacher = speak(pair, prompts, 60, 12), speak(pair, prompts, 60, 12, who="teacher")
    finding = stops(pair, student, teacher)
    assert finding.severity == "note"
    assert finding.figures["merged"] is True
    assert "summed into one class" in finding.message
    assert (finding.figures["student_ids"], finding.figures["teacher_ids"]) == ([1], [1, 9])
    ended = [r for r in student if r.stopped and r.completion_ids[-1] == 1]
    assert finding.figures["student_stopped"] == len(ended) > 0
    expected = sum(chance(pair, r, "teacher", [1]) for r in ended) / len(ended)
    assert finding.figures["teacher_gives_student_stop"] == pytest.approx(expected, abs=1e-5)
    ended = [r for r in teacher if r.stopped]
    expected = sum(chance(pair, r, "student", [1, 9]) for r in ended) / len(ended)
    assert finding.figures["student_gives_teacher_stop"] == pytest.approx(expected, abs=1e-5)


def test_a_template_that_ends_turns_otherwise_warns(tmp_path: Path) -> None:
    """Both declare id 1, but the teacher's template ends a turn with a token of its own."""
    special = ("<turn>",)
    pair, prompts = loaded(write_sides(tmp_path, Side(special=special), Side(template=TURNS, special=special, seed=2)))
    assert stops(pair).severity == "note", "nothing measured, nothing to warn of"
    finding = stops(pair, speak(pair, prompts, 60, 12), speak(pair, prompts, 60, 12, who="teacher"))
    assert (finding.figures["student_ids"], finding.figures["teacher_ids"]) == ([1], [1, TURN])
    assert finding.figures["merged"] is False
    assert finding.figures["teacher_gives_student_stop"] < 0.1
    assert finding.severity == "warning"
    assert finding.remedy is not None
    assert "eos_token_id" in finding.remedy


def test_responses_that_never_stop_are_told(tmp_path: Path) -> None:
    pair, prompts = loaded(write_sides(tmp_path, Side(), Side()))
    rollouts = [r for r in speak(pair, prompts, 2, 12) if not r.stopped]
    finding = stops(pair, rollouts, rollouts)
    assert f"of {len(rollouts)} responses of the student of at most 2 tokens 0 ended" in finding.message
    assert "is not known" in finding.message
    assert "teacher_gives_student_stop" not in finding.figures


def test_one_response_that_ended_is_too_few_to_warn_of(tmp_path: Path) -> None:
    special = ("<turn>",)
    pair, prompts = loaded(write_sides(tmp_path, Side(special=special), Side(template=TURNS, special=special, seed=2)))
    assert stop_apart(pair)
    ended = [r for r in speak(pair, prompts, 60, 12) if r.stopped]
    finding = stops(pair, ended[:1])
    assert finding.severity == "note"
    assert "(too few to judge by)" in finding.message
    assert "teacher_responses" not in finding.figures
    assert stops(pair, ended).severity == "warning"


def test_only_stops_that_differ_and_are_not_one_class_ask_for_the_teachers_responses(tmp_path: Path) -> None:
    same, merged = write_sides(tmp_path / "same", Side(), Side()), write_sides(tmp_path / "merged", Side(), Side(eos=9))
    assert not stop_apart(loaded(same)[0])
    assert not stop_apart(loaded(merged)[0])


def test_sources_of_real_families() -> None:
    own = declared(real_tokenizer("qwen3"), SimpleNamespace(eos_token_id=[151645, 151643]))
    assert own == {"generation_config": [151645, 151643], "tokenizer": [151645], "chat_template": [151645]}
    assert declared(real_tokenizer("gpt2"), None) == {
        "generation_config": [],
        "tokenizer": [50256],
        "chat_template": [],
    }
