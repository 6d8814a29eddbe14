"""Text that the student did not write: who writes what, how it is encoded and cut, and its cross-entropy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.config import loader
from headstart.config.prompts import PromptsConfig
from headstart.config.rollout import MixConfig
from headstart.config.schema import CrossEntropy
from headstart.errors import ConfigError, DataError, RunFolderError
from headstart.losses.chunked import Head, weighted_divergence
from headstart.models.completions import build_completions
from headstart.models.templates import build_prompts
from headstart.ranks.runtime import Runtime
from headstart.records import Problem, Prompt, Rollout, Sampling
from headstart.rollout.written import AHEAD, MixedEngine, Sources, TeacherTexts, Text, author
from headstart.tasks.prompts import load_problems
from headstart.teacher.text import TextScores
from headstart.testing import ScriptedEngine, byte_tokenizer
from small_tokenizers import CHATML, GEMMA_LIKE, word_tokenizer

ONE = Runtime(0, 1, torch.device("cpu"))


@st.composite
def mixes(draw: st.DrawFn) -> MixConfig:
    a, b = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    return MixConfig(student=a, teacher=b - a, given=1 - b)


@given(mix=mixes(), start=st.integers(0, 10**6), count=st.integers(1, 400))
@settings(deadline=None)
def test_every_stretch_of_a_run_has_the_shares_of_the_mix(mix: MixConfig, start: int, count: int) -> None:
    writers = [author(mix, place) for place in range(start, start + count)]
    for who, share in (("student", mix.own), ("teacher", mix.teacher), ("given", mix.given)):
        assert abs(writers.count(who) - share * count) < 5  # random choices would miss by 20 in 400


def test_an_author_without_a_share_writes_nothing() -> None:
    assert {author(MixConfig(teacher=1.0), place) for place in range(500)} == {"teacher"}
    assert {author(MixConfig(student=0.7, given=0.3), place) for place in range(500)} == {"student", "given"}


def prompts(count: int) -> list[Prompt]:
    return [Prompt(place, f"p{place}", (5, 10 + place), (6, 10 + place)) for place in range(count)]


class Counted:
    """A teacher that writes its prompt's place as often as it may."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, asked: Sequence[Prompt], tokens: int) -> list[Rollout]:
        self.asked.append([prompt.index for prompt in asked])
        return [Rollout(p, sample, (100 + p.index,) * tokens, False) for p in asked for sample in range(2)]


def texts_of(teacher: TeacherTexts, places: Sequence[int], later: Sequence[int] = ()) -> list[Text]:
    every = prompts(2 * AHEAD)
    return teacher.texts([every[p] for p in places], (every[p] for p in later), 2)


def test_the_teacher_writes_each_text_once_and_those_of_later_steps_beside_it(tmp_path: Path) -> None:
    sample = Counted()
    teacher = TeacherTexts(sample, 3, tmp_path / "texts.jsonl", ONE)
    found = texts_of(teacher, [4, 2], [2, 7, 9])
    assert [text.ids for text in found] == [(104,) * 3, (104,) * 3, (102,) * 3, (102,) * 3]
    assert sample.asked == [[4, 2, 7, 9]]
    texts_of(teacher, [7, 9], [5])
    assert sample.asked == [[4, 2, 7, 9]], "what is there already is neither sampled again nor a reason to look ahead"
    texts_of(teacher, [1], range(2 * AHEAD))
    assert len(sample.asked[1]) == AHEAD // 2, "two texts to a prompt"
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"prompt": 3, "sa')  # a kill in the midst of a line
    again = Counted()
    assert texts_of(TeacherTexts(again, 3, tmp_path / "texts.jsonl", ONE), [4, 2, 7]) == [
        *found,
        *texts_of(teacher, [7]),
    ]
    assert again.asked == []


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(RunFolderError, match="holds no texts of a teacher"):
        TeacherTexts(Counted(), 3, tmp_path / "texts.jsonl", ONE)


def test_a_step_has_every_author_in_place() -> None:
    every, mix = prompts(8), MixConfig(student=0.4, teacher=0.3, given=0.3)
    student = ScriptedEngine({p.problem_id: [[50, 51, 52, 53, 1]] for p in every})
    texts = {place: Text((60 + place, 61, 62, 1), True) for place in range(8)}

    def order(step: int) -> list[int]:
        return [(3 * slot + step) % 8 for slot in range(8)]

    def written(asked: Sequence[Prompt], tokens: int) -> list[Rollout]:
        return [Rollout(p, 0, (70 + p.index, 71, 1), True) for p in asked]

    engine = MixedEngine(student, mix, Sources(every, order, texts, TeacherTexts(written, 9, None, ONE), 3))
    step = [replace(every[row], index=slot) for slot, row in enumerate(order(1))]
    rollouts = engine.generate(step, samples=1, max_tokens=3, sampling=Sampling(), key=(0, "rollout", 1))
    assert [r.prompt for r in rollouts] == step
    for slot, (row, rollout) in enumerate(zip(order(1), rollouts, strict=True)):
        match author(mix, 8 + slot):
            case "student":
                assert (rollout.completion_ids, rollout.stopped) == ((50, 51, 52), False)
            case "teacher":
                assert (rollout.completion_ids, rollout.stopped) == ((70 + row, 71, 1), True)
            case "given":  # cut in front of its stop token
                assert (rollout.completion_ids, rollout.stopped) == ((60 + row, 61, 62), False)
    assert len(student.calls) == 1


CHATS = [
    Problem(f"p{n}", ({"role": "user", "content": "what is two"},), completion=c)
    for n, c in enumerate(("four", "is two"))
]


@pytest.mark.parametrize(("template", "stop"), [(CHATML, "<|im_end|>"), (GEMMA_LIKE, "<end_of_turn>")])
def test_a_given_response_is_what_the_template_makes_of_it(template: str, stop: str) -> None:
    special = ("<|im_start|>", "<|im_end|>") if template == CHATML else ("<start_of_turn>", "<end_of_turn>")
    tokenizer = word_tokenizer(special=special, template=template, eos_token="<eos>")
    config = PromptsConfig(source="x")
    used = build_prompts(CHATS, tokenizer, tokenizer, config).prompts
    stops = [tokenizer.convert_tokens_to_ids(name) for name in ("<eos>", stop)]
    found = build_completions(CHATS, used, tokenizer, config, stops)
    assert found.apart == 0
    assert [tokenizer.convert_ids_to_tokens(list(ids)) for ids in found.ids] == [["four", stop], ["is", "two", stop]]


def test_a_response_whose_prompt_would_be_encoded_otherwise_is_encoded_alone() -> None:
    tokenizer, config = byte_tokenizer(), PromptsConfig(source="x", chat=False)
    plain = Problem("p0", text="2+2=", completion="4")
    stop = tokenizer.eos_token_id
    (prompt,) = build_prompts([plain], tokenizer, tokenizer, config).prompts
    whole = build_completions([plain], [prompt], tokenizer, config, [stop])
    assert (whole.apart, tokenizer.decode(whole.ids[0][:-1]), whole.ids[0][-1]) == (0, "4", stop)
    other = replace(prompt, token_ids=(*prompt.token_ids[:-1], 7))
    alone = build_completions([plain], [other], tokenizer, config, [stop])
    assert (alone.apart, alone.ids) == (1, whole.ids)


def test_prompts_without_a_response_are_named() -> None:
    problems = [Problem("a", text="x", completion="y"), Problem("b", text="x")]
    with pytest.raises(DataError, match=r"1 of 2 prompts have no given response .the first is 'b'.*completion_column"):
        build_completions(problems, [], byte_tokenizer(), PromptsConfig(source="x", chat=False), [1])


ANSWERED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "column", "completion"),
    [
        ({"prompt": "a", "response": "b"}, "response", "b"),
        ({"prompt": "a", "response": '"b"'}, "response", '"b"'),
        ({"prompt": "a", "response": None}, "response", None),
        ({"prompt": "a", "response": ANSWERED[1:]}, "response", "b"),
        ({"prompt": "a", "response": ANSWERED[1]}, "response", "b"),
        ({"prompt": ANSWERED}, "prompt", "b"),
        ({"prompt": [*ANSWERED, {"role": "user", "content": "c"}]}, "prompt", None),
        ({"prompt": [*ANSWERED, *ANSWERED]}, "prompt", "b"),
    ],
)
def test_where_a_response_stands(tmp_path: Path, row: dict[str, Any], column: str, completion: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (problem,) = load_problems(PromptsConfig(source=str(path), completion_column=column))
    assert problem.completion == completion


def test_benchmarks_and_worlds_bring_their_responses(tmp_path: Path) -> None:
    gsm8k = tmp_path / "train.jsonl"
    gsm8k.write_text(json.dumps({"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"}) + "\n")
    (problem,) = load_problems(PromptsConfig(source="gsm8k", data=str(gsm8k)))
    assert problem.completion == "48/2 = 24 clips.\nThe answer is \\boxed{24}."
    mbpp = tmp_path / "mbpp.jsonl"
    row = {
        "task_id": 601,
        "text": "Add.",
        "code": "def add(a, b):\r\n  return a + b",
        "test_list": ["assert add(1, 2) == 3"],
    }
    mbpp.write_text(json.dumps(row) + "\n")
    (problem,) = load_problems(PromptsConfig(source="mbpp", data=str(mbpp)))
    assert problem.completion == "```python\ndef add(a, b):\n  return a + b\n```"
    for world in ("tiny", "late"):
        (problem,) = load_problems(PromptsConfig(source=world, limit=1))
        assert (problem.completion or "").endswith(f"ans {problem.answer}")


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 7), chunk=st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_sft_is_cross_entropy(seed: int, rows: int, chunk: int) -> None:
    """Value and both gradients against autograd's in float64."""
    torch.manual_seed(seed)
    hidden, weight, weights = torch.randn(rows, 5), torch.randn(11, 5), torch.rand(rows)
    tokens = torch.randint(0, 11, (rows,))
    x, w = (t.double().requires_grad_() for t in (hidden, weight))
    values = torch.nn.functional.cross_entropy(x @ w.T, tokens, reduction="none")
    (weights.double() * values).sum().backward()
    own, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = weighted_divergence(
        CrossEntropy(), own, Head(lambda h: h @ head.T, (head,), head), TextScores(), tokens, weights, chunk=chunk
    )
    found.loss.backward()
    torch.testing.assert_close(found.value_M.double(), values.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in ((own, x), (head, w)):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    assert found.stats.teacher_entropy_M.isnan().all()


GIVEN = "rollout.mix={given: 1}"
REFUSED = {
    ("rollout.mix={student: 0.5}",): "the shares must sum to 1, and these sum to 0.5",
    ("rollout.mix={teacher: 0.5, given: 0.75}",): r"these sum to 1.25 \(student 0, teacher 0.5, given 0.75\)",
    ("prompts.completion_column=y",): "no prompt is trained on its text; set rollout.mix",
    ("divergence.type=sft",): "the student writes 100% of it",
    ("divergence.type=sft", GIVEN, "horizon={type: overlap}"): "sft asks no teacher, but horizon overlap",
    ("divergence.type=sft", GIVEN, "selection={type: top, by: [teacher_entropy]}"): "teacher_entropy is not known",
    ("divergence.type=sft", GIVEN, "divergence.support.type=top_k"): "divergence.support: unknown key",
    (GIVEN, "divergence.support.type=sampled"): "right in the mean only for tokens that the student drew",
    (GIVEN, "teacher={type: server, urls: ['http://x:1']}"): "a teacher at a URL scores only what the student drew",
    (GIVEN, "rollout.engine=server", "rollout.urls=['http://x:1']", "rollout.sync_dir=/x"): "use engine in_process",
    (GIVEN, "probes.every=5"): "probes finish what the student wrote",
    (GIVEN, "rollout.samples_per_prompt=2"): "one text to a prompt; set 1",
    ("rollout.mix={teacher: 1}", "horizon={type: custom, path: 'a:B'}"): "give it max_tokens",
    (GIVEN, "prompts={source: tiny, completion_column: y}"): "tiny brings its own",
}


@pytest.mark.parametrize(("overrides", "said"), REFUSED.items(), ids=lambda x: str(x)[:50])
def test_settings_that_do_not_go_together(overrides: tuple[str, ...], said: str) -> None:
    base = {"student": {"path": "a"}, "teacher": {"path": "b"}, "prompts": {"source": "x.jsonl"}}
    with pytest.raises(ConfigError, match=said):
        loader.parse(base, overrides)
