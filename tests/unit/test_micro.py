"""Micro-batches against a memory budget: the formula, the division, and what is done when memory runs out anyway."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.errors import MemoryBudgetError
from headstart.models.memory import GIB, SHARE, MicroMemory
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt, Rollout
from headstart.train import loop
from headstart.train.checkpoint import load_newest
from headstart.train.loop import Progress
from headstart.train.metrics import Clock
from headstart.train.micro import Prefills
from headstart.train.parts import Parts
from headstart.train.step import backward, sample_rollouts, train_step
from support import GOOD, SAFE, allocated, make_config, make_parts, world


def memory_of(parts: Parts) -> MicroMemory:
    teacher: Any = parts.teacher
    return MicroMemory.of(parts.student, teacher.models, parts.config)


def step_of(prompts: int, samples: int, prompt_tokens: int, tokens: int) -> list[Rollout]:
    """Rollouts of different lengths, `tokens` at most."""
    ids = tuple(i % 40 for i in range(max(prompt_tokens, tokens)))
    return [
        Rollout(Prompt(u, str(u), p, p), g, ids[: tokens - (u * samples + g) % 4 * tokens // 5], False)
        for u in range(prompts)
        for p in [ids[u : prompt_tokens - u]]
        for g in range(samples)
    ]


# --- the formula -----------------------------------------------------------------------------------------------------

LORA, HALF = "tuning={type: lora, r: 8}", ("student.dtype=bfloat16", "teacher.dtype=bfloat16")
SHAPES = {"short": (8, 1, 20, 32), "shared": (2, 8, 100, 50), "long prompt": (1, 8, 300, 30), "long": (2, 1, 50, 500)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", ()),
        ("qwen3", (LORA, *HALF)),
        ("qwen3", ("tuning={type: lora, r: 8, gradient_checkpointing: true}", *HALF)),
        ("gemma2", (LORA,)),
    ],
    ids=["full", "lora half", "checkpointing", "eager, padded"],
)
def test_bytes_are_those_torch_allocates(
    tmp_path: Path, architecture: Any, overrides: tuple[str, ...], shape: tuple[int, int, int, int]
) -> None:
    parts, _ = world(tmp_path, architecture, 300, *overrides)
    rollouts = step_of(*shape)
    parts.student.model.train()
    measured = allocated(lambda: backward(parts, rollouts, 0, Clock(parts.runtime)))
    low, high = GOOD if memory_of(parts).student.apart else SAFE
    assert low < memory_of(parts).learning(rollouts, 0) / measured < high


# --- the division ----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return make_parts(tmp_path / "run", make_config(tmp_path, "rollout.samples_per_prompt=3"))


def test_rollouts_are_divided_by_bytes_in_order_and_prompts_kept_whole_where_they_fit(parts: Parts) -> None:
    memory, rollouts = memory_of(parts), step_of(6, 3, 40, 20)
    whole, one = memory.needs(rollouts), max(memory.needs([r]) for r in rollouts)
    sizes = []
    for part in range(12):
        budget = one + (whole - one) * part / 11
        micros = memory.split(rollouts, budget, None)
        assert [r for micro in micros for r in micro] == rollouts
        assert all(memory.needs(micro) <= budget for micro in micros)
        groups = [rollouts[start : start + 3] for start in range(0, 18, 3)]
        if all(memory.needs(group) <= budget for group in groups):
            assert {len(micro) % 3 for micro in micros} == {0}
        assert all(
            memory.needs([*a, *b[: 3 if len(b) % 3 == 0 else 1]]) > budget
            for a, b in zip(micros, micros[1:], strict=False)
        ), "the next would have fitted"
        sizes.append(len(micros))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 6
    assert sizes[-1] == 1
    assert memory.split(rollouts, 0.0, None) == [[r] for r in rollouts], "a budget for nothing leaves one at a time"
    assert [len(m) for m in memory.split(rollouts, whole, 7)] == [6, 6, 6]
    assert [len(m) for m in memory.split(rollouts, whole, 2)] == [2] * 9
    assert memory.split([], 1.0, None) == []


def test_where_the_budget_comes_from(parts: Parts) -> None:
    memory, cuda = memory_of(parts), Runtime(0, 4, torch.device("cuda"))

    def budget(runtime: Runtime = parts.runtime, **training: Any) -> float:
        changed = parts.config.training.model_copy(update=training)
        return memory.budget(parts.config.model_copy(update={"training": changed}), runtime, 100 * GIB)

    assert budget() == pytest.approx(SHARE * (100 * GIB - 2 * memory.gradients))
    assert budget(cuda) == budget()
    assert budget(replace(cuda, device=torch.device("cpu"))) == pytest.approx(budget() / 4, rel=1e-3)
    assert budget(memory_budget_gib=0.5) == GIB / 2
    assert budget(micro_batch=4) > 10**18


# --- when memory runs out --------------------------------------------------------------------------------------------


def gradient(parts: Parts, rollouts: list[Rollout]) -> torch.Tensor:
    backward(parts, rollouts, 0, Clock(parts.runtime))
    return torch.cat([p.grad.flatten().clone() for p in parts.student.trainable().values() if p.grad is not None])


class Small:
    """A device on which a micro-batch of more than `most` rollouts runs out of memory, after its gradient was added."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, parts: Parts, most: int, error: Exception) -> None:
        self.sizes: list[int] = []
        self.held: list[weakref.ref[torch.Tensor]] = []
        whole, batch = torch.autograd.backward, parts.student.batch

        def seen(rollouts: Sequence[Rollout], view: Any) -> Any:
            found = batch(rollouts, view)
            self.sizes.append(len(rollouts))
            assert not any(ref() is not None for ref in self.held), "tensors of what failed are still there"
            self.held = []
            return found

        def fail(loss: torch.Tensor) -> None:
            whole(loss)
            if self.sizes[-1] > most:
                self.held = [weakref.ref(loss)]
                raise type(error)(*error.args)  # a new one: what is raised keeps its frames

        monkeypatch.setattr(parts.student, "batch", seen)
        monkeypatch.setattr(torch.autograd, "backward", fail)


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("error", [OUT, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_running_out_of_memory_divides_the_step_and_not_the_gradient(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    rollouts = sample_rollouts(parts, 0, 6)
    expected = gradient(parts, rollouts)
    before = parts.budget.bytes
    small = Small(monkeypatch, parts, 5, error)
    with pytest.warns(UserWarning, match=r"18 rollouts \(.*ran out of memory: .*training.memory_budget_gib=") as said:
        found = gradient(parts, rollouts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert len(said) == sum(size > 5 for size in small.sizes) < 6
    assert small.sizes[0] == 18
    after = parts.budget.bytes
    assert before is not None
    assert after is not None
    assert after < before
    small.sizes.clear()
    gradient(parts, rollouts)  # no warning: the budget stays
    assert sum(small.sizes) == 18
    assert max(small.sizes) <= 5
    divided = memory_of(parts).split(rollouts, after, None)
    assert [len(micro) for micro in divided] == small.sizes


@pytest.mark.filterwarnings("ignore:a micro-batch of")
def test_what_fits_nowhere_and_what_is_no_lack_of_memory(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [p.detach().clone() for p in parts.student.trainable().values()]
    with monkeypatch.context() as patch:
        Small(patch, parts, 0, OUT)
        with pytest.raises(MemoryBudgetError, match=r"one rollout .*does not fit into memory: CUDA.*lower the horizon"):
            train_step(parts, 0, 0)
    with monkeypatch.context() as patch:
        Small(patch, parts, 0, RuntimeError("a shape is wrong"))
        with pytest.raises(RuntimeError, match="a shape is wrong"):
            train_step(parts, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(weights, parts.student.trainable().values(), strict=True))


def test_an_explicit_number_of_rollouts_is_divided_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make_parts(tmp_path / "run", make_config(tmp_path, "training.micro_batch=4"))
    rollouts = sample_rollouts(parts, 0, 6)
    expected = gradient(parts, rollouts)
    small = Small(monkeypatch, parts, 1, OUT)
    with pytest.warns(UserWarning, match="a micro-batch of 4 rollouts"):
        found = gradient(parts, rollouts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert small.sizes[-6:] == [1] * 6


@pytest.mark.filterwarnings("ignore:a micro-batch of")
def test_a_resumed_run_is_divided_like_the_straight_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the second step alone; the third, made again from the checkpoint, is the same bit for bit."""

    def started(name: str, *overrides: str) -> Parts:
        return make_parts(tmp_path / name, make_config(tmp_path, *overrides))

    def weights(parts: Parts) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in parts.student.trainable().values()])

    straight = started("straight")
    train_step(straight, 0, 0)
    with monkeypatch.context() as patch:
        Small(patch, straight, 2, OUT)
        train_step(straight, 1, 0)
    loop.save(straight, Progress(step=2))
    checkpoint = load_newest(straight.folder.checkpoints, pytest.fail)  # type: ignore[union-attr]
    assert checkpoint is not None
    train_step(straight, 2, 0)
    resumed, whole, other = started("resumed"), started("whole"), started("other", "training.memory_budget_gib=1")
    for parts in (resumed, whole, other):
        loop.restore(parts, checkpoint)
    assert resumed.budget.bytes == straight.budget.bytes
    assert other.budget.bytes is None, "another setting was asked for"
    whole.budget.bytes = None
    for parts in (resumed, whole):
        train_step(parts, 2, 0)
    assert torch.equal(weights(resumed), weights(straight))
    assert not torch.equal(weights(whole), weights(straight)), "undivided it rounds differently, or this tests nothing"


def test_ranks_agree_on_the_least_budget(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    others: Callable[[Runtime, Any], list[Any]] = lambda self, mine: [mine, 5.0, None]  # noqa: E731
    monkeypatch.setattr(Runtime, "gather", others)
    parts.budget.bytes = 7.0
    assert parts.budget.agree(parts.runtime) == parts.budget.bytes == 5.0


def test_a_step_that_is_done_again_finds_no_prefills() -> None:
    """Their graph serves one backward pass, also one that ran out of memory half-way."""
    made = Prefills("student", "teacher")
    first = made.taken()
    assert (first.student, first.teacher) == ("student", "teacher")
    assert made.taken() == Prefills()
