"""What a process says about itself."""

from __future__ import annotations

import subprocess
import sys

import torch

from headstart.ranks.runtime import Runtime

PEAK = "from headstart.ranks.runtime import Runtime; print(Runtime.start('cpu').peak_memory_gib())"


def test_peak_memory_is_this_process_s_own_not_its_parent_s() -> None:
    ballast = bytearray(2**30)
    ballast[::4096] = b"x" * len(ballast[::4096])  # pages that are written to are resident
    child = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 0 < float(child.stdout) < 0.9
    assert Runtime.start("cpu").peak_memory_gib() > 1


def test_peak_memory_grows_with_what_is_held() -> None:
    runtime = Runtime.start("cpu")
    before = runtime.peak_memory_gib()
    held = torch.ones(int((before + 0.2) * 2**28))  # more than ever before, whatever other tests held
    assert runtime.peak_memory_gib() > before
    del held
