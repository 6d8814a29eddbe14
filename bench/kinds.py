"""Where a step's time goes, by phase and kind of call: what torch's profiler saw in one step, after one to warm up.

    OMP_NUM_THREADS=1 python -m bench.kinds R1s R2s --contenders headstart trl --out docs/results/step-kinds.json

A phase's CPU seconds come from a step without the profiler; the profiler's seconds, which are longer and pass on the
wall, only divide them. "Python" is the time in a phase outside of all calls, autograd's own included: of small models
the profiler makes it larger than it is.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.contenders import NAMES, Contender, make
from bench.cost import PHASES
from bench.step import environment, sharing, timed
from bench.workloads import WORKLOADS, Workload
from headstart.train.metrics import Clock

KINDS = {
    "products": "mm addmm mv _linear_pointwise mkldnn_linear _mkl_linear matmul linear",
    "attention": "bmm baddbmm _softmax _softmax_backward_data _safe_softmax "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward "
    "_scaled_dot_product_attention_math",
    "copies": "copy_ cat clone index index_select gather scatter scatter_ index_copy_ index_put_ _index_put_impl_ "
    "constant_pad_nd repeat repeat_interleave stack index_add_ embedding embedding_dense_backward",
    "optimizer's kernel": "_fused_adamw_ _fused_adam_ _foreach_norm _foreach_mul_ _foreach_add_ _foreach_addcdiv_",
}
OF = {call: kind for kind, calls in KINDS.items() for call in calls.split()}
STEP_PHASES = tuple(dict.fromkeys(PHASES.values()))


def kind(call: str) -> str:
    """What a profiler's event is counted as."""
    name = call.rsplit("::", 1)[-1]
    return OF.get(name, "element by element" if "::" in call and not call.startswith("autograd::") else "Python")


@contextmanager
def marked() -> Iterator[None]:
    """Headstart's own phases show in the profile."""
    inner = Clock.phase

    @contextmanager
    def phase(self: Clock, name: str) -> Iterator[None]:
        with record_function(name), inner(self, name):
            yield

    with mock.patch.object(Clock, "phase", phase):
        yield


def seen(contender: Contender, step: int) -> dict[str, dict[str, float]]:
    """The profiler's seconds of one step by phase and kind. What is in no phase of its own is the student's."""
    with marked(), profile(activities=[ProfilerActivity.CPU]) as profiled, record_function("student"):
        contender.step(step)
    found: dict[str, dict[str, float]] = {phase: {} for phase in STEP_PHASES}
    within: dict[int, str] = {}
    # Parents begin before their children.
    for event in sorted(profiled.events() or [], key=lambda event: (event.time_range.start, -event.time_range.end)):
        phase = within.get(id(event.cpu_parent), "student") if event.cpu_parent else "student"
        within[id(event)] = phase = event.name if event.name in STEP_PHASES else phase
        of = kind(event.name)
        found[phase][of] = found[phase].get(of, 0.0) + event.self_cpu_time_total / 1e6
    return found


def measure(name: str, work: Workload) -> dict[str, Any]:
    student, teacher = work.models()
    contender = make(name, work, student, sharing(teacher))
    contender.step(0)
    phases = timed(contender, work, 1)["phases"]
    found = {}
    for phase, kinds in seen(contender, 2).items():
        whole = sum(kinds.values()) or 1.0
        found[phase] = {of: phases[phase] * seconds / whole for of, seconds in kinds.items()}
    return {"phases": phases, "kinds": found}


def table(record: dict[str, Any]) -> str:
    kinds = [*KINDS, "element by element", "Python"]
    lines = ["| workload | contender | phase | CPU seconds | " + " | ".join(kinds) + " |"]
    lines.append("|" + "---|" * (4 + len(kinds)))
    for work, everybody in record["workloads"].items():
        for name, result in everybody.items():
            for phase, seconds in result["phases"].items():
                cells = [f"{result['kinds'][phase].get(of, 0.0):.2f}" for of in kinds]
                lines.append(f"| {work} | {name} | {phase} | {seconds:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--contenders", nargs="+", default=["headstart"], choices=NAMES)
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    record: dict[str, Any] = {"environment": environment(), "workloads": {}}
    for work in options.workloads:
        record["workloads"][work] = {name: measure(name, WORKLOADS[work]) for name in options.contenders}
        if options.out is not None:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
