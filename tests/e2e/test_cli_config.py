"""`headstart config` and the command itself, as a user's shell sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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
        start = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - start

    # The best of three: the question is what the imports cost, not what else the machine is doing.
    assert min(seconds() for _ in range(3)) < 1.0
