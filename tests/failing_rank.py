"""`headstart` with a fault in rank 1, in its third step: `python failing_rank.py memory|kill distill ...`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from headstart.cli.main import main
from headstart.train import loop

FAULT, STEP = sys.argv.pop(1), 2
train_step = loop.train_step


def failing(parts: Any, step: int, *rest: Any) -> Any:
    if os.environ.get("RANK") == "1" and step == STEP:
        if FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError("the fault of rank 1")
    return train_step(parts, step, *rest)


loop.train_step = failing
if __name__ == "__main__":
    main()
