from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headstart.assemble.pair import Pair
from headstart.checks.prompts import LARGE, ViewReading, other_views, read_view, views
from headstart.records import Rollout
from headstart.tasks.prompts import load_problems
from headstart.testing import CHAT
from preflight_pairs import THINKING, Side, loaded, speak, write_sides

OTHER = CHAT.replace("<assistant>", "w1 w2 w3 <assistant>")


def by_hand(pair: Pair, rollouts: list[Rollout], views: list[tuple[int, ...]]) -> ViewReading:
    """Token by token in float64, one plain forward pass of the teacher for each rollout and view."""

    def logprobs(prompt: tuple[int, ...], rollout: Rollout) -> torch.Tensor:
        with torch.no_grad():
            logits = pair.teacher.model(torch.tensor([[*prompt, *rollout.completion_ids]])).logits[0]
        return logits[len(prompt) - 1 : -1, : pair.vocabulary.size].double().log_softmax(-1)

    divergence, gain, tokens = 0.0, 0.0, 0
    for rollout, view in zip(rollouts, views, strict=True):
        own, other = logprobs(rollout.prompt.teacher_token_ids, rollout), logprobs(view, rollout)
        for place, token in enumerate(rollout.completion_ids):
            divergence += float((own[place].exp() * (own[place] - other[place])).sum())
            gain += float(other[place, token] - own[place, token])
        tokens += len(rollout.completion_ids)
    return ViewReading(divergence / tokens, gain / tokens)


def test_one_view_is_ok(tmp_path: Path) -> None:
    config = write_sides(tmp_path, Side(), Side(seed=2))
    pair, prompts = loaded(config)
    finding = views(pair, load_problems(config.prompts), speak(pair, prompts))
    assert finding.severity == "ok"
    assert finding.figures == {"views": {}}


def test_readings_are_those_computed_by_hand(tmp_path: Path) -> None:
    config = write_sides(tmp_path, Side(), Side(template=OTHER, seed=2))
    pair, prompts = loaded(config)
    rollouts = speak(pair, prompts)
    (ids,) = other_views(pair, load_problems(config.prompts), rollouts).values()
    assert ids == [r.prompt.token_ids for r in rollouts]
    found, expected = read_view(pair, rollouts, ids), by_hand(pair, rollouts, ids)
    assert found.divergence == pytest.approx(expected.divergence, rel=1e-4)
    assert found.gain == pytest.approx(expected.gain, rel=1e-3, abs=1e-5)
    own = [r.prompt.teacher_token_ids for r in rollouts]
    assert read_view(pair, rollouts, own) == ViewReading(0.0, 0.0)


def test_a_template_that_fits_the_students_responses_less_warns(tmp_path: Path) -> None:
    """The teacher is the student's twin behind another template: in the student's view it agrees with every token."""
    config = write_sides(tmp_path, Side(), Side(template=OTHER))
    pair, prompts = loaded(config)
    finding = views(pair, load_problems(config.prompts), speak(pair, prompts))
    reading = finding.figures["views"]["student"]
    assert finding.severity == "warning"
    assert reading["nats_per_token"] > LARGE
    assert reading["gain"] > LARGE
    assert "prompts.teacher_view" in (finding.remedy or "")


def test_a_view_that_fits_no_better_is_a_note(tmp_path: Path) -> None:
    """The responses come from the teacher's own view, so every other one fits them worse."""
    config = write_sides(tmp_path, Side(), Side(template=OTHER))
    pair, prompts = loaded(config)
    spoken = speak(pair, prompts, who="teacher")
    finding = views(pair, load_problems(config.prompts), spoken)
    assert finding.figures["views"]["student"]["gain"] < 0
    assert finding.severity == "note"


def test_a_thinking_mode_that_nobody_chose_warns(tmp_path: Path) -> None:
    config = write_sides(tmp_path, Side(template=THINKING), Side(template=THINKING, seed=2))
    pair, prompts = loaded(config)
    problems = load_problems(config.prompts)
    # The responses of the teacher itself: no other view fits better, so the silence alone is what warns.
    spoken = speak(pair, prompts, who="teacher", tokens=12, count=12)
    finding = views(pair, problems, spoken)
    assert set(finding.figures["views"]) == {"thinking off"}, "on is what the run does already"
    assert finding.severity == "warning"
    assert "which thinking mode is meant" in finding.message
    assert "{enable_thinking: false}" in (finding.remedy or "")


def test_a_thinking_mode_that_was_chosen_is_a_note(tmp_path: Path) -> None:
    kwargs = "prompts.teacher_view={template_kwargs: {enable_thinking: true}}"
    config = write_sides(tmp_path, Side(template=THINKING), Side(template=THINKING, seed=2), kwargs)
    pair, prompts = loaded(config)
    spoken = speak(pair, prompts, who="teacher", tokens=12, count=12)
    finding = views(pair, load_problems(config.prompts), spoken)
    assert set(finding.figures["views"]) == {"thinking off"}
    assert finding.severity == "note"


def test_the_mode_that_fits_better_is_recommended(tmp_path: Path) -> None:
    """The student does not think, the teacher (its twin) is told to: it would rather be shown the other view."""
    kwargs = "prompts={source: %s, template_kwargs: {enable_thinking: false}}"
    over = (kwargs % (tmp_path / "prompts.jsonl"), "prompts.teacher_view.template_kwargs={enable_thinking: true}")
    config = write_sides(tmp_path, Side(template=THINKING), Side(template=THINKING), *over)
    pair, prompts = loaded(config)
    finding = views(pair, load_problems(config.prompts), speak(pair, prompts))
    assert finding.severity == "warning"
    both = finding.figures["views"]
    assert both["student"] == pytest.approx(both["thinking off"]), "they are the same ids"


def test_ids_that_only_the_student_has_are_no_view_of_the_teacher(tmp_path: Path) -> None:
    config = write_sides(tmp_path, Side(template="<mark> " + CHAT, special=("<mark>",)), Side(seed=2))
    pair, prompts = loaded(config)
    rollouts = speak(pair, prompts)
    assert rollouts[0].prompt.token_ids[0] >= pair.vocabulary.size
    assert other_views(pair, load_problems(config.prompts), rollouts) == {}
    same = [replace(r, prompt=replace(r.prompt, token_ids=r.prompt.teacher_token_ids)) for r in rollouts]
    assert other_views(pair, load_problems(config.prompts), same) == {}
