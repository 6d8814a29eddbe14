"""Work on several gloo ranks of this machine, without torchrun around it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch

from headstart.ranks.runtime import ALONE, Runtime
from quick import free_port, launched_by_hand

CONTEXT = multiprocessing.get_context("forkserver")


def on_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(runtime, *arguments)` returns on each rank. An error on any rank is raised here, as text.

    One rank is this process.
    """
    if world_size == 1:
        return [work(ALONE, *arguments)]
    CONTEXT.set_forkserver_preload(["headstart.distillation.run"])
    port, pipes = free_port(), [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, world_size, port, pipes[rank][1], work, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    results, problems = [], []
    for receiver, _ in pipes:
        try:
            result, problem = pickle.loads(receiver.recv_bytes())
        except EOFError:
            result, problem = None, "ended without a word"
        results.append(result)
        problems.append(problem)
    for process in processes:
        process.join(60)
        process.kill()
    assert not any(problems), "\n".join(str(problem) for problem in problems)
    return results


def _rank(rank: int, world_size: int, port: int, sender: Any, work: Callable[..., Any], arguments: Any) -> None:
    os.environ |= launched_by_hand(rank, world_size, port)
    torch.set_num_threads(1)
    try:
        runtime = Runtime.start("cpu")
        sender.send_bytes(pickle.dumps((work(runtime, *arguments), None)))  # torch's own pickling would share memory
        runtime.barrier()
    except BaseException:
        sender.send_bytes(pickle.dumps((None, f"rank {rank}: {traceback.format_exc()}")))
