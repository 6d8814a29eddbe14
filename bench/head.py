"""The head of a divided model: gathered once a step, or the loss on each rank's rows of the vocabulary?

    torchrun --nproc-per-node=2 -m bench.head --vocabulary 151936 --hidden 896 --tokens 800

Both ways make the same loss and gradients of a step's reverse KL (checked). `gathered` moves the head, and its gradient
where it is trained; `split` moves hidden states of all ranks, and two numbers a row for the normalisers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 128


def gathered(head_vD: Tensor, teacher_vD: Tensor, hidden_MD: Tensor, theirs_MD: Tensor) -> tuple[Tensor, ...]:
    """Loss, gradient of this rank's hidden states and of its rows of the head."""
    whole_VD, teacher_VD = _all(head_vD), _all(teacher_vD)
    loss, hidden_grad, head_grad = torch.zeros(()), torch.empty_like(hidden_MD), torch.zeros_like(whole_VD)
    for rows in _chunks(len(hidden_MD)):
        logp = (hidden_MD[rows] @ whole_VD.T).log_softmax(-1)
        d = logp - (theirs_MD[rows] @ teacher_VD.T).log_softmax(-1)
        kl = (logp.exp() * d).sum(-1, keepdim=True)
        grad = logp.exp() * (d - kl)
        loss += kl.sum()
        hidden_grad[rows] = grad @ whole_VD
        head_grad.addmm_(grad.T, hidden_MD[rows])
    dist.all_reduce(loss)
    own = torch.empty_like(head_vD)
    dist.reduce_scatter_tensor(own, head_grad)
    return loss, hidden_grad, own


def split(head_vD: Tensor, teacher_vD: Tensor, hidden_MD: Tensor, theirs_MD: Tensor) -> tuple[Tensor, ...]:
    """The same from every rank's rows of the vocabulary and the hidden states of all."""
    every_ND, others_ND = _all(hidden_MD), _all(theirs_MD)
    loss, partial, head_grad = torch.zeros(()), torch.empty_like(every_ND), torch.zeros_like(head_vD)
    for rows in _chunks(len(every_ND)):
        logp, logq = _normal(every_ND[rows] @ head_vD.T), _normal(others_ND[rows] @ teacher_vD.T)
        d = logp - logq
        kl = (logp.exp() * d).sum(-1, keepdim=True)
        dist.all_reduce(kl)
        grad = logp.exp() * (d - kl)
        loss += kl.sum()
        partial[rows] = grad @ head_vD
        head_grad.addmm_(grad.T, every_ND[rows])
    hidden_grad = torch.empty_like(hidden_MD)
    dist.reduce_scatter_tensor(hidden_grad, partial)
    return loss, hidden_grad, head_grad


def _normal(logits: Tensor) -> Tensor:
    """Log-probabilities of this rank's rows of the vocabulary."""
    most = logits.amax(-1, keepdim=True)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    total = (logits - most).exp().sum(-1, keepdim=True)
    dist.all_reduce(total)
    return logits - most - total.log()


def _all(part: Tensor) -> Tensor:
    whole = part.new_empty(len(part) * dist.get_world_size(), part.shape[1])
    dist.all_gather_into_tensor(whole, part)
    return whole


def _chunks(rows: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("vocabulary", 151936), ("hidden", 896), ("tokens", 800), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    heads = [torch.randn(a.vocabulary // world, a.hidden) * 0.02 for _ in range(2)]
    hidden = [torch.randn(a.tokens, a.hidden) for _ in range(2)]
    ways: dict[str, Callable[..., tuple[Tensor, ...]]] = {"gathered": gathered, "split": split}
    found = {name: way(*heads, *hidden) for name, way in ways.items()}
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(a.rounds):
        for name, way in ways.items():
            dist.barrier()
            start = time.perf_counter()
            way(*heads, *hidden)
            seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        medians = {name: round(statistics.median(s), 2) for name, s in seconds.items()}
        print(json.dumps(vars(a) | {"ranks": world, "torch": torch.__version__} | medians))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
