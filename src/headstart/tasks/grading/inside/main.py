"""Inside the sandbox, from start to verdict."""

from __future__ import annotations

import json
import os
import sys

from headstart.tasks.grading.inside.confine import build_root, confine, drop_privileges, lower, mount_folder
from headstart.tasks.grading.inside.judge import Link, examine
from headstart.tasks.grading.inside.program import answer, child
from headstart.tasks.grading.inside.values import read_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    settings = json.loads(sys.argv[1])
    if settings["binds"]:
        build_root(settings["binds"], settings["links"])
    if settings["disk"]:
        mount_folder(settings["folder"], settings["disk"], settings["files"])
    os.chdir(settings["folder"])
    drop_privileges()
    verdict = os.dup(1)
    program = (read_frame(0) or b"").decode(errors="surrogatepass")
    ask_out, ask_in = os.pipe()
    tell_out, tell_in = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            confine(settings, (ask_out, tell_in))
        except BaseException as error:
            answer(tell_in, {"confined": repr(error)})
            os._exit(1)
        try:
            child(program, ask_out, tell_in)
        finally:
            os._exit(0)
    os.close(ask_out)
    os.close(tell_in)
    lower("AS", settings["judge_memory"])
    lower("CPU", settings["deadline"])  # also when nobody is left to end a judge that is stuck in a comparison
    job = json.loads(read_frame(0) or b"{}")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # what tests print must not mix with the verdict
    status, detail, cpu = examine(Link(pid, ask_in, tell_out, settings["seconds"]), job)
    line = json.dumps({"nonce": job["nonce"], "status": status, "detail": detail, "cpu": cpu})
    os.write(verdict, line.encode())
    os._exit(0)
