"""Sample rollouts for a reader: texts, divergences and alternatives belong to the token they stand at; verdicts."""

from typing import Any

import numpy as np
import pytest

from headstart.config.models import ModelConfig
from headstart.config.schema import Config, PromptsConfig
from headstart.diagnosis.positions import TokenReadings
from headstart.distillation.trackers import make_judge
from headstart.explanation.samples import Samples, sample
from headstart.models.load import load_tokenizer
from headstart.records import Problem, Prompt, Rollout
from headstart.tasks.prompts import load_problems
from headstart.tasks.tiny import TinyTask
from headstart.testing import byte_tokenizer, word_tokenizer


def read(ids: tuple[int, ...], alternatives: list[list[int]]) -> TokenReadings:
    M = len(ids)
    columns = {name: np.zeros(M) for name in TokenReadings.__slots__}
    columns["position"] = np.arange(M)
    columns["divergence"] = np.arange(M) / 7
    columns["teacher_rank"] = np.arange(M) + 1
    columns["teacher_ids"] = np.array(alternatives)
    columns["teacher_probs"] = np.tile([0.75, 0.125], (M, 1))
    return TokenReadings(**columns)


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), byte_tokenizer()], ids=["words", "bytes"])
def test_a_sample_reads_like_the_response_and_keeps_its_order(tokenizer: object) -> None:
    ids = tuple(tokenizer.encode("one two three", add_special_tokens=False))  # type: ignore[attr-defined]
    prompt = tuple(tokenizer.encode("why", add_special_tokens=False))  # type: ignore[attr-defined]
    # The first alternative is what was said, the second the token before.
    alternatives = [[token, ids[max(place - 1, 0)]] for place, token in enumerate(ids)]
    rollout = Rollout(Prompt(3, "p3", prompt, prompt), 0, ids, stopped=False)
    found = sample(tokenizer, rollout, read(ids, alternatives), correct=None)
    assert "".join(found.tokens) == tokenizer.decode(list(ids))  # type: ignore[attr-defined]
    assert found.prompt == tokenizer.decode(list(prompt))  # type: ignore[attr-defined]
    assert (found.problem_id, found.correct, found.stopped) == ("p3", None, False)
    assert found.rank == tuple(range(1, len(ids) + 1))
    assert found.divergence == tuple(round(i / 7, 4) for i in range(len(ids)))
    assert [options[0] for options in found.alternatives] == [(text, 0.75) for text in found.tokens]
    assert all(probability == 0.125 for options in found.alternatives for _, probability in options[1:])
    assert Samples("s", (found,), ()).to_json()["before"][0]["tokens"] == found.tokens


def test_tokens_that_are_not_scored_have_nothing_beside_them() -> None:
    ids = (6, 7, 8)
    rollout = Rollout(Prompt(0, "p", (6,), (6,)), 0, ids, stopped=False)
    scored = read(ids, [[6, 7], [7, -1], [8, 6]]).where(np.array([True, True, False]))
    found = sample(word_tokenizer(), rollout, scored, correct=None)
    assert (found.rank, found.divergence) == ((1, 2, 0), (0.0, round(1 / 7, 4), 0.0))
    assert [len(options) for options in found.alternatives] == [2, 1, 0]  # REST has no text


# --- verdicts in training ---------------------------------------------------------------------------------------------


def rollout_of(problem: Problem, tokenizer: Any, text: str, stopped: bool) -> Rollout:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    end = (tokenizer.eos_token_id,) if stopped else ()
    return Rollout(Prompt(0, problem.id, ids[:1], ids[:1]), 0, (*ids, *end), stopped)


def test_a_rollout_of_a_world_is_judged_also_where_the_horizon_cut_it() -> None:
    config = Config.model_validate(
        {"student": {"path": "tiny:student"}, "teacher": {"path": "tiny:teacher"}, "prompts": {"source": "tiny"}}
    )
    tokenizer = load_tokenizer(ModelConfig(path="tiny:student"))
    problems = load_problems(PromptsConfig(source="tiny", limit=3))
    shown = TinyTask("train", 3).shown(problems[0])
    right = shown.response(shown.plan)
    other = "B" if right[4] == "A" else "A"
    for words, stopped, verdict in (
        (right, True, "right"),
        (right[:16], False, "right so far"),
        (right[:16], True, "no answer"),
        ([*right[:4], other, *right[5:16]], False, "already wrong"),
    ):
        rollout = rollout_of(problems[0], tokenizer, " ".join(words), stopped)
        assert make_judge(config, problems, tokenizer)(rollout) == verdict


@pytest.mark.parametrize(
    ("answer", "text", "stopped", "verdict"),
    [
        ("42", "so it is 42", True, "right"),
        ("42", "so it is 41", True, "wrong"),
        ("42", "who knows", True, "no answer"),
        ("42", "so it is 42", False, "unfinished"),
        ("many", "so it is 42", True, ""),
        (None, "so it is 42", True, ""),
    ],
)
def test_a_rollout_of_a_prompt_with_an_answer_is_judged(
    answer: str | None, text: str, stopped: bool, verdict: str
) -> None:
    config = Config.model_validate(
        {
            "student": {"path": "a"}, "teacher": {"path": "b"}, "prompts": {"source": "p.jsonl"},
            "diagnosis": {"grader": "number"},
        }
    )  # fmt: skip
    problem, tokenizer = Problem("p/0", text="?", answer=answer), byte_tokenizer()
    rollout = rollout_of(problem, tokenizer, text, stopped)
    assert make_judge(config, [problem], tokenizer)(rollout) == verdict
    assert make_judge(config, [problem, problem], tokenizer)(rollout) == "", "an id of two problems names neither"
