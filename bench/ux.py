"""What a new user sees with a pair of their own: when each verb first speaks, how long it is silent, what it takes.

    OMP_NUM_THREADS=1 python -m bench.ux STUDENT TEACHER --data mbpp.jsonl --out docs/results/ux-after.json

From `init` to `chat`, as they would be typed, in an empty folder; a verb that fails is recorded and the next one runs.
The file holds each command with its seconds, the last lines it wrote, the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.step import environment
from bench.watch import watch

LINES = 12
"""Of what a command wrote, the last ones are kept."""


def commands(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """What is typed, in order. Paths are relative to the folder it is typed in."""
    task = ["--task", arguments.task, "--data", arguments.data]
    models = ["--student", arguments.student, "--teacher", arguments.teacher]
    yield ["init", *models, "--prompts", arguments.prompts or arguments.task, *task]
    yield ["preflight", "run.yaml", "--quick"]
    yield ["preflight", "run.yaml"]
    yield ["diagnose", "run.yaml", "--minutes", str(arguments.minutes), "--out", "diagnosis"]
    limit = f"evaluation.limit={arguments.problems}"
    yield ["distill", "run.yaml", "--out", "first", f"training.steps={arguments.steps}", limit]
    yield ["evaluate", "first/model", *task, "--out", "judged", f"limit={arguments.problems}", "samples=1"]
    yield ["explain", "first", "--only", "samples", limit]
    yield ["report", "first", "diagnosis"]
    yield ["chat", "first", "--prompt", arguments.question]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="folder of the student")
    parser.add_argument("teacher", help="folder of the teacher")
    parser.add_argument("--data", required=True, help="the task's problems")
    parser.add_argument("--task", default="mbpp")
    parser.add_argument("--prompts", help="prompt file; without it, the training split of the task")
    parser.add_argument("--minutes", type=float, default=10, help="what diagnose may take")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--question", default="Write a function that reverses a string.")
    parser.add_argument("--only", nargs="*", default=[], help="run these verbs only; the others are left out")
    parser.add_argument("--folder", type=Path, help="where it is typed; without it, a temporary folder")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    names: dict[str, str] = {}
    for key in ("student", "teacher", "data", "prompts"):
        if (given := getattr(arguments, key)) is None:
            continue
        path = Path(given).resolve()
        if not path.exists():
            sys.exit(f"skipped: {key} {given} is not on this machine")
        names[str(path)] = path.name
        setattr(arguments, key, str(path))
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="headstart-ux-"))
    folder.mkdir(parents=True, exist_ok=True)

    def public(text: str) -> str:
        """Without this machine's paths."""
        for path, name in names.items():
            text = text.replace(path, name)
        return text

    python = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    verbs: list[dict[str, Any]] = []
    for command in commands(arguments):
        if arguments.only and command[0] not in arguments.only:
            continue
        load = os.getloadavg()[0]
        seen = watch(
            [sys.executable, "-m", "headstart", *command],
            cwd=folder,
            environment={"PYTHONPATH": python, "COLUMNS": "120"},
        )
        (folder / f"{len(verbs)}-{command[0]}.log").write_text(seen.output)
        verbs.append({"command": public(" ".join(["headstart", *command])), "load": load, **asdict(seen)})
        verbs[-1]["output"] = [public(line) for line in seen.output.splitlines()[-LINES:]]
        record = {"environment": environment() | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}, "verbs": verbs}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")  # also when a later one is interrupted
        print(
            f"{command[0]:10} exit {seen.code}  {seen.wall_s:7.1f} s  cpu {seen.cpu_s:7.1f} s  first word "
            f"{seen.first_word_s:5.1f} s  longest silence {seen.longest_silence_s:5.1f} s",
            flush=True,
        )
    print(f"written: {arguments.out}; what every command said: {folder}/*.log")


if __name__ == "__main__":
    main()
