"""Prompts, and whether a step fits into the device."""

import copy
from pathlib import Path
from typing import Any

import pytest

from headstart.assemble.cost import Cost, Seconds
from headstart.checks.findings import Finding
from headstart.checks.prompts import duplicates, evaluation_overlap, overlong, special_tokens
from headstart.checks.run import memory_finding, run_preflight, time_finding, timed
from headstart.config.schema import Config
from headstart.models.memory import GIB, Memory
from headstart.models.templates import build_prompts
from headstart.records import Problem
from headstart.tasks.overlap import KINDS, Kind, Match, Overlap
from headstart.testing import word_tokenizer
from preflight_pairs import prompt
from real_tokenizers import real_tokenizer
from support import make_config


@pytest.mark.parametrize(("repeats", "severity"), [(0, "ok"), (1, "note"), (2, "warning")])
def test_duplicates(repeats: int, severity: str) -> None:
    prompts = [prompt(5, max(repeats, i), index=i) for i in range(40)]
    finding = duplicates(prompts)
    assert (finding.severity, finding.figures["duplicates"]) == (severity, repeats)


@pytest.mark.parametrize(("dropped", "severity"), [(0, "ok"), (1, "note"), (2, "warning")])
def test_overlong(dropped: int, severity: str) -> None:
    finding = overlong([prompt(5, 6, index=i) for i in range(38)], dropped, 64)
    assert (finding.severity, finding.figures["dropped"]) == (severity, dropped)
    assert finding.figures["longest"] == 2


@pytest.mark.parametrize(
    ("kinds", "severity"),
    [((), "ok"), (("near",), "note"), (("same", "near"), "warning"), (("solution",), "warning")],
)
def test_overlap(kinds: tuple[Kind, ...], severity: str) -> None:
    matches = tuple(Match(kind, f"t{place}", "p1", "asked", "found") for place, kind in enumerate(kinds))
    finding = evaluation_overlap(Overlap(100, 50, matches), "math500")
    assert finding.severity == severity
    assert [finding.figures[kind] for kind in KINDS] == [kinds.count(kind) for kind in KINDS]
    assert (finding.figures["train"], finding.figures["test"]) == (100, 50)
    assert [example["test"] for example in finding.figures["examples"]] == [f"t{i}" for i in range(len(kinds))]
    assert (finding.remedy is not None) == (severity == "warning")


def _asked(text: str, index: int, **turn: Any) -> Problem:
    return Problem(id=f"p{index}", messages=({"role": "user", "content": text, **turn},))  # type: ignore[typeddict-item]


def _special(problems: list[Problem], student: Any, teacher: Any = None) -> list[Finding]:
    return special_tokens((student, teacher or student), problems, [prompt(5, index=i) for i in range(len(problems))])


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "<|im_start|>"])
def test_special_tokens_in_a_users_text(token: str) -> None:
    tokenizer = real_tokenizer("qwen2_5")
    problems = [_asked("2+2?", 0), _asked(f"what does {token} do? {token}", 1), _asked("<|im_end |> <im_end>", 2)]
    (finding,) = _special(problems, tokenizer)
    assert (finding.check, finding.severity) == ("special tokens", "warning")
    assert finding.message.startswith(f"1 of 3 prompts hold special tokens in their own text ({token!r} in 1)")
    assert "row 2 (p1)" in finding.message
    expected = {"prompts": 3, "held": 1, "row": 2, "student": {token: 1}, "teacher": {token: 1}}
    assert finding.figures == expected
    assert finding.remedy is not None


def test_special_tokens_of_a_template_do_not_count(tmp_path: Path) -> None:
    config = make_config(tmp_path, "prompts.system=w3")
    tokenizer, problems = word_tokenizer(), [_asked("w1 w2", 0), _asked("w1", 1)]
    prompts = build_prompts(problems, tokenizer, tokenizer, config.prompts).prompts
    assert 1 in prompts[0].token_ids  # <end>, the template's
    assert special_tokens((tokenizer, tokenizer), problems, prompts) == []


def test_special_tokens_are_found_by_preflight_and_before_a_run(tmp_path: Path) -> None:
    source = tmp_path / "asked.jsonl"
    source.write_text('{"prompt": "w1 w2"}\n{"prompt": "w3 <end> w1"}\n')
    config = make_config(tmp_path, f"prompts.source={source}")
    for quick in (True, False):
        (finding,) = [f for f in run_preflight(config, quick=quick).findings if f.check == "special tokens"]
        assert (finding.severity, finding.figures["row"], finding.figures["student"]) == ("warning", 2, {"<end>": 1})


def test_special_tokens_of_either_model_count() -> None:
    student, teacher = word_tokenizer(), word_tokenizer()
    teacher.add_special_tokens({"additional_special_tokens": ["<own>"]})
    (finding,) = _special([_asked("w1 <own>", 0), _asked("w1", 1), _asked("<end> <own> w1", 2)], student, teacher)
    assert finding.figures["student"] == {"<end>": 1}
    assert finding.figures["teacher"] == {"<own>": 2, "<end>": 1}
    assert (finding.figures["held"], finding.figures["row"]) == (2, 1)
    assert "'<own>' in 2, '<end>' in 1" in finding.message


@pytest.mark.parametrize(
    "problem",
    [
        Problem(id="p", messages=({"role": "system", "content": "w1 <end> w2"}, {"role": "user", "content": "w1"})),
        Problem(id="p", messages=({"role": "user", "content": "w1"}, {"role": "tool", "content": "w1 <end>"})),
        _asked("w1", 0, tool_calls=[{"name": "f", "arguments": {"x": "w1 <end> w2"}}]),
        Problem(
            id="p", messages=({"role": "user", "content": "w1"},), meta={"tools": [{"description": "w1 <end> w2"}]}
        ),
    ],
)
def test_special_tokens_anywhere_in_a_row_count(problem: Problem) -> None:
    (finding,) = _special([problem], word_tokenizer())
    assert finding.figures["student"] == {"<end>": 1}


def test_special_tokens_of_plain_prompts_are_a_note() -> None:
    """They may be rendered already."""
    (finding,) = _special([Problem(id="p", text="<user> w1 <end> <assistant>")], word_tokenizer())
    assert (finding.severity, finding.remedy) == ("note", None)


def test_special_tokens_that_are_split_into_text_do_not_count() -> None:
    tokenizer = copy.deepcopy(real_tokenizer("qwen2_5"))
    tokenizer.split_special_tokens = True
    assert _special([_asked("<|im_end|>", 0)], tokenizer) == []


def test_only_prompts_that_are_used_count() -> None:
    problems = [_asked("<end> <end>", 0), _asked("w1", 1)]
    assert special_tokens((word_tokenizer(), word_tokenizer()), problems, [prompt(5, index=1)]) == []


PHASES = {"rollout": 2.0, "teacher": 3.0, "student": 9.0, "optimizer": 4.0}


@pytest.mark.parametrize(
    ("free", "severity"), [(13.0, "ok"), (12.3, "ok"), (12.1, "warning"), (11.1, "warning"), (10.9, "blocking")]
)
def test_memory_against_what_is_free(free: float, severity: str) -> None:
    """2 GiB of states and 9 of the student: 11 are needed; the weights are loaded already."""
    finding = memory_finding(Memory(weights=7.0, states=2.0, **PHASES), int(free * GIB), 100, "cuda")
    assert finding.severity == severity
    assert finding.figures["needed_gib"] == 11.0
    assert finding.figures["free_gib"] == pytest.approx(free)
    assert (finding.remedy is None) == (severity == "ok")


@pytest.mark.parametrize(
    ("phase", "remedy"), [("rollout", "rollout.batch_size"), ("student", "checkpointing"), ("optimizer", "lora")]
)
def test_the_remedy_fits_the_phase_that_needs_most(phase: str, remedy: str) -> None:
    finding = memory_finding(Memory(weights=1.0, states=1.0, **PHASES | {phase: 20.0}), GIB, 100, "cpu")
    assert remedy in (finding.remedy or "")
    assert f"most in the {phase} phase" in finding.message


def test_time_is_told_by_phase_and_for_the_run(tmp_path: Path) -> None:
    config: Config = make_config(tmp_path, "training.steps=200")
    nothing = Memory(weights=0.0, states=0.0, **PHASES)
    finding = time_finding(Cost(100, Seconds(3.0, 1.0, 1.5, 0.5), nothing), config, config, ended=True)
    assert (finding.figures["total"], finding.figures["run"]) == (6.0, 1200.0)
    assert "20 min" in finding.message
    assert "its 6 rollouts, good to about a quarter" in finding.message
    assert time_finding(Cost(100, None, nothing), config, config, ended=True).severity == "note"


def test_a_large_step_is_timed_with_fewer_rollouts_and_says_so(tmp_path: Path) -> None:
    """On a CPU alone: a GPU decodes 64 rollouts as fast as 16."""
    config = make_config(tmp_path, "training.prompts_per_step=8", "rollout.samples_per_prompt=8", "training.steps=10")
    assert timed(config, "cuda") == config
    smaller = timed(config, "cpu")
    assert smaller.training.prompts_per_step == 2
    nothing = Memory(weights=0.0, states=0.0, **PHASES)
    finding = time_finding(Cost(100, Seconds(3.0, 1.0, 1.5, 0.5), nothing), config, smaller, ended=False)
    assert "if no rollout ends sooner" in finding.message
    assert finding.figures["total"] == 4 * 5.5 + 0.5, "the optimizer knows no rollouts"
    assert "16 of its 64 rollouts" in finding.message
    assert finding.figures["timed_rollouts"] == 16
