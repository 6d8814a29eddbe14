"""A diagnosis that ends within some minutes: the setting that fits, and then as many problems as there is time for."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from headstart.assemble.speed import FEWEST, PLANNED, duration, growing, width
from headstart.config.differences import chosen_before
from headstart.diagnosis.budget import Prices, Setting
from headstart.diagnosis.ledger import Store
from headstart.diagnosis.measure import Listener, Measured, Plan, measure
from headstart.diagnosis.probes import GIFTS, DecayProbe
from headstart.files import write_json


def within(
    minutes: float,
    end: float,
    probe: DecayProbe,
    plan: Plan,
    out: Path,
    settings: Callable[..., dict[str, Any]],
    listener: Listener,
) -> tuple[Measured, Prices]:
    """What there is time for until `end`, or what an earlier call chose in the folder `out`; said in words.

    `settings` of the prompts, the grid and the longest response are recorded, with the minutes that chose them.
    """
    listener.progress(0, 0, "timing both models")
    prices, full, file = Prices.timed(probe, plan.votes), plan.setting(probe), out / "settings.json"
    setting = prices.smaller(full, PLANNED * (end - time.monotonic()))
    if stored := chosen_before(file):
        setting = Setting(stored["prompts"], tuple(stored["grid"]), stored["max_tokens"])
    else:
        more = ", then more problems while there is time" if setting.problems < full.problems else ""
        listener.say(
            f"In the time given: {setting}{more} ({setting.problems} tell an accuracy to ±{width(setting.problems)} "
            f"points). In full: {full}, at most about {duration(prices.whole(full, GIFTS))}"
        )
        if (needed := prices.whole(setting)) > (left := end - time.monotonic()):
            warnings.warn(
                f"minutes={minutes:g} are too few: {setting} may take {duration(needed)}, {duration(left)} are left",
                stacklevel=2,
            )
    limited, asked = replace(plan, grid=setting.lengths), replace(probe, max_tokens=setting.max_tokens)
    # What the first half takes corrects the plan; a few problems are quicker together.
    half = not stored and setting != full and setting.problems >= 2 * FEWEST
    start = setting.problems // 2 if half else setting.problems

    def first(count: int) -> Measured:
        some = replace(asked, prompts=probe.prompts[:count])
        record = settings(some.prompts, setting.lengths, setting.max_tokens)
        record["minutes"] = stored.get("minutes", minutes)
        if count > start:  # what the folder holds is the beginning of this
            write_json(file, record)
        return measure(some, limited, Store(out, record), listener, announced=False)

    if stored:
        return first(start), prices
    return growing(start, full.problems, end, first, prices.ending(replace(setting, problems=1))), prices
