"""The same weights twice, and a test that asks in another form than is trained."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headstart.assemble.pair import Pair, open_pair
from headstart.assemble.tasks import Questions
from headstart.checks.findings import Finding, Preflight
from headstart.checks.form import identical, prompt_form
from headstart.checks.run import run_preflight
from headstart.config import loader
from headstart.distillation.run import distill
from headstart.records import Problem
from headstart.testing import word_tokenizer
from preflight_pairs import Side, loaded, of, prompt, write_sides
from support import make_config

LORA = "tuning={type: lora, r: 4}"


def compared(pair: Pair) -> Finding | None:
    return identical(pair, [prompt(5, 6)])


@pytest.mark.parametrize("tuning", ["tuning.type=full", LORA])
def test_the_same_weights_twice_warn(tmp_path: Path, tuning: str) -> None:
    """In preflight and before a run; an adapter in training changes nothing yet."""
    config = make_config(tmp_path, f"teacher.path={tmp_path / 'student'}", tuning, "training.steps=1")
    (finding,) = of(run_preflight(config, quick=True), "two models")
    assert finding.severity == "warning"
    assert "nothing to learn" in finding.message
    if tuning == LORA:
        with pytest.warns(UserWarning, match=r"the divergence is 0 at every token.*; choose another teacher"):
            distill(config, out=tmp_path / "run")


def test_the_same_weights_in_a_coarser_type_are_the_same(tmp_path: Path) -> None:
    config = make_config(tmp_path, f"teacher={{path: {tmp_path / 'student'}, dtype: bfloat16}}")
    assert compared(open_pair(config)) is not None


def test_another_view_of_the_prompt_is_something_to_learn(tmp_path: Path) -> None:
    config = make_config(tmp_path, f"teacher.path={tmp_path / 'student'}", "prompts.teacher_view.system=w1 w2")
    (finding,) = of(run_preflight(config, quick=True), "two models")
    assert (finding.severity, finding.remedy) == ("note", None)


def test_other_weights_are_no_finding(tmp_path: Path) -> None:
    """Of another seed, of another size, and where a merged adapter has changed one matrix."""
    pair, _ = loaded(write_sides(tmp_path / "seed", Side(), Side(seed=2)))
    assert compared(pair) is None
    assert compared(open_pair(make_config(tmp_path / "size"))) is None
    pair, _ = loaded(write_sides(tmp_path / "merged", Side(), Side()))
    assert compared(pair) is not None
    weight = pair.teacher.model.model.layers[-1].self_attn.q_proj.weight
    weight.data += 1e-3 * weight[:1].T @ weight[:1]
    assert compared(pair) is None


# --- the form of the prompts ------------------------------------------------------------------------------------------

SUMS = [f"What is {a} + {a + 1} here?" for a in range(1, 30)]
ASK = "Please put the final answer into a box."


def chats(texts: list[str], system: str | None = None) -> list[Problem]:
    first: Any = () if system is None else ({"role": "system", "content": system},)
    return [Problem(id=text, messages=(*first, {"role": "user", "content": text})) for text in texts]


def form(
    trained: list[Problem], asked: list[Problem], task: str = "{type: custom, path: a.b:C}", *over: str
) -> Finding:
    models = {"student": {"path": "s"}, "teacher": {"path": "t"}, "prompts": {"source": "p.jsonl"}}
    config = loader.parse(models, [f"evaluation.task={task}", *over])
    pair: Any = SimpleNamespace(config=config, tokenizer=word_tokenizer())
    prompts = [prompt(5, 6, index=i) for i in range(len(trained))]
    questions: Any = Questions(SimpleNamespace(name="t"), asked, prompts[:1], None)  # type: ignore[arg-type]
    found = prompt_form(pair, trained, prompts, questions)
    assert found is not None
    return found


def test_one_form_is_ok() -> None:
    assert form(chats(SUMS), chats(SUMS[:4])).severity == "ok"
    assert form(chats(SUMS), chats([SUMS[0]])).severity == "ok"
    assert form(chats([f"{ASK} {s}" for s in SUMS]), chats([f"{ASK} {s}" for s in SUMS[:4]])).severity == "ok"
    texts = [Problem(id=s, text=s) for s in SUMS]
    assert form(texts, texts[:3], "{type: custom, path: a.b:C}", "prompts.chat=false").severity == "ok"


@pytest.mark.parametrize(
    "wrap", [f"{ASK}\n\n{{}}", f"{{}}\n\n{ASK}", f"Q: 1+1?\nA: 2\n\nThe next of them: {{}}\n\n{ASK}"]
)
def test_an_instruction_that_only_the_test_has_warns(wrap: str) -> None:
    finding = form(chats(SUMS), chats([wrap.format(s) for s in SUMS]))
    assert finding.severity == "warning"
    assert ASK.split(".")[0][10:] in finding.message
    assert "hardly any in training" in finding.message
    assert finding.remedy is not None
    assert "prompts.system" in finding.remedy


def test_an_instruction_that_only_training_has_warns() -> None:
    finding = form(chats([f"{s} {ASK}" for s in SUMS]), chats(SUMS))
    assert finding.severity == "warning"
    assert "every prompt of the training" in finding.message


def test_how_such_questions_begin_is_no_instruction() -> None:
    """Four questions of a test that begin alike, as some of the training prompts do."""
    trained = [f"Write a function to find the {s}" for s in SUMS[:6]] + [f"Write code for {s}" for s in SUMS[6:]]
    assert form(chats(trained), chats([f"Write a function to find the {s}" for s in SUMS[20:24]])).severity == "ok"


def test_system_turns_are_compared_as_they_are_shown() -> None:
    """A benchmark brings its own or none; other tasks get that of the configuration."""
    mine = f"prompts.system={ASK}"
    gsm8k = "{type: gsm8k, data: x.jsonl}"
    assert form(chats(SUMS), chats(SUMS, ASK), gsm8k, mine).severity == "ok"
    assert form(chats(SUMS), chats(SUMS), "{type: custom, path: a.b:C}", mine).severity == "ok"
    finding = form(chats(SUMS), chats(SUMS, ASK), gsm8k)
    assert finding.severity == "warning"
    assert f"its system turn is {ASK!r}, in training none" in finding.message
    assert f"its system turn is none, in training {ASK!r}" in form(chats(SUMS), chats(SUMS), gsm8k, mine).message


def test_chat_turns_against_plain_text() -> None:
    finding = form(chats(SUMS), [Problem(id=s, text=s) for s in SUMS])
    assert "one is chat turns, the other plain text" in finding.message


def test_both_prompts_are_shown_before_a_run(tmp_path: Path) -> None:
    rows = [f'{{"prompt": "w{i} w9 w8 w7 w6 w5", "answer": "w1"}}\n' for i in range(4)]
    (tmp_path / "task.jsonl").write_text("".join(rows))
    task = f"evaluation={{task: {{type: jsonl, path: {tmp_path / 'task.jsonl'}}}, samples: 1, max_tokens: 4}}"
    config = make_config(tmp_path, task, "training.steps=1", "horizon.tokens=2")
    with pytest.warns(UserWarning, match="w9 w8 w7 w6 w5") as said:
        distill(config, out=tmp_path / "run")
    (text,) = [str(w.message) for w in said if "another form" in str(w.message)]
    assert "a prompt of the training: '<user> w0 <end> <assistant>'" in text
    assert "a prompt of the evaluation: '<user> w0 w9 w8 w7 w6 w5 <end> <assistant>'" in text


def given(folder: Path, rows: list[dict[str, str]], *more: str) -> Preflight:
    config = make_config(
        folder, "rollout.mix={given: 1}", "prompts.completion_column=answer", "divergence.type=sft", *more
    )
    Path(config.prompts.source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_preflight(config, quick=True)


def test_given_responses_are_measured_against_the_horizon(tmp_path: Path) -> None:
    """Of 3, 5 and 7 tokens with their stop token, at a horizon of 6; and the same weights are no reason to warn."""
    rows = [{"prompt": f"w{n}", "answer": " ".join(["w3"] * n)} for n in (2, 4, 6)]
    findings = given(tmp_path, rows, f"teacher.path={tmp_path / 'student'}")
    (finding,) = of(findings, "given text")
    assert finding.severity == "ok"
    assert (
        "3 given responses of 3 to 7 tokens, half of them under 5; 33% are longer than the horizon" in finding.message
    )
    assert of(findings, "two models") == []


def test_a_column_that_repeats_the_prompt_is_a_warning(tmp_path: Path) -> None:
    (finding,) = of(given(tmp_path, [{"prompt": f"w{n} w1", "answer": f"w{n} w1"} for n in range(9)]), "given text")
    assert (finding.severity, finding.figures["leaked"]) == ("warning", 9)
