"""Mean cost of grading one response, one after the other, for every benchmark whose data is given.

    python bench/graders.py gsm8k=test.jsonl math500=math500.jsonl humaneval=HumanEval.jsonl.gz bfcl=bfcl_v4

Graded are the reference answers; for mathematics also the answer of the next problem, which is compared by a worker
process where the right one is mostly recognised without. The first few, which start workers and imports, do not count.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from headstart.assemble.tasks import grader_of, make_task
from headstart.config.evaluation import MathBenchmark, TaskConfig
from headstart.interfaces import Task
from headstart.records import Problem

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tool_calls import python, reference

WARM_UP = 5
ITEMS = 400


def response_to(problem: Problem) -> str:
    """The reference answer, said as a model would."""
    if "expected" in problem.meta:
        return python(reference(problem))
    answer = problem.answer or ""
    return f"```python\n{answer}\n```" if "def " in answer else rf"So it is $\boxed{{{answer}}}$."


def cost(task: Task, problems: Sequence[Problem], shift: int) -> str:
    """A row of the table: how many, how many right, and the time of each, with response `shift` problems further on."""
    seconds, right = [], 0
    for place, problem in enumerate(problems):
        response = response_to(problems[(place + shift) % len(problems)])
        start = time.perf_counter()
        right += task.grade(problem, response).correct
        seconds.append(time.perf_counter() - start)
    timed = sorted(seconds[WARM_UP:])
    figures = (statistics.fmean(timed), statistics.median(timed), timed[int(0.95 * (len(timed) - 1))])
    kind = "next problem's answer" if shift else "reference"
    cells = [task.name, kind, f"{right}/{len(problems)}", *(f"{1000 * figure:.2f}" for figure in figures)]
    return f"| {' | '.join(cells)} | {grader_of(task)['sandbox'] or '-'} |"


def main() -> None:
    print("| task | response | right | mean, ms | median | p95 | sandbox |\n|---|---|---|---|---|---|---|")
    for argument in sys.argv[1:]:
        name, data = argument.split("=", 1)
        config = TypeAdapter(TaskConfig).validate_python({"type": name, "data": data})
        task = make_task(config)
        problems = list(task.problems())[:ITEMS]
        for shift in (0, 1) if isinstance(config, MathBenchmark) else (0,):
            print(cost(task, problems, shift), flush=True)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
