"""The configuration: loading, overrides, what is said of mistakes, and what is printed."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headstart.config.differences import differences
from headstart.config.evaluation import JsonlTask, TinyTask
from headstart.config.horizon import CustomHorizon, FixedHorizon, FullHorizon
from headstart.config.loader import load, load_study, parse
from headstart.config.render import MISSING, annotated_default, json_schema, places, resolved, root
from headstart.config.schema import Config
from headstart.config.text import read_yaml, write_yaml
from headstart.errors import ConfigError

TASKS = "tiny, late, jsonl, gsm8k, math500, aime, humaneval, humaneval_plus, mbpp_plus, mbpp, bfcl"
REQUIRED = ("student.path=a", "teacher.path=b", "prompts.source=tiny")
PHRASES_OF_PYDANTIC = ("Input should", "Field required", "Extra inputs", "https://", "tag", "literal[", "[type=")


HORIZONS = (
    "fixed, full, fraction, diagnosed, damage, recoverability, mixed, roulette, scheduled, overlap, kl_coverage, "
)


def config(*overrides: str) -> Config:
    return load(None, [*REQUIRED, *overrides])


def complaint(*overrides: str, required: tuple[str, ...] = REQUIRED) -> list[str]:
    """The lines of the error, without its first."""
    with pytest.raises(ConfigError) as caught:
        load(None, [*required, *overrides])
    text = str(caught.value)
    assert not [phrase for phrase in PHRASES_OF_PYDANTIC if phrase in text]
    first, *lines = text.split("\n  ")
    assert first == f"configuration: {len(lines)} problem{'s' * (len(lines) != 1)}"
    return lines


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def laughs(step: str, start: str = "[x, x]") -> str:
    """YAML whose anchors multiply: each holds the one before it several times."""
    lines = [f"a0: &a0 {start}"]
    lines += [f"a{i}: &a{i} {step.format(f'*a{i - 1}')}" for i in range(1, 40)]
    return "\n".join(lines)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_and_overrides_on_top(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "student: {path: a}\nteacher: {path: b}\nprompts: {source: p.jsonl}\n"
        "optimizer: {lr: 5e-5, betas: [0.9, 0.95]}\n"
        "training:\n  steps: 6\nevaluation: {task: {type: jsonl, path: t.jsonl}}\n",
    )
    loaded = load(path, ["training.steps=7", "training.seed=1", "training.steps=8"])
    assert (loaded.training.steps, loaded.training.seed) == (8, 1)
    assert loaded.optimizer.lr == 5e-5
    assert loaded.optimizer.betas == (0.9, 0.95)
    assert loaded.evaluation is not None
    assert loaded.evaluation.task == JsonlTask(path=Path("t.jsonl"))  # as written, not moved beside the file


@pytest.mark.parametrize("text", ["5e-5", "5E-5", "+5.0e-5", ".5e-4", "0.00005", "5.e-5"])
def test_floats_are_floats(text: str) -> None:
    assert config(f"optimizer.lr={text}").optimizer.lr == pytest.approx(5e-5, rel=1e-12)


def test_whole_numbers_words_and_dates_stay_what_they_are() -> None:
    found = read_yaml("[100, 1_000, e5, 1e, 2025-01-31, '5e-5', .5.5]")
    assert found == [100, 1000, "e5", "1e", "2025-01-31", "5e-5", ".5.5"]
    assert config("student.revision=2025-01-31").student.revision == "2025-01-31"


def test_merge_keys_may_repeat_what_they_merge() -> None:
    text = "a: &a {path: x, dtype: float32}\nb: {<<: *a, path: y}\nc: {<<: *a}"
    assert read_yaml(text)["b"] == {"path": "y", "dtype": "float32"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training:\n  steps: 1\n  seed: 2\n  steps: 3\n", "line 4, column 3: the key steps stands here and in line 2"),
        ("student: {path: a\nteacher: b\n", "line 2, column 8: "),
        ("student:\n\tpath: a\n", "line 2, column 1: "),
        ("- student\n- teacher\n", 'found ["student", "teacher"]; a configuration is a mapping of sections'),
        ("just text", 'found "just text"; a configuration is a mapping'),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: "),
        ("a: !!python/object:os.system x\n", "line 1, column 4: "),
        ("a: !!set {x}\n", "cannot hold a set"),
        ("a: \x07\n", "not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("{a: " * 40_000, "nested too deeply"),
        ("- " * 5000, "nested too deeply"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ("".join(f"a{i}: &a{i} [*a{i - 1}]\n" if i else "a0: &a0 x\n" for i in range(70)), "nested too deeply"),
        ("x: &a [*a]\n", "anchors that hold themselves"),
        ("x: &a {y: [1, *a]}\n", "anchors that hold themselves"),
        ("x: &a {<<: *a}\n", "anchors that hold themselves"),
        (laughs("[{0}, {0}, {0}]"), "anchors that hold themselves, or make more than 5,000 values"),
        (laughs("{{x: {0}, y: {0}}}"), "anchors that hold themselves, or make more than 5,000 values"),
        (laughs("{{<<: [{0}, {0}]}}", "{x: 1}"), "anchors that hold themselves, or make more than 5,000 values"),
        ("".join(f"a{i}: 1\n" for i in range(20_000)), "more than 5,000 keys and values"),
        ("training: {" + ", ".join(f"a{i}: 1" for i in range(15_000)) + "}", "more than 5,000 keys and values"),
        ("a: [" + "1, " * 9000 + "]", "more than 5,000 keys and values"),
        ("# nothing\n" * 30_000, "300,000 characters, which is no configuration"),
        ("a: " + "x" * 10**7, "characters, which is no configuration"),
        ("a: !!binary aGVsbG8=\n", "cannot hold a bytes"),
        ("a: !!timestamp 2025-01-31\n", "cannot hold a date"),
        ("!!timestamp 2025-01-31: 1\n", "not datetime.date"),
        ("a: !!timestamp 2025-13-41\n", 'line 1, column 4: "2025-13-41" cannot be read as timestamp'),
        ("a: !!timestamp soon\n", 'line 1, column 4: "soon" cannot be read as timestamp'),
        ("a: !!int many\n", '"many" cannot be read as int'),
        ("a: !!int ''\n", '"" cannot be read as int'),
        ("a: !!bool maybe\n", '"maybe" cannot be read as bool'),
        ("a: !!float x\n", '"x" cannot be read as float'),
        ("a: 1" + "0" * 5000, "... cannot be read as int"),
        ("a: 0x" + "f" * 5000, "... cannot be read as int"),
        ("a: 1" + ":59" * 3000, "... cannot be read as int"),
        ("a: !zork x\n", "line 1, column 4: "),
        ("<<: 5\n", "line 1, column 5: expected a mapping"),
        ("[a]: 1\n", "line 1, column 1: found unhashable key"),
        ("a: *b\n", "line 1, column 4: found undefined alias"),
        ("a: x\0\n", "not YAML"),
        ("5", "found 5; a configuration is a mapping"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    for read in (load, load_study):
        start = time.process_time()
        with pytest.raises(ConfigError, match=re.escape(said)) as caught:
            read(path)
        assert time.process_time() - start < 1.0
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_a_byte_order_mark_and_anchors_are_fine(tmp_path: Path) -> None:
    text = "\ufeffstudent: &m {path: a, dtype: float32}\nteacher: {<<: *m, path: b}\nprompts: {source: tiny}\n"
    assert load(write(tmp_path, text)).teacher.dtype == "float32"


@pytest.mark.parametrize("count", [31, 2000, 50_000])
def test_only_so_many_problems_are_listed(count: int) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse({"training": {f"zork{i}": 1 for i in range(count)}})
    first, *lines = str(caught.value).split("\n  ")
    assert first == "configuration: more than 30 problems"
    assert len(lines) == 30
    assert time.process_time() - start < 3.0


def test_nested_python_data_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(ConfigError, match="recursion"):
        parse(deep)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; `headstart init --out"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    for path in (Path("x" * 5000), Path("d/" * 3000)):
        with pytest.raises(ConfigError, match=r"cannot be read .File name too long") as caught:
            load(path)
        assert len(str(caught.value)) < 500
    (tmp_path / "wide.yaml").write_bytes("student: {}\n".encode("utf-16"))
    with pytest.raises(ConfigError, match="byte 0 is not UTF-8"):
        load(tmp_path / "wide.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"student: \xe9\n")
    with pytest.raises(ConfigError, match="byte 9 is not UTF-8"):
        load(tmp_path / "latin.yaml")


def test_an_empty_file_lacks_what_is_required(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, "# nothing yet\n"))
    assert [line.split(":")[0] for line in str(caught.value).split("\n  ")[1:]] == ["student", "teacher", "prompts"]


def test_parse_leaves_its_data_alone_and_takes_python_values() -> None:
    data = {"student": {"path": "a"}, "teacher": {"path": "b"}, "prompts": {"source": "x"}, "tuning": {"r": 8}}
    before = json.dumps(data)
    parsed = parse(data | {"output": {"dir": Path("runs/a")}, "horizon": FixedHorizon(tokens=7)}, ["tuning.type=full"])
    assert json.dumps(data) == before
    assert (parsed.output.dir, parsed.tuning.type, parsed.horizon) == (Path("runs/a"), "full", FixedHorizon(tokens=7))
    with pytest.raises(ConfigError, match="cannot hold a set"):
        parse(data | {"training": {"steps": {1}}})


# --- overrides -------------------------------------------------------------------------------------------------------


def test_a_type_left_out_is_the_default_type() -> None:
    assert config("horizon.tokens=50").horizon == FixedHorizon(tokens=50)
    assert config("tuning={r: 8}").tuning.type == "lora"


def test_changing_the_type_drops_the_keys_of_the_previous_one() -> None:
    assert config("horizon={type: fixed, tokens: 50}", "horizon.type=full").horizon == FullHorizon()
    kept = config("horizon={type: full, max_tokens: 9}", "horizon.type=custom", "horizon.path=m:H").horizon
    assert kept == CustomHorizon(path="m:H")
    both = config("divergence={type: reverse_kl, support: {type: top_k, k: 3}}", "divergence.type=jsd").divergence
    assert both.support.type == "top_k"  # both types have it


def test_a_key_set_by_an_override_is_never_dropped_silently() -> None:
    for order in (["horizon.tokens=5", "horizon.type=full"], ["horizon.type=full", "horizon.tokens=5"]):
        assert complaint(*order) == [
            "horizon.tokens: unknown key for type full (found 5); it belongs to horizon.type fixed or damage or "
            "recoverability or mixed or roulette or scheduled or overlap"
        ]


def test_null_and_back(tmp_path: Path) -> None:
    assert config("evaluation.task.type=tiny", "evaluation=null").evaluation is None
    made = config("evaluation=null", "evaluation.task.type=tiny", "evaluation.every=10").evaluation
    assert made is not None
    assert (made.task, made.every) == (TinyTask(), 10)


def test_values_are_yaml() -> None:
    made = config(
        "prompts.template_kwargs.enable_thinking=false",
        "prompts.system='Answer: yes'",
        "tuning.targets=[q_proj, v_proj]",
        "output.dir=runs/lr=1",
        "prompts.subset=",
    )
    assert made.prompts.template_kwargs == {"enable_thinking": False}
    assert made.prompts.system == "Answer: yes"
    assert made.tuning.type == "lora"
    assert made.tuning.targets == ("q_proj", "v_proj")
    assert made.output.dir == Path("runs/lr=1")
    assert made.prompts.subset is None


# --- mistakes --------------------------------------------------------------------------------------------------------

LARGEST = "the largest whole number is 9,223,372,036,854,775,807"
PATHS = "no file name has over 255 bytes, no path over 4,095 or a NUL"
MISTAKES: dict[str, str] = {
    "training.step=5": "training.step: unknown key (found 5); did you mean training.steps?",
    "lr=5e-5": "lr: unknown key (found 5e-05); did you mean optimizer.lr?",
    "horizn.tokens=5": 'horizn: unknown key (found {"tokens": 5}); did you mean horizon?',
    "training.batch_size=8": "training.batch_size: unknown key (found 8); did you mean rollout.batch_size or "
    "evaluation.batch_size or diagnosis.batch_size?",
    "learning_rates=1": "learning_rates: unknown key (found 1); allowed: student, teacher, teachers, tuning, sharding, "
    "prompts, rollout, horizon, probes, divergence, selection, optimizer, schedule, training, evaluation, diagnosis, "
    "checkpoint, tracking, output",
    "horizon.tokns=5": "horizon.tokns: unknown key for type fixed (found 5); did you mean horizon.tokens?",
    "horizon.max_tokens=5": "horizon.max_tokens: unknown key for type fixed (found 5); it belongs to "
    "horizon.type full or fraction or diagnosed or damage or recoverability or mixed or roulette or scheduled or "
    "overlap or kl_coverage",
    "divergence.support.k=8": "divergence.support.k: unknown key for type full (found 8); it belongs to "
    "divergence.support.type top_k",
    "horizon.type=ful": 'horizon.type: found "ful"; allowed: ' + HORIZONS + "custom; did you mean full?",
    "horizon.type=null": "horizon.type: found null; allowed: " + HORIZONS + "custom",
    "horizon=full": 'horizon: found "full"; allowed: a mapping with type ' + HORIZONS[:-2] + " or custom; did you "
    "mean full?",
    "horizon.tokens=0": "horizon.tokens: found 0; allowed: a whole number > 0",
    "horizon.tokens=1.5": "horizon.tokens: found 1.5; allowed: a whole number > 0",
    "horizon.tokens=true": "horizon.tokens: found true; allowed: a whole number > 0",
    "horizon.tokens=null": "horizon.tokens: found null; allowed: a whole number > 0",
    'horizon.tokens="100"': 'horizon.tokens: found "100"; allowed: a whole number > 0',
    "horizon.type=custom": "horizon.path: missing, but required; allowed: text; for example "
    "my_package.horizons:MyHorizon",
    "student.dtype=bf16": 'student.dtype: found "bf16"; allowed: auto, float32, bfloat16 or float16; did you mean '
    "bfloat16?",
    "student.revision=1234567": "student.revision: found 1234567; allowed: text, or null (put text in quotes)",
    "student.trust_remote_code=1": "student.trust_remote_code: found 1; allowed: true or false",
    "rollout.top_p=1.5": "rollout.top_p: found 1.5; allowed: a number > 0 and <= 1",
    "rollout.temperature=.nan": "rollout.temperature: found NaN; allowed: a number >= 0",
    "optimizer.lr=.inf": "optimizer.lr: found Infinity; allowed: a number > 0, or null",
    "optimizer.betas=[0.9]": "optimizer.betas: found [0.9]; allowed: a list of 2, each a number >= 0 and < 1",
    "optimizer.betas=[0.9, 1]": "optimizer.betas: found [0.9, 1]; allowed: a list of 2, each a number >= 0 and < 1",
    "tuning.targets=[]": "tuning.targets: found []; allowed: all-linear, or a list of at least 1, each text",
    "schedule.type=cosin": 'schedule.type: found "cosin"; allowed: cosine, linear or constant; did you mean cosine?',
    "checkpoint=5": "checkpoint: found 5; allowed: a mapping with keys of every, keep_last, keep_best",
    "prompts.template_kwargs=x": 'prompts.template_kwargs: found "x"; allowed: a mapping',
    "prompts.system=Answer: 5": 'prompts.system: found {"Answer": 5}; allowed: text, or null (put text in quotes)',
    "evaluation.every=5": f"evaluation.task: missing, but required; allowed: a mapping with type {TASKS} or custom; "
    "for example {type: tiny}",
    "evaluation.task.limit=5": f"evaluation.task.type: missing, but required; allowed: {TASKS}, custom",
    "training.steps": "training.steps: not an override; write section.key=value, such as training.steps=100",
    "training..steps=5": "training..steps=5: not an override; write section.key=value, such as training.steps=100",
    "=5": "=5: not an override; write section.key=value, such as training.steps=100",
    "training.steps=1" + "0" * 5000: 'training.steps: found "1'
    + "0" * 55
    + '...; "1'
    + "0" * 55
    + "... cannot be read "
    "as int",
    "training.steps=1" + "0" * 30: "training.steps: found 1" + "0" * 30 + f"; {LARGEST}",
    "training.seed=-9223372036854775809": f"training.seed: found -9223372036854775809; {LARGEST}",
    "training.steps=.nan": "training.steps: found NaN; allowed: a whole number > 0",
    "optimizer.lr=1" + "0" * 400: "optimizer.lr: found 1" + "0" * 56 + "...; allowed: a number > 0, or null",
    "student.path=" + "a" * 5000: 'student.path: found "' + "a" * 56 + f"...; {PATHS}",
    "student.adapter=" + "a" * 256: 'student.adapter: found "' + "a" * 56 + f"...; {PATHS}",
    "prompts.source=" + "a/" * 2100 + "x.jsonl": 'prompts.source: found "' + "a/" * 28 + f"...; {PATHS}",
    "output.dir=runs/" + "é" * 128: 'output.dir: found "runs/' + "é" * 51 + f"...; {PATHS}",
    'teacher.path="a\\0b"': f'teacher.path: found "a\\u0000b"; {PATHS}',
    "evaluation={task: {type: jsonl, path: " + "a" * 300 + "}}": 'evaluation.task.path: found "'
    + "a" * 56
    + f"...; {PATHS}",
    "training=&a [*a]": 'training: found "&a [*a]"; anchors that hold themselves, or make more than 5,000 values; '
    "write them out",
    "training=!!set {x}": 'training: found "!!set {x}"; a configuration cannot hold a set',
    "training=!!binary aGk=": 'training: found "!!binary aGk="; a configuration cannot hold a bytes',
    "training.steps=!!timestamp x": 'training.steps: found "!!timestamp x"; "x" cannot be read as timestamp',
    "training=" + "[" * 100_000: 'training: found "' + "[" * 56 + "...; nested too deeply",
    "a." * 30_000 + "b=1": "a." * 48 + "a...: no such key; write section.key, such as training.steps",
    "k" * 100_000: "k" * 97 + "...: not an override; write section.key=value, such as training.steps=100",
    "k" * 100_000 + "=1": "k"
    * 97
    + "...: unknown key (found 1); allowed: student, teacher, teachers, tuning, sharding, "
    "prompts, rollout, horizon, probes, divergence, selection, optimizer, schedule, training, evaluation, diagnosis, "
    "checkpoint, tracking, output",
    "prompts.system=[1": 'prompts.system: found "[1", which is not YAML; put text in quotes: \'prompts.system="..."\'',
}


@pytest.mark.parametrize(("override", "said"), MISTAKES.items(), ids=lambda text: text[:40])
def test_what_is_said_of_a_mistake(override: str, said: str) -> None:
    assert complaint(override) == [said]


@pytest.mark.parametrize("value", ["!!python/object:os.system x", "!!python/name:os.system", "!zork x", "{a: !b c}"])
def test_unknown_types_of_values_are_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"1 problem\n  training: found .*; could not determine a constructor for"):
        config(f"training={value}")


def test_thousands_of_overrides_belong_into_a_file() -> None:
    said = complaint(*(f"zork{i}=1" for i in range(20_000)), required=())
    assert said[0] == "20,000 overrides: write them into a YAML file"


def test_half_a_surrogate_pair_is_refused() -> None:
    for override in ('prompts.system="\\ud83d"', 'zork="\\ud83d"', "\udcff=1"):
        assert complaint(override) == ["the configuration holds text that is not Unicode, or is nested too deeply"]
    assert "not YAML" in complaint("student.path=\udcff")[0]  # a byte of the shell that is not UTF-8


STUDY = "base: {student: {path: a}, teacher: {path: b}, prompts: {source: tiny}, evaluation: {task: {type: tiny}}}\n"


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("{training.steps: 1" + "0" * 30 + "}", f"arm b: training.steps: found 1{'0' * 30}; {LARGEST}"),
        ("{student.path: " + "a" * 300 + "}", f"arm b: student.path: .*; {PATHS}"),
        ("{? " + "a." * 5000 + "b : 1}", r"arm b: a\.a\..*\.\.\.: no such key"),
        ("{'': 1}", "arm b: : no such key"),
        ("{training..steps: 1}", r"arm b: training\.\.steps: no such key"),
        ("{" + ", ".join(f"zork{i}: 1" for i in range(500)) + "}", "study.yaml: more than 30 problems"),
        ("{" + ", ".join(f"zork{i}: 1" for i in range(1500)) + "}", "arm b: 1,500 overrides"),
        ("{training: " + "[" * 40 + "]" * 40 + "}", "arm b: training: found"),
        ("{training.steps: .nan}", "arm b: training.steps: found NaN"),
        ("{training.steps: !!set {x}}", "cannot hold a set"),
    ],
    ids=lambda text: text[:30],
)
def test_arms_of_a_study(tmp_path: Path, arm: str, said: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"{STUDY}arms:\n  a: {{}}\n  b: {arm}\n")
    start = time.process_time()
    with pytest.raises(ConfigError, match=said):
        load_study(path)
    assert time.process_time() - start < 1.0


def test_many_bad_arms_and_a_base_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY + "arms:\n" + "".join(f"  a{i}: {{zork: 1}}\n" for i in range(800)))
    with pytest.raises(ConfigError, match=r"study.yaml: more than 30 problems") as caught:
        load_study(path)
    assert str(caught.value).count("\n") == 30
    path.write_text(f"base: {'a' * 5000}\narms: {{a: {{}}, b: {{training.steps: 2}}}}\n")
    with pytest.raises(ConfigError, match=r"cannot be read .File name too long"):
        load_study(path)


def test_a_key_below_a_value() -> None:
    assert complaint("optimizer.lr=1", "optimizer.lr.x=5") == [
        "optimizer.lr.x: optimizer.lr is 1 and has no keys; set optimizer.lr as a whole"
    ]


def test_missing_sections_are_said_plainly() -> None:
    assert complaint(required=()) == [
        "student: missing, but required; for example {path: Qwen/Qwen2.5-Math-1.5B}",
        "teacher: missing, but required; for example {path: Qwen/Qwen3-1.7B}",
        "prompts: missing, but required; for example {column: question, source: openai/gsm8k, subset: main}",
    ]
    assert complaint("student.dtype=auto", required=REQUIRED[1:]) == [
        "student.path: missing, but required; allowed: text; for example Qwen/Qwen3-1.7B"
    ]


def test_every_mistake_is_said_at_once() -> None:
    some = [
        "training.step=5",
        "horizon.tokns=5",
        "student.dtype=bf16",
        "optimizer.betas=[0.9]",
        "rollout.top_p=1.5",
        "=5",
    ]
    assert sorted(complaint(*some)) == sorted(MISTAKES[one] for one in some)


def test_settings_that_do_not_go_together_are_said_together() -> None:
    sampled, divided, output = complaint(
        "divergence.support.type=sampled",
        "rollout.temperature=0",
        "tuning.type=full",
        "output.format=both",
        "training.micro_batch=2",
        "training.memory_budget_gib=0.5",
    )
    assert sampled.startswith("divergence.support: type sampled needs rollout.temperature > 0 (found 0)")
    assert divided.startswith("training.micro_batch: found 2 beside memory_budget_gib 0.5")
    assert output.startswith("output.format: both needs tuning.type lora (found full)")


# --- printing --------------------------------------------------------------------------------------------------------


def test_the_annotated_default_is_the_default(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, annotated_default()))
    bare = {name: loaded.model_dump()[name] for name in ("student", "teacher", "prompts")}
    assert loaded == Config(**bare)
    assert loaded.student.model_dump(exclude={"path"}) == Config(**bare).teacher.model_dump(exclude={"path"})


def test_the_annotated_default_names_and_describes_everything() -> None:
    text = annotated_default()
    words = " ".join(re.sub(r"^[# ]+", "", line) for line in text.splitlines())
    for place in places(root(Config)):
        assert place.description or place.key == "type", f"{place.path} has no description"
        assert place.description in words
        assert place.default is not MISSING or place.example is not MISSING
        assert re.search(rf"^[# ]*{place.key}:", text, re.MULTILINE)


def uncommented() -> list[str]:
    """The annotated default once for every commented-out block, with that block in place of what it may replace."""
    lines = annotated_default().splitlines()
    versions = []
    for start, line in enumerate(lines):
        if not re.fullmatch(r" *# or:", line):
            continue
        margin = line.index("#")
        prefix, key = line[:margin], lines[start + 1][margin + 2 :]
        block = []
        for other in lines[start + 1 :]:
            if not other.startswith(f"{prefix}# ") or other == line:
                break
            block.append(prefix + other[margin + 2 :])
        first = next(at for at, other in enumerate(lines) if other.startswith(prefix + key))
        after = next(at for at in range(first + 1, start + 1) if not lines[at].startswith(f"{prefix} "))
        text = "\n".join([*lines[:first], *block, *lines[after:]])
        # Two horizons ask for more than themselves: something to judge by, and small gradients.
        text = text.replace("label_free: false", "label_free: true")
        if "  type: server" in block:  # a teacher at a URL scores candidates only
            text = text.replace("  support:\n    type: full", "  support:\n    type: top_k", 1)
        if "  type: sft" in block:  # which is for text of others
            text = text.replace("    given: 0.0", "    given: 1.0", 1)
        versions.append(text)
    return versions


def test_every_commented_out_block_works_in_place_of_the_default(tmp_path: Path) -> None:
    default = load(write(tmp_path, annotated_default()))
    versions = [load(write(tmp_path, text)) for text in uncommented()]
    assert len(versions) == 22  # horizon 10, support 2, divergence 3, selection 3, 4 more
    assert all(version != default for version in versions)


@pytest.mark.parametrize("text", uncommented())
def test_resolved_reads_back_equal(tmp_path: Path, text: str) -> None:
    loaded = load(write(tmp_path, text))
    assert load(write(tmp_path, resolved(loaded))) == loaded


def test_the_json_schema_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["student", "teacher", "prompts"]
    assert schema["properties"]["horizon"]["discriminator"]["propertyName"] == "type"
    assert json.loads(json.dumps(schema)) == schema


TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["5e-5", "1e5", "null", "~", "yes", "2025-01-31"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


@settings(deadline=None)
@given(VALUES)
@example({"a\x85\u2028b\n": "\x85 \n x"})
def test_yaml_reads_back_what_was_written(value: Any) -> None:
    assert read_yaml(write_yaml(value)) == value
    assert read_yaml(write_yaml(value, flow=True)) == value


@settings(deadline=None, max_examples=50)
@given(
    steps=st.integers(1, 10**9),
    lr=st.none() | st.floats(1e-12, 1.0),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    system=st.none() | TEXT,
    kwargs=st.dictionaries(TEXT, VALUES, max_size=3),
    targets=st.just("all-linear") | st.lists(TEXT, min_size=1, max_size=3),
    horizon=st.sampled_from([{"type": "full", "max_tokens": 7}, {"tokens": 3}, {"type": "custom", "path": "m:H"}]),
)
def test_overrides_and_resolved_text_round_trip(horizon: dict[str, Any], targets: Any, **values: Any) -> None:
    paths = {
        "training.steps": values["steps"],
        "optimizer.lr": values["lr"],
        "rollout.top_p": values["top_p"],
        "prompts.system": values["system"],
        "prompts.template_kwargs": values["kwargs"],
        "tuning.targets": targets,
        "horizon": horizon,
    }
    made = config(*(f"{path}={write_yaml(value, flow=True)}" for path, value in paths.items()))
    assert (made.training.steps, made.optimizer.lr, made.rollout.top_p) == (
        values["steps"],
        values["lr"],
        values["top_p"],
    )
    assert (made.prompts.system, made.prompts.template_kwargs) == (values["system"], values["kwargs"])
    assert made.tuning.model_dump(mode="json")["targets"] == targets
    assert horizon.items() <= made.horizon.model_dump().items()
    assert parse(read_yaml(resolved(made))) == made


def test_a_setting_that_came_with_a_later_version_and_is_null_is_no_difference() -> None:
    before = {"divergence": {"type": "reverse_kl"}, "seed": 0}
    now = {"divergence": {"type": "reverse_kl", "alignment": None}, "seed": 0}
    assert differences(before, now) == {}
    now["divergence"] = {"type": "reverse_kl", "alignment": "strict"}
    assert differences(before, now) == {"divergence.alignment": ("absent", "strict")}
