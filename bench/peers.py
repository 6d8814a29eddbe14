"""TRL's trainers (the extra `bench`). No completion ends early: whoever samples the end token goes on."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.contenders import LR, Ids, Stopwatch, flat_gradient, lora_config, one_tokenizer, padded
from bench.workloads import Workload


class Trl:
    """TRL's DistillationTrainer with its best settings for a step that fits into memory: no checkpointing, one batch a
    step, float32 on the CPU. (`use_vllm` would be another engine with a second copy of the weights.)"""

    checkpointing = False

    def __init__(self, work: Workload, student: Any, teacher: Any) -> None:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        warnings.simplefilter("ignore")
        self._work, self._words = work, one_tokenizer(work)
        self._trainer = self._make(work, student, teacher)
        t = self._trainer
        t.create_optimizer_and_scheduler(1000)
        t.model_wrapped, t.optimizer = t.accelerator.prepare(t.model, t.optimizer)
        t.current_gradient_accumulation_steps = 1
        t.generation_config.eos_token_id = None
        t.model.train()
        self.model = t.model
        self._watch = Stopwatch(work.device)
        self._watch.around(t.model, "generate", "rollout")
        self._watch.around(teacher.base_model, "forward", "teacher")

    def _settings(self, work: Workload) -> dict[str, Any]:
        cpu = work.device == "cpu"
        return {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": work.prompts * work.samples,
            "bf16": not cpu,
            "use_cpu": cpu,
            "report_to": [],
            "max_steps": 1000,
            "learning_rate": LR,
            "disable_tqdm": True,
            "save_strategy": "no",
            "gradient_checkpointing": self.checkpointing,
        }

    def _make(self, work: Workload, student: Any, teacher: Any) -> Any:
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        trainer: Any = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(max_completion_length=work.tokens, beta=1.0, **self._settings(work)),
            train_dataset=Dataset.from_list([{"prompt": text} for text in work.texts]),
            processing_class=self._words,
            **({"peft_config": lora_config(work.lora)} if work.lora else {}),
        )
        trainer.eos_token_ids = [-1]
        return trainer

    def step(self, step: int) -> dict[str, float]:
        t, work = self._trainer, self._work
        texts = [text for text in work.step_texts(step) for _ in range(work.samples)]
        t.training_step(t.model_wrapped, self._batch(texts), None)
        with self._watch.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_([p for p in t.model.parameters() if p.grad is not None], 1.0)
            t.optimizer.step()
            t.optimizer.zero_grad()
        return self._watch.lap()

    def _batch(self, texts: list[str]) -> Any:
        return [{"prompt": text} for text in texts]

    def gradient(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
        both = (*padded(prompts, left=True), *padded(completions, left=False))
        self._loss(*(x.to(self._work.device) for x in both)).backward()
        return flat_gradient(self.model)

    def _loss(self, prompt: Tensor, prompt_mask: Tensor, completion: Tensor, completion_mask: Tensor) -> Tensor:
        inputs = {
            "prompt_ids": prompt,
            "prompt_mask": prompt_mask,
            "completion_ids": completion,
            "completion_mask": completion_mask,
        }
        with self._trainer.compute_loss_context_manager():
            loss: Tensor = self._trainer._compute_loss(self._trainer.model, inputs, None)[0]
        return loss


class TrlDefault(Trl):
    """As it comes: gradients are checkpointed."""

    checkpointing = True


class Gkd(Trl):
    """TRL's GKDTrainer on-policy with the reverse KL at temperature 1, as it comes otherwise: it checkpoints, and then
    generates without a cache."""

    checkpointing = True

    def _make(self, work: Workload, student: Any, teacher: Any) -> Any:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        return GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(max_new_tokens=work.tokens, lmbda=1.0, beta=1.0, temperature=1.0, **self._settings(work)),
            train_dataset=Dataset.from_list([{"messages": []}]),
            processing_class=self._words,
            **({"peft_config": lora_config(work.lora)} if work.lora else {}),
        )

    def _batch(self, texts: list[str]) -> Any:
        inputs = self._words(texts, return_tensors="pt", padding=True).to(self._work.device)
        return {"prompts": inputs["input_ids"], "prompt_attention_mask": inputs["attention_mask"]}

    def _loss(self, prompt: Tensor, prompt_mask: Tensor, completion: Tensor, completion_mask: Tensor) -> Tensor:
        inputs = {
            "input_ids": torch.cat([prompt, completion], 1),
            "attention_mask": torch.cat([prompt_mask, completion_mask], 1),
            "labels": torch.cat([torch.full_like(prompt, -100), completion.masked_fill(completion_mask == 0, -100)], 1),
        }
        with self._trainer.compute_loss_context_manager():
            loss: Tensor = self._trainer.compute_loss(self._trainer.model, inputs)
        return loss
