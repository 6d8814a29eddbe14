"""Right answers to function-calling problems, written in every rendering that models use."""

from __future__ import annotations

import json
from typing import Any

from headstart.records import Problem

Calls = list[tuple[str, dict[str, Any]]]


def hermes(calls: Calls) -> str:
    blocks = (json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls)
    return "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)


def llama(calls: Calls) -> str:
    return "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)


def json_list(calls: Calls) -> str:
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls]) if calls else ""


def python(calls: Calls) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    return f"[{', '.join(one(*call) for call in calls)}]"


def qwen_xml(calls: Calls) -> str:
    """Qwen3-Coder and Qwen 3.5: values without quotes."""

    def one(name: str, arguments: dict[str, Any]) -> str:
        pairs = (f"<parameter={key}>\n{_bare(value)}\n</parameter>\n" for key, value in arguments.items())
        return f"<tool_call>\n<function={name}>\n{''.join(pairs)}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def glm(calls: Calls) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        pairs = (f"<arg_key>{k}</arg_key>\n<arg_value>{_bare(v)}</arg_value>\n" for k, v in arguments.items())
        return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"

    return "\n".join(one(*call) for call in calls)


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


RENDERINGS = (hermes, llama, json_list, python)


def _first(options: list[Any]) -> Any:
    """The first option that is not "", the fields of objects chosen likewise."""

    def plain(option: Any) -> Any:
        if isinstance(option, dict):
            return {key: _first(values) for key, values in option.items() if _present(values)}
        return [plain(item) for item in option] if isinstance(option, list) else option

    return plain(_present(options)[0])


def _present(options: list[Any]) -> list[Any]:
    return [option for option in options if option != ""]


def reference(problem: Problem) -> Calls:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in problem.meta["functions"]}
    return [
        (name, {key: _first(o) for key, o in allowed.items() if _present(o) and key in schemas[name]["properties"]})
        for call in problem.meta["expected"]
        for name, allowed in call.items()
    ]
