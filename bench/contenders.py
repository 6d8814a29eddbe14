"""Who is measured: Headstart's own step, and the trainers that people use instead. Each can make one whole step, and
tell the gradient of its loss on given completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import record_function

from bench.cost import now
from bench.workloads import PAD, Workload

Ids = tuple[int, ...]
LR = 5e-5


class Contender(Protocol):
    model: Any
    """The student's transformers or peft model."""

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; seconds per phase where they are known (what is left is the student's)."""
        ...

    def gradient(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
        """The gradient of the mean reverse KL per token on these completions, flat, float64, on the CPU."""
        ...


def flat_gradient(model: Any) -> Tensor:
    found = [p.grad.detach().double().flatten().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


class Stopwatch:
    """Seconds by phase (`bench.cost.now`) of a trainer that does not tell them, by wrapping what it calls."""

    def __init__(self, device: str) -> None:
        self._device, self._seconds = device, dict[str, float]()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = now(self._device)
        with record_function(name):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + now(self._device) - start

    def around(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        @wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def lap(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return seconds


class Headstart:
    """This library, as `headstart distill` runs it."""

    def __init__(self, work: Workload, student: Any, teacher: Any) -> None:
        from headstart.assemble.pair import Pair, prepare_student
        from headstart.config.loader import parse
        from headstart.horizon.fixed import FixedHorizon
        from headstart.models.causal import CausalModel
        from headstart.models.vocabulary import SharedVocabulary
        from headstart.ranks.runtime import Runtime
        from headstart.records import Prompt
        from headstart.rollout.engine import InProcessEngine
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
                "prompts": {"source": "prompts.jsonl", "chat": False},
                "tuning": tuning,
                "rollout": {"temperature": 1.0, "top_p": 1.0, "samples_per_prompt": work.samples},
                "horizon": {"type": "fixed", "tokens": work.tokens},
                "optimizer": {"lr": LR},
                "schedule": {"type": "constant", "warmup": 0.0},
                "training": {"prompts_per_step": work.prompts, "steps": 1000, "device": work.device},
            }
        )
        self._device = work.device
        self.model = prepare_student(student, config)
        if work.teacher_vocabulary:
            pair = Pair(self.model, teacher, work.tokenizer, work.teacher_tokenizer, config=config)
            own, scorer, vocabulary = pair.student, pair.scorer(), pair.vocabulary
        else:
            own, judge = CausalModel(self.model, work.vocabulary, PAD), CausalModel(teacher, work.vocabulary, PAD)
            own.use_fast_paths()
            judge.use_fast_paths()
            scorer, vocabulary = LocalTeacher(judge), SharedVocabulary(work.vocabulary, (), ())
        both = zip(work.prompt_ids, work.teacher_ids(), strict=True)
        self.parts = Parts(
            config=config,
            runtime=Runtime.start(work.device),
            folder=None,
            prompts=tuple(Prompt(i, str(i), mine, theirs) for i, (mine, theirs) in enumerate(both)),
            vocabulary=vocabulary,
            student=own,
            teacher=scorer,
            engine=InProcessEngine(own, ()),
            horizon=FixedHorizon(work.tokens),
            optimizer=make_optimizer(own.trainable().values(), config),
            evaluator=None,
            tracker=FanTracker([]),
            decode=lambda ids: [],
            export=lambda model, path, tokens, report: None,
        )

    @property
    def pair(self) -> Any:
        """Both models as `headstart.assemble.cost` takes them."""
        from headstart.assemble.pair import Pair

        parts, teacher = self.parts, self.parts.teacher.model
        return Pair(
            parts.student, teacher, None, config=parts.config, runtime=parts.runtime, vocabulary=parts.vocabulary
        )

    def step(self, step: int) -> dict[str, float]:
        from headstart.train import metrics
        from headstart.train.step import train_step

        # Its clock tells wall seconds.
        with mock.patch.object(metrics, "time", SimpleNamespace(perf_counter=partial(now, self._device))):
            report, _ = train_step(self.parts, step, 0)
        return {name: report.metrics[f"seconds_{name}"] for name in ("rollout", "teacher", "student", "optimizer")}

    def gradient(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
        from headstart.records import Prompt, Rollout
        from headstart.train.metrics import Clock
        from headstart.train.step import backward

        rollouts = [
            Rollout(Prompt(i, str(i), p, p), 0, c, False)
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        backward(self.parts, rollouts, 0, Clock(self.parts.runtime))
        return flat_gradient(self.parts.student.model)


class Dense:
    """Plain transformers: generate, then the whole logits of both models. What a first draft looks like."""

    def __init__(self, work: Workload, student: Any, teacher: Any) -> None:
        if work.lora:
            from peft import get_peft_model

            student = get_peft_model(student, lora_config(work.lora))
        self._work, self.model, self._teacher = work, student, teacher
        self._words = one_tokenizer(work)
        self._watch = Stopwatch(work.device)
        self._watch.around(student, "generate", "rollout")
        self._watch.around(teacher.base_model, "forward", "teacher")
        trained = [p for p in student.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=work.device == "cuda")

    def generation(self) -> dict[str, Any]:
        return {}

    def encoded(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        inputs = self._words(texts, return_tensors="pt", padding=True)
        return inputs["input_ids"].to(self._work.device), inputs["attention_mask"].to(self._work.device)

    def step(self, step: int) -> dict[str, float]:
        work = self._work
        ids, mask = self.encoded([text for text in work.step_texts(step) for _ in range(work.samples)])
        self.model.eval()
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=work.tokens,
            pad_token_id=PAD,
            **self.generation(),
        )
        completion = output[:, ids.shape[1] :]
        self.model.train()
        self.loss(ids, mask, completion, torch.ones_like(completion)).backward()
        with self._watch.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return self._watch.lap()

    def gradient(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
        both = (*padded(prompts, left=True), *padded(completions, left=False))
        self.model.train()
        self.loss(*(x.to(self._work.device) for x in both)).backward()
        return flat_gradient(self.model)

    def loss(self, prompt: Tensor, prompt_mask: Tensor, completion: Tensor, completion_mask: Tensor) -> Tensor:
        arguments = _forward_arguments(prompt, prompt_mask, completion, completion_mask)
        arguments["logits_to_keep"] = completion.shape[1] + 1
        student = self.model(**arguments).logits[:, :-1]
        with torch.no_grad():
            teacher = self._teacher(**arguments).logits[:, :-1]
        logp, logq = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (student, teacher))
        value = (logp.exp() * (logp - logq)).sum(-1)
        keep = completion_mask.to(value.dtype)
        return (value * keep).sum() / keep.sum()


class Engineer(Dense):
    """A good engineer's day: on CUDA a static cache, with which transformers compiles decoding to a graph, and prompts
    padded to one width, so that there is one graph; TRL's chunked loss on both models' hidden states.

    On a CPU neither pays: compiling takes minutes and gains nothing, and a static cache is attended to in its whole
    length. What is left there is TRL's loss around plain `generate`.
    """

    def generation(self) -> dict[str, Any]:
        return {"cache_implementation": "static"} if self._work.device == "cuda" else {}

    def encoded(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        width = {"padding": "max_length", "max_length": 128} if self._work.device == "cuda" else {"padding": True}
        inputs = self._words(texts, return_tensors="pt", **width)
        return inputs["input_ids"].to(self._work.device), inputs["attention_mask"].to(self._work.device)

    def loss(self, prompt: Tensor, prompt_mask: Tensor, completion: Tensor, completion_mask: Tensor) -> Tensor:
        arguments = _forward_arguments(prompt, prompt_mask, completion, completion_mask)
        student = self.model.get_base_model() if self._work.lora else self.model
        n = completion.shape[1]
        own = student.base_model(**arguments).last_hidden_state[:, -n - 1 : -1]
        with torch.no_grad():
            judge = self._teacher.base_model(**arguments).last_hidden_state[:, -n - 1 : -1]
        heads = (student.get_output_embeddings().weight, self._teacher.get_output_embeddings().weight)
        return self.divergence(own, judge, *heads, completion_mask)

    def divergence(self, own: Tensor, judge: Tensor, own_head: Tensor, judge_head: Tensor, mask: Tensor) -> Tensor:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        loss: Tensor = _chunked_divergence_loss(own, judge, own_head, judge_head, mask, 1.0)[0]
        return loss


class Liger(Engineer):
    """The same loop with Liger's chunked loss instead of TRL's. Liger needs Triton, so it runs on CUDA only."""

    def divergence(self, own: Tensor, judge: Tensor, own_head: Tensor, judge_head: Tensor, mask: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        compiled = self._work.device == "cuda"
        kl = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)
        target = torch.where(mask.bool(), 0, -100).flatten()
        loss: Tensor = kl(own.flatten(0, 1), own_head, judge.flatten(0, 1), judge_head, target)
        return loss


def _forward_arguments(
    prompt: Tensor, prompt_mask: Tensor, completion: Tensor, completion_mask: Tensor
) -> dict[str, Any]:
    mask = torch.cat([prompt_mask, completion_mask], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {
        "input_ids": torch.cat([prompt, completion], 1),
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": False,
    }


def reference_gradient(
    work: Workload, student: Any, teacher: Any, prompts: Sequence[Ids], completions: Sequence[Ids]
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of plain transformers in float64 (the models are converted in place), and the adapters it belongs
    to, if any: random ones, because LoRA's first gradient is half zeros.

    On a GPU in float32: four digits better than the bfloat16 it judges, and billions of parameters must fit.
    """
    dense = Dense(work, student, teacher)
    adapters = [p for p in dense.model.parameters() if p.requires_grad] if work.lora else []
    torch.manual_seed(0)
    for weight in adapters:
        torch.nn.init.normal_(weight, std=0.05)
    values = [weight.detach().clone() for weight in adapters]
    dtype = torch.float64 if work.device == "cpu" else torch.float32
    dense.model.to(dtype)
    teacher.to(dtype)
    return dense.gradient(prompts, completions), values


def padded(rows: Sequence[Ids], *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def one_tokenizer(work: Workload) -> Any:
    """The tokenizer of both models. Raises NotImplementedError where each has its own."""
    if work.teacher_vocabulary:
        raise NotImplementedError("takes one tokenizer for both models, and these have two")
    return work.tokenizer


def lora_config(rank: int | None) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * (rank or 1), lora_dropout=0.0, target_modules="all-linear")


def make(name: str, work: Workload, student: Any, teacher: Any) -> Contender:
    """Raises ImportError where a peer is not installed."""
    from bench import peers

    contenders: dict[str, Any] = {
        "headstart": Headstart,
        "trl": peers.Trl,
        "trl-default": peers.TrlDefault,
        "gkd": peers.Gkd,
        "engineer": Engineer,
        "liger": Liger,
        "plain": Dense,
    }
    contender: Contender = contenders[name](work, student, teacher)
    return contender


NAMES = ("headstart", "trl", "trl-default", "gkd", "engineer", "liger", "plain")
