"""TRL's DistillationTrainer with Headstart's horizon: named by a diagnosis, then growing through a callback.

pip install trl==1.16.0            # the extra `bench`
python examples/trl_horizon.py     # the bundled tiny pair, half a minute on one core
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

import headstart as hs
from headstart.tasks.tiny import TinyTask

LONGEST = 200  # completion tokens that hold any right response


class MovingHorizon(TrainerCallback):
    """Sets how many completion tokens TRL samples before each step; the cut bounds generation, not only the loss."""

    def __init__(self, tokens: Callable[[int], int]) -> None:
        self.tokens = tokens
        self.trainer: Any = None  # set after the trainer is made, which takes its callbacks first
        self.used: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        horizon = self.tokens(state.global_step)
        self.trainer.max_completion_length = self.trainer.generation_config.max_new_tokens = horizon
        self.used.append(horizon)


def growing(start: int, longest: int, steps: int) -> Callable[[int], int]:
    """From `start` to `longest` tokens, by the same factor every step."""
    return lambda step: round(start * (longest / start) ** (step / max(1, steps - 1)))


def recommended(student: Any, teacher: Any, tokenizer: Any, problems: int = 32) -> Any:
    """The diagnosis of two models that are in memory, on problems that are not trained on."""
    pair = hs.Pair(student, teacher, tokenizer)
    task = TinyTask("dev", problems)
    pair.config = pair.config.model_copy(
        update={"diagnosis": pair.config.diagnosis.model_copy(update={"max_tokens": LONGEST, "problems": problems})}
    )
    return hs.diagnose(pair, task.problems(), grade=task.grade)


def main(steps: int = 40, problems: int = 32) -> MovingHorizon:
    folder = files("headstart") / "data" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "student"))
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(str(folder / name), dtype=torch.float32) for name in ("student", "teacher")
    )
    advice = recommended(student, teacher, tokenizer, problems)
    print(advice)

    horizon = MovingHorizon(growing(advice.tokens, LONGEST, steps))
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=tempfile.mkdtemp(),
            max_completion_length=advice.tokens,  # a fixed horizon needs no more than this line
            beta=1.0,  # reverse KL
            temperature=1.0,
            per_device_train_batch_size=8,
            max_steps=steps,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            logging_steps=10,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": list(p.messages)} for p in TinyTask("train", 512).problems()]),
        processing_class=tokenizer,
        callbacks=[horizon],
    )
    horizon.trainer = trainer
    trainer.train()
    print(f"horizons: {horizon.used[0]} to {horizon.used[-1]} tokens")
    return horizon


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
