import json
import warnings

import pytest

from headstart.checks.findings import Finding, Preflight, Severity, caught
from headstart.errors import DataError


@pytest.mark.parametrize(
    ("severities", "code"),
    [
        ([], 0),
        (["ok", "note"], 0),
        (["ok", "warning", "note"], 1),
        (["warning", "blocking", "ok"], 2),
    ],
)
def test_the_exit_code_is_the_worst_finding(severities: list[Severity], code: int) -> None:
    result = Preflight(tuple(Finding("check", severity, "text") for severity in severities))
    assert result.exit_code == code
    written = json.loads(json.dumps(result.to_json()))
    assert (written["format"], written["exit_code"], len(written["findings"])) == (1, code, len(severities))


def test_json_holds_every_field() -> None:
    finding = Finding("prompts", "note", "3 of 64", "remove them", {"duplicates": 3})
    assert Preflight((finding,)).to_json()["findings"] == [
        {
            "check": "prompts",
            "severity": "note",
            "message": "3 of 64",
            "remedy": "remove them",
            "figures": {"duplicates": 3},
        }
    ]


def test_warnings_and_errors_become_findings() -> None:
    found: list[Finding] = []
    with caught("loading", found):
        warnings.warn("the head is narrow; resize it", stacklevel=1)
        warnings.warn("the head is narrow; resize it", stacklevel=1)
        warnings.warn("not for users", DeprecationWarning, stacklevel=1)
        raise DataError("a.jsonl is empty (found 0 bytes). Give a file with rows")
    assert found == [
        Finding("loading", "warning", "the head is narrow", "resize it"),
        Finding(
            "loading", "blocking", "a.jsonl is empty (found 0 bytes)", "Give a file with rows", {"error": "DataError"}
        ),
    ]


def test_bugs_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), caught("loading", []):
        _ = 1 / 0
