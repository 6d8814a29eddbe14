"""On-policy distillation with Early Stopping Rollout as one loop: load, sample, score, step, evaluate.

    python examples/loop.py            # the bundled tiny pair, ten seconds on one core

The library does the same with micro-batches, padding-free scoring, bounded memory, several ranks, checkpoints and
resume; its loss of a step is this one (tests/integration/test_examples.py).
"""

from __future__ import annotations

from importlib.resources import files

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import headstart as hs
from headstart.tasks.tiny import TinyTask

HORIZON = 16  # completion tokens sampled at all; the paper's is 100
STEPS, PROMPTS_PER_STEP, LR = 40, 8, 3e-4
SAMPLING = hs.Sampling(temperature=1.0, top_p=1.0)


def load(student: str, teacher: str) -> hs.Pair:
    """Both models in memory, cut to the vocabulary they share. Raises VocabularyError where they share none."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher)]
    return hs.Pair(*models, tokenizer)


def batch(pair: hs.Pair, rollouts: list[hs.Rollout], view: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `[B, T]`, padded on the right, and `[B, T - 1]`: which positions predict a
    completion token. The last prompt token predicts the first one, so the mask starts one position early."""
    prompts = [r.prompt.token_ids if view == "student" else r.prompt.teacher_token_ids for r in rollouts]
    rows = [torch.tensor((*p, *r.completion_ids)) for p, r in zip(prompts, rollouts, strict=True)]
    predicts = [
        torch.tensor([False] * (len(p) - 1) + [True] * len(r.completion_ids))
        for p, r in zip(prompts, rollouts, strict=True)
    ]
    ids_BT = pad_sequence(rows, batch_first=True, padding_value=pair.tokenizer.pad_token_id or 0)
    mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids_BT, mask_BT, pad_sequence(predicts, batch_first=True)


def completion_logits(pair: hs.Pair, rollouts: list[hs.Rollout], view: str) -> torch.Tensor:
    """Logits `[M, V]` at the M completion tokens in row order, temperature 1, cut to the shared vocabulary."""
    model = pair.student.model if view == "student" else pair.teacher.model
    ids_BT, mask_BT, predicts_BT = batch(pair, rollouts, view)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1, : pair.vocabulary.size]
    return logits_BTV[predicts_BT]


def loss_of(pair: hs.Pair, rollouts: list[hs.Rollout]) -> torch.Tensor:
    """Reverse KL at every sampled position, mean over each rollout's window, then over rollouts. Nats.

    The stop token is in the window where it was sampled; reaching the horizon adds none and is never penalised.
    """
    with torch.no_grad():  # the teacher only judges; it reads its own view of the prompt
        teacher_MV = completion_logits(pair, rollouts, "teacher")
    student_MV = completion_logits(pair, rollouts, "student")
    kl_M = hs.reverse_kl(student_MV, teacher_MV, reduction="none")
    windows = kl_M.split([len(r.completion_ids) for r in rollouts])
    return torch.stack([window.mean() for window in windows]).mean()


def accuracy(pair: hs.Pair, task: TinyTask, problems: list[hs.Problem]) -> float:
    """Share of right responses; evaluation samples up to its own length, never the training horizon."""
    rollouts = pair.sample(problems, max_tokens=200, sampling=SAMPLING, purpose="evaluation")
    graded = [task.grade(problem, pair.text(r)) for problem, r in zip(problems, rollouts, strict=True)]
    return sum(verdict.correct for verdict in graded) / len(graded)


def main() -> None:
    folder = files("headstart") / "data" / "tiny"
    pair = load(str(folder / "student"), str(folder / "teacher"))
    train, test = TinyTask("train", 4096).problems(), TinyTask("test", 96)
    held_out = list(test.problems())
    print(f"before: {accuracy(pair, test, held_out):.1%}")

    model = pair.student.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(STEPS):
        chosen = order[step * PROMPTS_PER_STEP : (step + 1) * PROMPTS_PER_STEP]

        # 1. Sample from the student's own weights, up to the horizon or a stop token. No gradient through sampling.
        model.eval()
        prompts = [train[index] for index in chosen]
        rollouts = pair.sample(prompts, max_tokens=HORIZON, sampling=SAMPLING, seed=step, purpose="rollout")

        # 2. Score: both models read the same completion; 3. loss.
        model.train()
        loss = loss_of(pair, rollouts)

        # 4. Step.
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 10 == 0:
            tokens = sum(len(r.completion_ids) for r in rollouts)
            print(f"step {step + 1}: {loss.item():.4f} nats per token, {tokens} tokens")

    print(f"after: {accuracy(pair, test, held_out):.1%}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
