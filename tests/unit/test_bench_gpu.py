"""bench/gpu.py: its commands can be read, and no part costs another its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench import gpu, step


@pytest.mark.parametrize("rehearse", [True, False])
def test_every_command_can_be_read(rehearse: bool) -> None:
    found = gpu.parts(rehearse)
    assert sum(part.limit for part in found[:5]) < 11 * 60
    for part in found:
        module, *arguments = part.command
        if module == "bench.step":
            options = step.parser().parse_args(arguments)
            assert step.WORKLOADS[options.workloads[0]].device == ("cpu" if rehearse else "cuda")
            assert options.seconds == part.limit / 2


def test_parts_fail_and_hang_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "writes.py").write_text("import sys; open(sys.argv[1], 'w').write('{}'); print('written')")
    (tmp_path / "fails.py").write_text("raise SystemExit('it broke')")
    (tmp_path / "hangs.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    commands = {"fails": ["fails"], "hangs": ["hangs"], "writes": ["writes", "{out}"]}
    found = [gpu.Part(name, command, 1.0 if name == "hangs" else 30.0) for name, command in commands.items()]
    outcomes = gpu.visit(found, tmp_path / "out", 100.0)
    assert [one["outcome"] for one in outcomes] == ["failed with 1", "stopped after 1 s", "done"]
    assert [one["figures"] for one in outcomes] == [False, False, True]
    assert json.loads((tmp_path / "out" / "parts.json").read_text()) == json.loads(json.dumps(outcomes))
    assert (tmp_path / "out" / "fails.txt").read_text() == "it broke\n"
    assert (tmp_path / "out" / "hangs.txt").read_text() == "begun\n"
    late = gpu.visit(found[2:], tmp_path / "late", gpu.LEAST / 2)
    assert late[0]["outcome"] == "skipped: no time left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", "nowhere"])
    assert "torch sees no CUDA device" in capsys.readouterr().err
