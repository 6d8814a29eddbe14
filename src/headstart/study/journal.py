"""What a pilot has done so far, on disk, so that a killed one goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.config.differences import described, differences
from headstart.diagnosis.ledger import append_lines, read_lines
from headstart.errors import RunFolderError
from headstart.study.halving import Arm, Cost, Outcome, Prices


class Journal:
    """`diagnose/pilot.jsonl`: what was asked and timed in the first line, then one line per graded rung.

    Raises RunFolderError when the file belongs to a pilot with other `settings`.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.prices: Prices | None = None
        self.start: tuple[float, ...] = ()
        self.outcomes: dict[tuple[Arm, int], Outcome] = {}
        lines = read_lines(path)
        if not lines:
            return
        head, *rest = lines
        if other := described(differences(head["settings"], self.settings)):
            raise RunFolderError(
                f"{path} holds a pilot with other settings ({'; '.join(other)}); choose another folder with --out, or "
                "delete that file"
            )
        p = head["prices"]
        costs = {name: Cost(**p[name]) for name in ("full_step", "evaluation", "swap", "timing")}
        self.prices = Prices(step={int(n): Cost(**cost) for n, cost in p["step"].items()}, **costs)
        self.start = tuple(head["start"])
        for line in rest:
            outcome = {**line["outcome"], "scores": tuple(line["outcome"]["scores"])}
            self.outcomes[Arm(**line["arm"]), line["rung"]] = Outcome(**outcome)

    def begin(self, prices: Prices, start: tuple[float, ...]) -> None:
        self.prices, self.start = prices, start
        self.path.write_text("", encoding="utf-8")
        append_lines(self.path, [{"settings": self.settings, "prices": asdict(prices), "start": start}])

    def add(self, arm: Arm, rung: int, outcome: Outcome) -> None:
        self.outcomes[arm, rung] = outcome
        append_lines(self.path, [{"arm": asdict(arm), "rung": rung, "outcome": asdict(outcome)}])
