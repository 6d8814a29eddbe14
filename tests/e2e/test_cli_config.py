"""`headstart config` and the command itself, as a user's shell sees them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from headstart import Config, __version__
from headstart.config.loader import load

HEAVY = ("torch", "transformers", "datasets", "peft", "numpy", "matplotlib")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "headstart", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60)


def test_the_printed_default_is_a_configuration(tmp_path: Path) -> None:
    printed = run("config")
    assert printed.returncode == 0
    (tmp_path / "run.yaml").write_text(printed.stdout)
    resolved = run("config", "run.yaml", "horizon.type=full", "training.steps=6", cwd=tmp_path)
    assert resolved.returncode == 0, resolved.stderr
    (tmp_path / "resolved.yaml").write_text(resolved.stdout)
    expected = load(tmp_path / "run.yaml", ["horizon.type=full", "training.steps=6"])
    assert load(tmp_path / "resolved.yaml") == expected
    assert (expected.horizon.type, expected.training.steps) == ("full", 6)


def test_overrides_need_no_file() -> None:
    resolved = run("config", "student.path=a", "teacher.path=b", "prompts.source=tiny")
    assert resolved.returncode == 0, resolved.stderr
    assert "source: tiny" in resolved.stdout


def test_the_schema_is_json() -> None:
    printed = run("config", "--schema")
    assert printed.returncode == 0
    assert set(json.loads(printed.stdout)["properties"]) == set(Config.model_fields)
    refused = run("config", "run.yaml", "--schema")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "leave out run.yaml" in refused.stderr


def test_mistakes_are_one_message_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("student: {path: a}\nteacher: {path: b}\nprompts: {source: tiny}\nlr: 5e-5\n")
    refused = run("config", "run.yaml", "horizon.tokns=50", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.splitlines() == [
        "error: run.yaml: 2 problems",
        "  horizon.tokns: unknown key for type fixed (found 50); did you mean horizon.tokens?",
        "  lr: unknown key (found 5e-05); did you mean optimizer.lr?",
    ]
    missing = run("config", "runn.yaml", cwd=tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: runn.yaml: no such file")
    assert "Traceback" not in missing.stderr


HOSTILE = {
    "anchors": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    "keys": "".join(f"key{i}: 1\n" for i in range(20_000)),
    "nesting": "[" * 100_000,
    "tag": "student: !!python/object/apply:os.system [ls]\n",
    "path": f"student: {{path: {'a' * 5000}}}\nteacher: {{path: {'b/' * 2500}}}\nprompts: {{source: tiny}}\n",
    "number": f"training: {{steps: 1{'0' * 5000}}}\n",
    "bytes": "student: \udcff\n",
}


@pytest.mark.parametrize("verb", ["config", "compare"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_one_message(tmp_path: Path, verb: str, text: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(text.encode(errors="surrogateescape"))
    _one_message(run(verb, "bad.yaml", *(["--out", "out"] if verb == "compare" else []), cwd=tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "override",
    [
        "student.path=" + "a" * 5000,
        "training=&a [*a]",
        "training={" + ", ".join(f"key{i}: 1" for i in range(8000)) + "}",
        "training.steps=1" + "0" * 5000,
        "training=" + "[" * 100_000,
        "a." * 30_000 + "b=1",
        "student.path=\udcff",
        "\udcff=1",
        'prompts.system="\\ud83d"',
        'zork\u20ac="\\ud83d"',
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_hostile_overrides_are_one_message(override: str) -> None:
    _one_message(run("config", override, "teacher.path=b", "prompts.source=tiny"))


def _one_message(refused: subprocess.CompletedProcess[str]) -> None:
    assert refused.returncode == 2, refused.stderr
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("error: ") == 1
    assert "Traceback" not in refused.stderr
    assert len(refused.stderr) < 2000


def test_brackets_in_messages_are_not_markup(tmp_path: Path) -> None:
    refused = run("config", "student.path=[red]", "teacher.path=b", "prompts.source=tiny", cwd=tmp_path)
    assert refused.stderr.splitlines()[1] == '  student.path: found ["red"]; allowed: text (put text in quotes)'


def test_version_and_help() -> None:
    assert run("--version").stdout == f"headstart {__version__}\n"
    assert "config" in run("--help").stdout
    bare = run()
    assert "Usage: headstart" in bare.stdout + bare.stderr
    assert run("confg").returncode == 2


def test_interruption_exits_with_130() -> None:
    program = (
        "import headstart.cli.main as m\n"
        "def stop() -> None: raise KeyboardInterrupt\n"
        "m.app.command('stop')(stop)\n"
        "import sys; sys.argv = ['headstart', 'stop']; m.main()"
    )
    stopped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr


@pytest.mark.parametrize(
    "arguments", [None, ["--help"], ["config"], ["config", "--schema"], ["config", "student.path=a"]]
)
def test_nothing_heavy_is_loaded(arguments: list[str] | None) -> None:
    """None stands for `import headstart` alone."""
    program = (
        "import sys, atexit\n"
        f"loaded = lambda: [name for name in {HEAVY} if name in sys.modules]\n"
        "atexit.register(lambda: print('loaded', loaded(), file=sys.stderr))\n"
        "import headstart\n"
    )
    if arguments is not None:
        program += f"sys.argv = ['headstart', *{arguments}]\nfrom headstart.cli.main import main\nmain()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "loaded []"


def test_help_answers_within_a_second() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time, the best of three: the question is what the imports cost, not what else the machine is doing.
    assert min(seconds() for _ in range(3)) < 1.0
