"""Where prompts come from: benchmarks' own training splits, filters, several sources, Python; and templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.assemble.tasks import make_task
from headstart.config.evaluation import MathBenchmark, MbppBenchmark
from headstart.config.loader import parse
from headstart.config.schema import Config, ModelConfig, PromptsConfig
from headstart.diagnosis.run import probe_questions
from headstart.errors import ConfigError, DataError, TemplateError
from headstart.models.load import load_tokenizer
from headstart.models.templates import build_prompts
from headstart.records import Problem
from headstart.tasks.prompts import load_problems, mixed
from headstart.tasks.training import training_task
from headstart.testing import word_tokenizer

PAIR = {"student": {"path": "tiny:student"}, "teacher": {"path": "tiny:teacher"}}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(prompts: dict[str, Any], **sections: Any) -> Config:
    return parse({**PAIR, "prompts": prompts, **sections})


@pytest.fixture
def mbpp(tmp_path: Path) -> str:
    def row(number: int) -> dict[str, Any]:
        asserts = [f"assert f{number}(1) == {number}"]
        return {"task_id": number, "text": f"Return {number}.", "code": f"def f{number}(x):\n    return {number}",
                "test_list": asserts, "level": number % 2}  # fmt: skip

    return jsonl(tmp_path / "mbpp.jsonl", [row(number) for number in (11, 12, 601, 602, 603)])


@pytest.fixture
def gsm8k(tmp_path: Path) -> str:
    rows = [{"question": f"What is w{n} and w1?", "answer": f"Add.\n#### {n + 1}"} for n in range(5)]
    return jsonl(tmp_path / "train.jsonl", rows)


# --- a benchmark's own training split --------------------------------------------------------------------------------


def test_the_training_split_of_mbpp_is_asked_as_its_test_is(mbpp: str) -> None:
    asked = make_task(MbppBenchmark(data=mbpp, split="train")).problems()
    trained = load_problems(PromptsConfig(source="mbpp", data=mbpp))
    assert [p.id for p in trained] == ["601", "602", "603"]
    assert trained == list(asked)
    assert [p.id for p in load_problems(PromptsConfig(source="mbpp", data=mbpp, split="all", limit=2))] == ["11", "12"]
    assert [p.id for p in load_problems(PromptsConfig(source="mbpp", data=mbpp, where={"level": 0}))] == ["602"]


@pytest.mark.parametrize("chat", [True, False])
def test_gsm8k_trains_in_the_form_it_is_tested_in(gsm8k: str, chat: bool) -> None:
    trained = load_problems(PromptsConfig(source="gsm8k", data=gsm8k, chat=chat))
    assert trained == list(make_task(MathBenchmark(data=gsm8k), chat=chat).problems())
    assert trained[0].answer == "1"
    if chat:
        assert trained[0].messages is not None
        assert trained[0].messages[0]["role"] == "system"


def test_a_benchmark_grades_its_own_prompts(gsm8k: str) -> None:
    made = config({"source": "gsm8k", "data": gsm8k}, diagnosis={"problems": 3})
    reader = load_tokenizer(made.student)
    asked = probe_questions(made, reader, reader)
    assert (asked.labelled, asked.left_out, len(asked.prompts)) == (True, 0, 3)
    assert asked.task.name == "gsm8k"
    assert asked.task.grade(asked.problems[2], "So it is \\boxed{3}.").correct


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({"source": "humaneval", "data": "x.jsonl"}, "humaneval has no training split; take prompts from google"),
        ({"source": "gsm8k", "data": "o/gsm8k", "split": "validation"}, "no split 'validation'; it has train, test"),
        ({"source": "mbpp", "data": "x.jsonl", "split": "dev"}, "has no split 'dev'; it has prompt, test, validation"),
        ({"source": "gsm8k", "data": "x.jsonl", "split": "test"}, "is a file, but prompts.split='test'"),
        ({"source": "mbpp"}, "task mbpp needs its data: pass the hub dataset"),
    ],
)
def test_splits_that_are_not_there(prompts: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_problems(config(prompts).prompts)


def test_what_a_benchmark_brings_itself_cannot_be_set() -> None:
    asked = {"source": "gsm8k", "data": "d", "column": "question", "subset": "main", "system": "Think."}
    with pytest.raises(ConfigError) as caught:
        config({**asked, "mix": [{"source": "more.jsonl", "data": "d", "weight": 1}]})
    said = str(caught.value)
    assert "prompts.column: found 'question', but gsm8k brings its own" in said
    assert "prompts.subset: found 'main', but gsm8k brings its own; remove it; a hub dataset goes by owner/name" in said
    assert "prompts.system: gsm8k is asked as its test is" in said
    assert "prompts.mix.0.data: is for a benchmark in source" in said
    with pytest.raises(ConfigError, match=r"prompts.where: found .*, but tiny brings its own"):
        config({"source": "tiny", "where": {"level": 1}})


# --- filters ---------------------------------------------------------------------------------------------------------

LEVELS = [{"prompt": f"w{n}", "level": [1, "1", True, 2.0][n % 4], "subject": "ab"[n % 2]} for n in range(8)]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"level": 1}, [0, 4]),
        ({"level": "1"}, [1, 5]),
        ({"level": True}, [2, 6]),
        ({"level": [1, 2]}, [0, 3, 4, 7]),
        ({"level": [1, 2], "subject": "b"}, [3, 7]),
        ({}, list(range(8))),
    ],
)
def test_rows_are_kept_by_their_values(tmp_path: Path, where: dict[str, Any], kept: list[int]) -> None:
    said: list[str] = []
    source = jsonl(tmp_path / "a.jsonl", LEVELS)
    found = load_problems(PromptsConfig(source=source, where=where), say=said.append)
    assert [p.id for p in found] == [f"a/{n}" for n in kept], "ids are those of the rows of the file"
    assert said == ([f"{source}: prompts.where keeps {len(kept)} of 8 rows"] if where else [])
    assert len(load_problems(PromptsConfig(source=source, where=where, limit=1))) == 1


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"levle": 1}, "has no column 'levle'; did you mean 'level'"),
        ({"level": [1, 3]}, r'no row has level = 3; the column holds 1 \(2 rows\), "1" \(2 rows\), true \(2 rows\)'),
        ({"level": 1, "subject": "b"}, "no row has all of prompts.where"),
    ],
)
def test_a_filter_that_keeps_nothing_says_what_is_there(tmp_path: Path, where: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_problems(PromptsConfig(source=jsonl(tmp_path / "a.jsonl", LEVELS), where=where))


# --- several sources -------------------------------------------------------------------------------------------------


def problems(name: str, count: int) -> list[Problem]:
    return [Problem(id=f"{name}/{n}", text=f"{name} {n}") for n in range(count)]


@settings(max_examples=50)
@given(
    st.integers(1, 60),
    st.lists(st.tuples(st.floats(0.01, 4.0), st.integers(1, 9)), min_size=1, max_size=3),
    st.integers(1, 60),
)
def test_weights_hold_in_every_beginning(size: int, parts: list[tuple[float, int]], fewer: int) -> None:
    others = [(weight, problems(f"s{n}", count)) for n, (weight, count) in enumerate(parts)]
    made = mixed(problems("main", size), others)
    taken = [0] * (len(parts) + 1)
    for problem in made:
        place = problem.meta.get("mix", 0)
        taken[place] += 1
        for n, (weight, _) in enumerate(parts, start=1):  # those due after a main prompt follow it one by one
            assert (taken[0] - 1) * weight - 1 <= taken[n] <= taken[0] * weight + 1
    assert taken[0] == size
    assert [p.text for p in made if p.meta.get("mix") == 1] == [f"s0 {n % parts[0][1]}" for n in range(taken[1])], (
        "a source begins again where it ends"
    )
    assert len({p.id for p in made}) == len(made)
    assert made == mixed(problems("main", size), others)
    shorter = mixed(problems("main", min(size, fewer)), others)
    assert made[: len(shorter)] == shorter


def test_sources_are_mixed_with_their_own_columns_and_graders(tmp_path: Path, gsm8k: str, mbpp: str) -> None:
    own = jsonl(tmp_path / "own.jsonl", [{"ask": f"w{n}", "gold": f"\\boxed{{{n}}}", "hard": n > 1} for n in range(4)])
    mix = [
        {"source": "mbpp", "data": mbpp, "weight": 1},
        {"source": own, "column": "ask", "answer_column": "gold", "where": {"hard": True}, "weight": 0.5},
    ]
    said: list[str] = []
    made = config({"source": "gsm8k", "data": gsm8k, "mix": mix}, diagnosis={"problems": 6})
    found = load_problems(made.prompts, say=said.append)
    assert [p.id for p in found][:6] == ["0", "mix1/601", "mix2/own/2", "1", "mix1/602", "2"]
    assert [p.id for p in found if "mix1" in p.id] == [f"mix1/{n}" for n in ("601", "602", "603", "601#2", "602#2")]
    assert said[-1] == f"a pass over the prompts has 5 from 5 of gsm8k, 5 from 3 of mbpp, 3 from 2 of {own}"
    task = training_task(made, 100)
    for name, right in (("1", "\\boxed{2}"), ("mix2/own/2", "It is \\boxed{2}.")):
        (problem,) = (p for p in found if p.id == name)
        assert task.grade(problem, right).correct
        assert not task.grade(problem, "\\boxed{7}").correct
    (program,) = (p for p in found if p.id == "mix1/601#2")
    assert task.grade(program, "no program here").status == "no_answer"
    reader = load_tokenizer(made.student)
    asked = probe_questions(made, reader, reader)
    assert (len(asked.problems), asked.labelled) == (6, True)
    assert probe_questions(made, reader, reader, found) == asked or asked.problems == found[:6]


# --- prompts from Python ---------------------------------------------------------------------------------------------


def test_prompts_from_python_in_every_form() -> None:
    import datasets

    made = PromptsConfig(source="in memory")
    turns = [{"role": "user", "content": "w1"}]
    own = Problem(id="mine", text="w9")
    rows: list[Any] = ["w1", turns, tuple(turns), {"prompt": "w1"}, {"prompt": turns, "id": "named"}, own]
    found = load_problems(made, rows)
    assert [p.id for p in found] == [*(f"in memory/{n}" for n in range(4)), "named", "mine"]
    assert all(p.messages == tuple(turns) for p in found[:5])
    assert found[5] is own
    table = datasets.Dataset.from_list([{"prompt": turns, "level": 1}, {"prompt": turns, "level": 2}])
    (kept,) = load_problems(PromptsConfig(source="in memory", where={"level": 2}), table)
    assert kept.messages == tuple(turns)
    for wrong, said in (([], "empty"), ([3], "prompt 1 is a int"), ([{"text": "w"}], "no column 'prompt'")):
        with pytest.raises(DataError, match=said):
            load_problems(made, wrong)
    with pytest.raises(DataError, match="passed in from Python; pass the same again"):
        load_problems(made)


# --- chat templates --------------------------------------------------------------------------------------------------


def test_a_base_student_takes_a_template_from_a_file_or_from_the_teacher(tmp_path: Path) -> None:
    bare = word_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "chat")
    for folder in ("base", "chat"):
        (tmp_path / folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    student, teacher = {"path": str(tmp_path / "base")}, {"path": str(tmp_path / "chat")}
    plain = parse({"student": student, "teacher": teacher, "prompts": {"source": "tiny", "limit": 2}})
    asked = load_problems(plain.prompts)
    readers = [load_tokenizer(plain.student), load_tokenizer(plain.teacher_tokenizer)]
    with pytest.raises(TemplateError, match=r"student's tokenizer has no chat template.*chat_template.*teacher"):
        build_prompts(asked, readers[0], readers[1], plain.prompts)
    made = parse(plain.model_dump(mode="json"), ["student.chat_template=teacher"])
    assert made.student.chat_template == str(tmp_path / "chat")
    prompt = build_prompts(asked, load_tokenizer(made.student), readers[1], made.prompts).prompts[0]
    assert prompt.token_ids == prompt.teacher_token_ids
    (tmp_path / "own.jinja").write_text("{% for m in messages %}w3 {{ m['content'] }}{% endfor %}")
    reader = load_tokenizer(ModelConfig(path=student["path"], chat_template=str(tmp_path / "own.jinja")))
    assert reader.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w3 w1"
    reader.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(ModelConfig(path=str(tmp_path / "out"))).chat_template == reader.chat_template
    for place, said in ((student["path"], "has no chat template either"), ("none.jinja", "none.jinja cannot be read")):
        with pytest.raises(TemplateError, match=said):
            load_tokenizer(ModelConfig(path=student["path"], chat_template=place))
