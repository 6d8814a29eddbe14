"""Who is measured: Headstart's own step, and the trainers that people use instead. Each can make one whole step, and
tell the gradient of its loss on given completions."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.workloads import EOS, PAD, Workload, tokenizer

Ids = tuple[int, ...]
LR = 5e-5


class Contender(Protocol):
    name: str

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; seconds per phase where they are known."""
        ...

    def gradient(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
        """The gradient of the mean reverse KL per token on these completions, flat, float64, on the CPU."""
        ...


def flat_gradient(model: Any) -> Tensor:
    found = [p.grad.detach().double().flatten().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


class Headstart:
    """This library, as `headstart distill` runs it."""

    name = "headstart"

    def __init__(self, work: Workload, student: Any, teacher: Any) -> None:
        from headstart.build.pair import prepare_student
        from headstart.config.loader import parse
        from headstart.horizon.fixed import FixedHorizon
        from headstart.models.causal import CausalModel
        from headstart.models.vocabulary import SharedVocabulary
        from headstart.records import Prompt
        from headstart.rollout.engine import InProcessEngine
        from headstart.runtime import Runtime
        from headstart.teacher.local import LocalTeacher
        from headstart.tracking import FanTracker
        from headstart.train.optimizer import make_optimizer
        from headstart.train.parts import Parts

        tuning = (
            {"type": "lora", "r": work.lora, "alpha": 2 * work.lora, "dropout": 0.0} if work.lora else {"type": "full"}
        )
        config = parse(
            {
                "student": {"path": "student"},
                "teacher": {"path": "teacher"},
                "prompts": {"source": "prompts.jsonl"},
                "tuning": tuning,
                "rollout": {"temperature": 1.0, "top_p": 1.0, "samples_per_prompt": work.samples},
                "horizon": {"type": "fixed", "tokens": work.tokens},
                "optimizer": {"lr": LR},
                "schedule": {"type": "constant", "warmup": 0.0},
                "training": {"prompts_per_step": work.prompts, "steps": 1000, "device": work.device},
            }
        )
        words = tokenizer(work.vocabulary)
        ids = [tuple(words(text)["input_ids"]) for text in work.texts]
        own = CausalModel(prepare_student(student, config), work.vocabulary, PAD)
        judge = CausalModel(teacher, work.vocabulary, PAD)
        own.use_fast_paths()
        judge.use_fast_paths()
        self._parts = Parts(
            config=config,
            runtime=Runtime.start(work.device),
            folder=None,
            prompts=tuple(Prompt(i, str(i), p, p) for i, p in enumerate(ids)),
            vocabulary=SharedVocabulary(work.vocabulary, (), ()),
            student=own,
            teacher=LocalTeacher(judge),
            engine=InProcessEngine(own, ()),
            horizon=FixedHorizon(work.tokens),
            optimizer=make_optimizer(own.trainable().values(), config),
            evaluator=None,
            tracker=FanTracker([]),
            decode=lambda ids: [],
            export=lambda path, tokens, report: None,
        )

    def step(self, step: int) -> dict[str, float]:
        from headstart.train.step import train_step

        report, _ = train_step(self._parts, step, 0)
        return {name: report.metrics[f"seconds_{name}"] for name in ("rollout", "teacher", "student", "optimizer")}

    def gradient(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
        from headstart.records import Prompt, Rollout
        from headstart.train.metrics import Clock
        from headstart.train.step import backward

        rollouts = [
            Rollout(Prompt(i, str(i), p, p), 0, c, False)
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        backward(self._parts, rollouts, 0, Clock(self._parts.runtime))
        return flat_gradient(self._parts.student.model)


class Trl:
    """TRL's DistillationTrainer: reverse KL, no checkpointing, float32 on the CPU, one batch a step."""

    name = "trl"

    def __init__(self, work: Workload, student: Any, teacher: Any) -> None:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        cpu = work.device == "cpu"
        arguments = DistillationConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=work.prompts * work.samples,
            max_completion_length=work.tokens,
            beta=1.0,
            bf16=not cpu,
            use_cpu=cpu,
            gradient_checkpointing=False,
            report_to=[],
            max_steps=1000,
            learning_rate=LR,
            generation_kwargs={"min_new_tokens": work.tokens},
            disable_tqdm=True,
            save_strategy="no",
        )
        peft = {"peft_config": lora_config(work.lora)} if work.lora else {}
        self._work = work
        self._trainer: Any = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": text} for text in work.texts]),
            processing_class=tokenizer(work.vocabulary),
            **peft,
        )
        t = self._trainer
        t.create_optimizer_and_scheduler(1000)
        t.model_wrapped, t.optimizer = t.accelerator.prepare(t.model, t.optimizer)
        t.current_gradient_accumulation_steps = 1
        t.model.train()

    def step(self, step: int) -> dict[str, float]:
        t, work = self._trainer, self._work
        texts = [text for text in work.step_texts(step) for _ in range(work.samples)]
        t.training_step(t.model_wrapped, [{"prompt": text} for text in texts], None)
        torch.nn.utils.clip_grad_norm_([p for p in t.model.parameters() if p.grad is not None], 1.0)
        t.optimizer.step()
        t.optimizer.zero_grad()
        return {}

    def gradient(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
        device = self._work.device
        prompt, prompt_mask = padded(prompts, left=True)
        completion, completion_mask = padded(completions, left=False)
        inputs = {
            "prompt_ids": prompt.to(device),
            "prompt_mask": prompt_mask.to(device),
            "completion_ids": completion.to(device),
            "completion_mask": completion_mask.to(device),
        }
        loss, _, _ = self._trainer._compute_loss(self._trainer.model, inputs, None)
        loss.backward()
        return flat_gradient(self._trainer.model)


class Dense:
    """Plain transformers: generate, then the whole logits of both models. What a first draft looks like."""

    name = "plain"

    def __init__(self, work: Workload, student: Any, teacher: Any) -> None:
        if work.lora:
            from peft import get_peft_model

            student = get_peft_model(student, lora_config(work.lora))
        self._work, self._student, self._teacher = work, student, teacher
        self._words = tokenizer(work.vocabulary)
        trained = [p for p in student.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)

    def step(self, step: int) -> dict[str, float]:
        work = self._work
        texts = [text for text in work.step_texts(step) for _ in range(work.samples)]
        inputs = self._words(texts, return_tensors="pt", padding=True)
        ids, mask = inputs["input_ids"].to(work.device), inputs["attention_mask"].to(work.device)
        self._student.eval()
        output = self._student.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=work.tokens,
            min_new_tokens=work.tokens,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        completion = output[:, ids.shape[1] :]
        self._student.train()
        self._loss(ids, mask, completion, torch.ones_like(completion)).backward()
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {}

    def gradient(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
        prompt, prompt_mask = padded(prompts, left=True)
        completion, completion_mask = padded(completions, left=False)
        device = self._work.device
        self._loss(*(x.to(device) for x in (prompt, prompt_mask, completion, completion_mask))).backward()
        return flat_gradient(self._student)

    def _loss(self, prompt: Tensor, prompt_mask: Tensor, completion: Tensor, completion_mask: Tensor) -> Tensor:
        ids, mask = torch.cat([prompt, completion], 1), torch.cat([prompt_mask, completion_mask], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        n = completion.shape[1]
        arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": n + 1}
        student = self._student(**arguments).logits[:, :-1]
        with torch.no_grad():
            teacher = self._teacher(**arguments).logits[:, :-1]
        p, q = (
            student.float() if student.dtype != torch.float64 else student,
            teacher.to(torch.promote_types(teacher.dtype, torch.float32)),
        )
        logp, logq = p.log_softmax(-1), q.log_softmax(-1)
        value = (logp.exp() * (logp - logq)).sum(-1)
        keep = completion_mask.to(value.dtype)
        return (value * keep).sum() / keep.sum()


def reference_gradient(
    work: Workload, student: Any, teacher: Any, prompts: Sequence[Ids], completions: Sequence[Ids]
) -> Tensor:
    """The float64 gradient of plain transformers on the CPU (the models are converted in place)."""
    from dataclasses import replace

    dense = Dense(replace(work, device="cpu"), student.double().cpu(), teacher.double().cpu())
    return dense.gradient(prompts, completions)


def padded(rows: Sequence[Ids], *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def lora_config(rank: int | None) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * (rank or 1), lora_dropout=0.0, target_modules="all-linear")


CONTENDERS: dict[str, Any] = {"headstart": Headstart, "trl": Trl, "plain": Dense}
