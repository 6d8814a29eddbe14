"""Programs graded by tests: HumanEval, HumanEval+, MBPP, MBPP+ (arXiv 2107.03374, 2108.07732, 2305.01210).

Prompt: one user turn with the function to complete (HumanEval) or the description and its tests (MBPP), and the request
for one fenced Python block; with `chat=False` the bare prompt, which a base model continues. Default sampling, that of
arXiv 2605.27028: greedy, at most 512 tokens. Responses are run by `grading.code` in a sandbox.
"""

from __future__ import annotations

import ast
import threading
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from headstart.errors import DataError
from headstart.records import Message, PrefixState, Problem, Sampling, Verdict
from headstart.tasks.benchmark import Benchmark, Row
from headstart.tasks.grading.code import TIMEOUT, CodeRunner
from headstart.tasks.grading.plus import parse, patience, plus_tests
from headstart.tasks.grading.programs import extract_code

MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
"""First and last task id of each split of MBPP."""

_starting = threading.Lock()


class Item(NamedTuple):
    """One problem with what grading needs. `prefix` is code that a response continues, else empty.

    `patience` multiplies the time limit.
    """

    problem: Problem
    entry_points: tuple[str, ...]
    tests: str
    prefix: str = ""
    patience: int = 1


class CodeTask(Benchmark):
    """What the four have in common; fits `interfaces.Task`.

    `sandbox` is the mode asked for, `timeout` the CPU seconds of one program.
    """

    training: tuple[str, ...] = ("google-research-datasets/mbpp (split train, task ids 601-974)",)
    samples = 1
    sampling = Sampling(temperature=0.0, top_p=1.0)
    max_tokens = 512
    endings: ClassVar[tuple[str, ...]] = ("\nif __name__", "\nprint(", "\nassert ")
    """Where a base model has begun something else. No `\\ndef `: the function may need what comes after it."""

    def __init__(
        self,
        data: str | Path | None,
        *,
        chat: bool = True,
        sandbox: Literal["auto", "bwrap", "unshare", "unsafe"] = "auto",
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__(data, chat=chat)
        self.timeout = timeout
        self.stop_strings = () if chat else self.endings
        self._wanted = sandbox

    @property
    def sandbox(self) -> str:
        """The sandbox in use: `bwrap`, `unshare` or `unsafe`. Raises SandboxError when none works: ask early."""
        return self._runner.mode

    def problems(self) -> Sequence[Problem]:
        """All problems in the source's order; `answer` is the reference solution. Raises DataError naming the row."""
        return [item.problem for item in self._items.values()]

    def grade(self, problem: Problem, response: str) -> Verdict:
        """Run the response's program against the tests.

        Status `no_answer` without code in the response, `timeout`, `error` when the sandbox failed, else `correct` or
        `wrong`.
        """
        item = self._items[problem.id]
        first, *also = item.entry_points
        program = extract_code(response, first, item.prefix, also=also, chat=self.chat)
        if program is None:
            return Verdict(correct=False, status="no_answer")
        outcome = self._runner.run(program, item.tests, first, self.timeout * item.patience, also=also)
        match outcome.status:
            case "passed":
                return Verdict(correct=True, status="correct")
            case "failed":
                return Verdict(correct=False, status="wrong")
            case status:
                return Verdict(correct=False, status=status)

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        """Half a program says nothing."""
        return "unknown"

    @cached_property
    def _runner(self) -> CodeRunner:
        with _starting:  # several threads may grade the first responses
            return CodeRunner(self._wanted)

    @cached_property
    def _items(self) -> dict[str, Item]:
        items: dict[str, Item] = {}
        for row in self.rows():
            try:
                item = self._item(row)
            except (SyntaxError, ValueError) as error:
                raise DataError(f"{row.where}: not valid Python ({error})") from error
            if item is not None and items.setdefault(item.problem.id, item) is not item:
                raise DataError(f"{row.where}: the task_id {item.problem.id!r} is already that of an earlier row")
        if not items:
            raise DataError(f"{self.data} has no row that belongs to task {self.name}; it reads {self.files}")
        return items

    @abstractmethod
    def _item(self, row: Row) -> Item | None:
        """The problem of a row, or None for a row of another split."""

    def _problem(self, row: Row, question: str, plain: str, bare: str, solution: str, *references: str) -> Problem:
        identity, meta = str(row.get("task_id", str, int)), {"question": bare, "references": references}
        if not self.chat:
            return Problem(id=identity, text=plain, answer=solution, meta=meta, completion=solution)
        written = "```python\n" + solution.strip().replace("\r\n", "\n") + "\n```"
        turn: Message = {"role": "user", "content": question}
        return Problem(id=identity, messages=(turn,), answer=solution, meta=meta, completion=written)


class HumanEval(CodeTask):
    """164 functions to complete from signature and docstring (arXiv 2107.03374). Ids: HumanEval/0 and so on.

    It has no training set; MBPP train or CodeUltraFeedback are the usual ones.
    """

    name = "humaneval"
    hub: ClassVar = {"openai/openai_humaneval": (None, "test")}
    files = "a file with the columns task_id, prompt, canonical_solution, entry_point and test: HumanEval.jsonl.gz"
    training = (*CodeTask.training, "coseal/CodeUltraFeedback (split train)")

    def _item(self, row: Row) -> Item:
        prompt, name = row.text("prompt"), row.text("entry_point")
        question = (
            f"Complete the following Python function. Answer with the whole function in one ```python block.\n\n"
            f"```python\n{prompt.strip()}\n```"
        )
        solution = row.text("canonical_solution")
        problem = self._problem(row, question, prompt, prompt, prompt + solution, solution, str(row.values.get("test")))
        return Item(problem, (name,), self._tests(row, prompt, name), prompt, self._patience(name))

    def _patience(self, name: str) -> int:
        return 1

    def _tests(self, row: Row, prompt: str, name: str) -> str:
        # Some tests call helpers that the prompt defines; the trusted ones, not what the response makes of them.
        helpers = parse(prompt)
        helpers.body = [node for node in helpers.body if getattr(node, "name", None) != name]
        return f"{ast.unparse(helpers)}\n{row.text('test')}\ncheck({name})"


class HumanEvalPlus(HumanEval):
    """HumanEval with about 80 times as many inputs (arXiv 2305.01210); the full or the mini release.

    Right on the base and on the added inputs. Hub copies lack the inputs: pass the release file.
    """

    name = "humaneval_plus"
    hub: ClassVar = {}
    files = (
        "HumanEvalPlus.jsonl.gz or HumanEvalPlus-Mini.jsonl.gz of github.com/evalplus/humanevalplus_release (columns "
        "task_id, prompt, canonical_solution, entry_point, base_input, plus_input, atol)"
    )

    def _tests(self, row: Row, prompt: str, name: str) -> str:
        return _plus_tests(row, name, prompt + row.text("canonical_solution"), "")

    def _patience(self, name: str) -> int:
        return patience(name)


class Mbpp(CodeTask):
    """Short programs from a description and three asserts (arXiv 2108.07732). Ids: the task_id as a string.

    `split` is `test` (ids 11-510), `train` (601-974), `validation`, `prompt` or `all`. By default the test split of a
    full file, and everything in the sanitized one, whose 427 problems come from all splits; when training on MBPP
    train, evaluate that with `split="test"` (257 problems).
    """

    name = "mbpp"
    splits = (*MBPP_SPLITS, "all")
    endings: ClassVar = (*CodeTask.endings, '\n"""\nWrite ')
    hub: ClassVar = {"google-research-datasets/mbpp": ("full", "test")}
    files = "a file with the columns task_id, text (or prompt), code and test_list: mbpp.jsonl or sanitized-mbpp.json"

    def __init__(
        self,
        data: str | Path | None,
        *,
        split: Literal["test", "train", "validation", "prompt", "all"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, **options)
        self.split = split

    def part(self) -> tuple[str | None, str]:
        subset, split = super().part()
        return subset, "+".join(MBPP_SPLITS) if split == "all" else split

    def _item(self, row: Row) -> Item | None:
        sanitized = "text" not in row.values
        split = self.split or ("all" if sanitized else "test")
        number = row.get("task_id", int)
        if split != "all" and not MBPP_SPLITS[split][0] <= number <= MBPP_SPLITS[split][1]:
            return None
        text, code = row.text("prompt" if sanitized else "text").strip(), row.text("code")
        asserts = [str(line) for line in row.get("test_list", list)]
        setup = [*row.values.get("test_imports", ()), row.values.get("test_setup_code") or ""]
        shown = "\n".join(asserts)
        question = (
            f"{text}\n\nYour program should pass these tests:\n\n```python\n{shown}\n```\n\n"
            "Answer with the whole program in one ```python block."
        )
        problem = self._problem(row, question, f'"""\n{text}\n{shown}\n"""\n', text, code, shown)
        imports, names = _used(code, "\n".join([*setup, shown]))
        if not names:
            raise DataError(f"{row.where}: the tests use no function of the code; {row.expected}")
        return Item(problem, names, "\n".join([*imports, *setup, shown]))


class MbppPlus(CodeTask):
    """378 problems of MBPP with about 35 times as many inputs (arXiv 2305.01210). Ids: Mbpp/2 and so on.

    The problems come from all splits of MBPP, the training split too: the overlap check counts them.
    """

    name = "mbpp_plus"
    endings: ClassVar = Mbpp.endings
    files = (
        "MbppPlus.jsonl.gz of github.com/evalplus/mbppplus_release (columns task_id, prompt, canonical_solution, "
        "entry_point, base_input, plus_input, atol, assertion)"
    )

    def _item(self, row: Row) -> Item:
        prompt, name, code = row.text("prompt"), row.text("entry_point"), row.text("canonical_solution")
        text = prompt.strip().strip('"').strip()
        question = (
            f"Write a Python program for this description, whose last line is a test that it should pass:\n\n{text}\n\n"
            "Answer with the whole program in one ```python block."
        )
        problem = self._problem(row, question, prompt, text.partition("\nassert ")[0], code)
        tests = _plus_tests(row, name, code, row.text("assertion"))
        return Item(problem, (name,), tests, patience=patience(name))


CODE: dict[str, type[CodeTask]] = {task.name: task for task in (HumanEval, HumanEvalPlus, MbppPlus)}
"""Those by name that need no more than their data; `Mbpp` has splits."""


def _plus_tests(row: Row, name: str, reference: str, examples: str) -> str:
    # One row of MBPP+ has an empty object for "no inputs".
    inputs = [*row.get("base_input", list), *row.get("plus_input", list, dict)]
    return plus_tests(name, reference, inputs, float(row.get("atol", int, float)), row.text("prompt"), examples)


def _used(code: str, tests: str) -> tuple[list[str], tuple[str, ...]]:
    """What tests use of the reference code: its imports, and the names it defines (the function first)."""
    used = {node.id for node in ast.walk(parse(tests)) if isinstance(node, ast.Name)}
    imports, functions, classes = [], [], []
    for node in parse(code).body:
        match node:
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                if used & {(alias.asname or alias.name).split(".")[0] for alias in names}:
                    imports.append(ast.unparse(node))
            case ast.FunctionDef(name=name) if name in used:
                functions.append(name)
            case ast.ClassDef(name=name) if name in used:
                classes.append(name)
    return imports, (*functions, *classes)
