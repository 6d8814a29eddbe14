"""What to do after each verb: its last lines, with the commands to type."""

from __future__ import annotations

import shlex

from headstart.cli.show import say

NEXT = {
    "init": (
        "  headstart preflight {run}               # do the two fit together, and in memory?",
        "  headstart diagnose {run} --minutes 10   # where does the teacher stop teaching?",
        "  headstart distill {run} --out runs/first",
    ),
    "quickstart": (
        "next: headstart chat {run}  (student before and after)",
        "      headstart init  (the same with your own pair)",
    ),
    "preflight": (
        "next: headstart diagnose {run}  (where does the teacher stop teaching?)",
        "      headstart distill {run}",
    ),
    "diagnose": ("next: headstart distill {run} {horizon}",),
    "distill": (
        "next: headstart chat {run}  (student before and after; the model is in {run}/model)",
        "      headstart explain {run}, then headstart report {run}  (what changed, on one page)",
    ),
    "evaluate": ("next: headstart evaluate --compare {run} OTHER  (beside another result of the same problems)",),
    "explain": ("next: headstart report {run}  (one page with all of it)",),
    "report": ("next: headstart explain {run}, then this again  (where the gain comes from)",),
}
"""By verb: lines whose {run} is the folder, or the arguments, as they are typed."""


def say_next(verb: str, *run: object, horizon: str = "") -> None:
    for line in NEXT[verb]:
        say(line.format(run=shlex.join(map(str, run)), horizon=horizon), style="dim")
