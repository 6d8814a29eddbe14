"""Generated tokens per second: the in-process engine against plain batched `generate`, interleaved.

    OMP_NUM_THREADS=1 python -m bench.evaluate --out docs/results/evaluate-bench.json

Both arms get the same model, the same prompts (sorted by length), the same batch size, sampling and stop token. The
plain arm calls `model.generate` for one batch after the other; the engine refills its batch as rows finish. Before any
timing, both answer 32 prompts greedily, which warms them up and shows that they agree. Rounds alternate who goes first.
"Busy" is the share of the plain arm's row-steps that make a token: refilling alone can gain 1 / busy at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from bench.step import environment
from headstart.config.schema import ModelConfig
from headstart.models.causal import CausalModel
from headstart.models.load import load_model, load_tokenizer
from headstart.models.templates import View
from headstart.records import Problem, Prompt, Sampling
from headstart.rollout.engine import InProcessEngine
from headstart.tasks.tiny import puzzle
from headstart.testing import random_model

GREEDY = Sampling(temperature=0.0, top_p=1.0)


@dataclass(frozen=True)
class Workload:
    """A model and prompts whose completions differ in length."""

    name: str
    note: str
    model: CausalModel
    stop_id: int
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    max_tokens: int
    batch_size: int


Arm = Callable[[Workload, Sampling, int], list[tuple[int, ...]]]


def engine(work: Workload, sampling: Sampling, seed: int) -> list[tuple[int, ...]]:
    """Completions of the in-process engine, in the order of the prompts."""
    rollouts = InProcessEngine(work.model, [work.stop_id]).generate(
        work.prompts,
        samples=1,
        max_tokens=work.max_tokens,
        sampling=sampling,
        key=(seed, "bench", 0),
        batch_size=work.batch_size,
    )
    return [rollout.completion_ids for rollout in rollouts]


def plain(work: Workload, sampling: Sampling, seed: int) -> list[tuple[int, ...]]:
    """Completions of `model.generate`, batch after batch of prompts of like length."""
    torch.manual_seed(seed)
    draws = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    found: dict[int, tuple[int, ...]] = {}
    for batch in batches(work):
        width = max(len(prompt.token_ids) for prompt in batch)
        pads = [width - len(prompt.token_ids) for prompt in batch]
        ids = torch.tensor([[0] * pad + list(prompt.token_ids) for pad, prompt in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        output = work.model.model.generate(
            input_ids=ids.to(work.model.device),
            attention_mask=mask.to(work.model.device),
            do_sample=bool(draws),
            max_new_tokens=work.max_tokens,
            eos_token_id=work.stop_id,
            pad_token_id=0,
            **draws,
        )
        for prompt, row in zip(batch, output[:, width:].tolist(), strict=True):
            end = row.index(work.stop_id) + 1 if work.stop_id in row else len(row)
            found[prompt.index] = tuple(row[:end])
    return [found[prompt.index] for prompt in work.prompts]


def batches(work: Workload) -> list[list[Prompt]]:
    """Prompts of like length side by side, the longest first."""
    order = sorted(work.prompts, key=lambda prompt: len(prompt.token_ids), reverse=True)
    return [order[start : start + work.batch_size] for start in range(0, len(order), work.batch_size)]


def busy(work: Workload, lengths: Sequence[int]) -> float:
    """Share of the plain arm's row-steps that make a token, given the lengths of its completions."""
    of = {prompt.index: length for prompt, length in zip(work.prompts, lengths, strict=True)}
    steps = sum(len(batch) * max(of[prompt.index] for prompt in batch) for batch in batches(work))
    return sum(lengths) / steps


ARMS: dict[str, Arm] = {"generate": plain, "engine": engine}


def fast(model: CausalModel) -> CausalModel:
    """As evaluations decode. `model.generate` does not come by here."""
    model.use_fast_decoding()
    return model


def asked(texts: Iterable[str], tokenizer: Any) -> tuple[Prompt, ...]:
    """Each text as a user's turn in the tokenizer's template."""
    prompts = []
    for index, text in enumerate(texts):
        problem = Problem(str(index), messages=({"role": "user", "content": text},))
        ids = View(tokenizer).ids(problem)
        prompts.append(Prompt(index, problem.id, ids, ids))
    return tuple(prompts)


def tiny_world(device: torch.device, count: int) -> Workload:
    """The bundled teacher; one to nine rounds, so a right answer has 40 to 192 tokens."""
    config = ModelConfig(path="tiny:teacher")
    tokenizer = load_tokenizer(config)
    texts = (replace(puzzle("train", index), rounds=1 + index * 5 % 9).text for index in range(count))
    return Workload(
        name="tiny-world",
        note="bundled teacher, 0.3 M parameters; length set by the problem; temperature 1",
        model=fast(CausalModel(load_model(config, device), len(tokenizer), 0)),
        stop_id=int(tokenizer.eos_token_id),
        prompts=asked(texts, tokenizer),
        sampling=Sampling(temperature=1.0, top_p=1.0),
        max_tokens=512,
        batch_size=16,
    )


def random_weights(
    name: str,
    device: torch.device,
    count: int,
    *,
    vocabulary: int,
    hidden: int,
    scale: float,
    stop_bias: float,
    top_p: float = 0.95,
    batch_size: int = 16,
) -> Workload:
    """A random Qwen3 whose stop logit is the constant `stop_bias`: lengths spread like waiting times, cut at 512."""
    stop_id = 1
    model = random_model("qwen3", vocabulary, hidden=hidden, layers=4, scale=scale)
    head = torch.nn.Linear(hidden, vocabulary)
    head.weight.data = model.get_input_embeddings().weight.detach().clone()
    head.weight.data[stop_id] = 0
    head.bias.data.zero_()[stop_id] = stop_bias
    model.config.tie_word_embeddings = False
    model.config.max_position_embeddings = 1024
    model.set_output_embeddings(head)
    rng = Random(0)
    prompts = []
    for index in range(count):
        ids = tuple(rng.randrange(2, vocabulary) for _ in range(rng.randint(20, 200)))
        prompts.append(Prompt(index, str(index), ids, ids))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return Workload(
        name=name,
        note=f"random Qwen3, {size:.0f} M parameters, {vocabulary:,} ids; temperature 0.7, top-p {top_p}",
        model=fast(CausalModel(model.to(device).requires_grad_(False), vocabulary, 0)),
        stop_id=stop_id,
        prompts=tuple(prompts),
        sampling=Sampling(temperature=0.7, top_p=top_p),
        max_tokens=512,
        batch_size=batch_size,
    )


def checkpoint(folder: str, problems: Path, count: int, batch_size: int) -> Workload:
    """A published model and the first `count` questions of a JSON lines file, greedily, on a CPU."""
    config = ModelConfig(path=folder)
    tokenizer, model = load_tokenizer(config), load_model(config, torch.device("cpu"))
    rows = map(json.loads, problems.read_text(encoding="utf-8").splitlines()[:count])
    names = ("question", "prompt", "problem", "text")
    return Workload(
        name="checkpoint",
        note=f"{Path(folder).name}, {problems.name}, greedy",
        model=fast(CausalModel(model, min(len(tokenizer), model.config.vocab_size), 0)),
        stop_id=int(tokenizer.eos_token_id),
        prompts=asked((next(row[name] for name in names if name in row) for row in rows), tokenizer),
        sampling=GREEDY,
        max_tokens=512,
        batch_size=batch_size,
    )


SMALL: dict[str, Any] = {"vocabulary": 4096, "hidden": 128, "scale": 0.18, "stop_bias": 5.2}
WIDE: dict[str, Any] = {"vocabulary": 151_936, "hidden": 256, "scale": 0.375, "stop_bias": 24.0}
WORKLOADS: dict[str, Callable[[torch.device], Workload]] = {
    "tiny-world": lambda device: tiny_world(device, 192),
    "random-4k": lambda device: random_weights("random-4k", device, 128, **SMALL),
    "random-4k, no top-p": lambda device: random_weights("random-4k", device, 128, **SMALL, top_p=1.0),
    "random-152k": lambda device: random_weights("random-152k", device, 32, **WIDE, batch_size=8),
}


def timed(arm: Arm, work: Workload, seed: int) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    lengths = [len(completion) for completion in arm(work, work.sampling, seed)]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "tokens": sum(lengths), "lengths": lengths}


def spread(lengths: Sequence[int]) -> dict[str, float]:
    ordered = sorted(lengths)
    at = {name: ordered[int(q * (len(ordered) - 1))] for name, q in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95))}
    return {"min": ordered[0], **at, "max": ordered[-1], "mean": statistics.fmean(ordered)}


def agreement(work: Workload) -> str:
    """How many of 32 prompts both arms answer alike, greedily and in 64 tokens; warms both up, too."""
    short = replace(work, prompts=work.prompts[:32], max_tokens=64)
    answers = [arm(short, GREEDY, 0) for arm in ARMS.values()]
    return f"{sum(a == b for a, b in zip(*answers, strict=True))}/{len(short.prompts)}"


def measure(work: Workload, rounds: int) -> dict[str, Any]:
    """`rounds` interleaved timings of both arms."""
    agree = agreement(work)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed in range(rounds):
        for name in sorted(ARMS, reverse=bool(seed % 2)):
            runs[name].append(timed(ARMS[name], work, seed))
    plain_busy = statistics.median(busy(work, run["lengths"]) for run in runs["generate"])
    rates = {
        clock: {name: [run["tokens"] / run[clock] for run in runs[name]] for name in ARMS}
        for clock in ("seconds", "cpu_seconds")
    }
    return {
        "note": work.note,
        "prompts": len(work.prompts),
        "batch_size": work.batch_size,
        "max_tokens": work.max_tokens,
        "prompt_lengths": spread([len(prompt.token_ids) for prompt in work.prompts]),
        "completion_lengths": {name: spread([n for run in runs[name] for n in run.pop("lengths")]) for name in ARMS},
        "plain_busy": plain_busy,
        "greedy_agreement": agree,
        "runs": runs,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates["seconds"].items()},
        "ratio": ratio(rates["seconds"]),
        "ratio_in_cpu_seconds": ratio(rates["cpu_seconds"]),
    }


def ratio(rates: dict[str, list[float]]) -> dict[str, float]:
    """Engine over generate, round by round."""
    ratios = [ours / theirs for ours, theirs in zip(rates["engine"], rates["generate"], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


HEADER = (
    "| workload | greedy alike | tokens p5 / p50 / p95 | busy | generate, tokens/s | engine, tokens/s | "
    "ratio (min to max) | in CPU seconds |\n|---|---|---|---|---|---|---|---|"
)


def row(name: str, result: dict[str, Any]) -> str:
    lengths, rates = result["completion_lengths"]["engine"], result["tokens_per_second"]
    cells = [
        name,
        result["greedy_agreement"],
        " / ".join(f"{lengths[q]:.0f}" for q in ("p5", "p50", "p95")),
        f"{result['plain_busy']:.0%}",
        *(f"{rates[arm]:,.0f}" for arm in ARMS),
        *(
            f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"
            for r in (result["ratio"], result["ratio_in_cpu_seconds"])
        ),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS, "checkpoint"], default=list(WORKLOADS))
    parser.add_argument("--model", help="folder of a published model, for `checkpoint`")
    parser.add_argument("--problems", type=Path, help="JSON lines with questions, for `checkpoint`")
    parser.add_argument("--count", type=int, default=24, help="questions of `checkpoint`")
    parser.add_argument("--batch", type=int, default=8, help="rows at once of `checkpoint`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="where the raw figures go, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"environment": environment() | {"device": options.device}, "workloads": {}}
    print(HEADER)
    for name in options.workloads:
        if name == "checkpoint":
            if options.model is None or options.problems is None:
                print("checkpoint: not run: it needs --model and --problems")
                continue
            work = checkpoint(options.model, options.problems, options.count, options.batch)
        else:
            work = WORKLOADS[name](torch.device(options.device))
        result = measure(work, options.rounds)
        record["workloads"][name] = result
        print(row(name, result), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
