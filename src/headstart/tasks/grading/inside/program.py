"""The process of the untrusted program: runs it, then answers the judge's calls with values."""

from __future__ import annotations

import json
import os
import sys
import types

from headstart.tasks.grading.inside.values import decode, encode, exception_parts, frame, read_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def child(program: str, ask: int, tell: int) -> None:
    """Run the program, then serve requests until the judge hangs up."""
    answer(tell, {"confined": True})
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution  # dataclasses and pickle look their module up
    try:
        exec(compile(program, "solution.py", "exec"), solution.__dict__)
    except BaseException as error:
        answer(tell, {"error": exception_parts(error)})
        return
    answer(tell, {"value": None})
    objects: list[Any] = []
    while (request := read_frame(ask)) is not None:
        try:
            value = perform(json.loads(request), solution, objects)
            reply = {"value": encode(value, lambda value: objects.append(value) or len(objects) - 1)}  # type: ignore[func-returns-value]
        except BaseException as error:
            reply = {"error": exception_parts(error)}
        answer(tell, reply)


def perform(request: Mapping[str, Any], solution: types.ModuleType, objects: list[Any]) -> Any:
    """One request: what is done with a name of the program or with an object it gave out."""
    target = request["target"]
    if isinstance(target, int):
        subject = objects[target]
    elif target in vars(solution):
        subject = vars(solution)[target]
    else:
        raise NameError(f"name {target!r} is not defined")
    arguments = [decode(item, objects.__getitem__) for item in request["arguments"]]
    match request["act"]:
        case "get":
            return getattr(subject, *arguments)
        case "set":
            return setattr(subject, *arguments)
        case "truth":
            return bool(subject)
        case _:
            keywords = {name: decode(item, objects.__getitem__) for name, item in request["keywords"].items()}
            return subject(*arguments, **keywords)


def answer(tell: int, reply: Mapping[str, Any]) -> None:
    data = memoryview(frame(json.dumps(reply).encode()))
    while data:
        data = data[os.write(tell, data) :]
