"""What a diagnosis has measured so far, on disk, so that a killed one goes on and gives the same numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.assemble.pair import Speaker
from headstart.config.differences import described, differences
from headstart.diagnosis.agreement import References
from headstart.diagnosis.decay import PrefixOutcome, ProblemOutcome
from headstart.diagnosis.probes import Response
from headstart.errors import RunFolderError
from headstart.files import append, make_folder, write_atomic, write_json
from headstart.records import Prompt, Rollout


class Ledger:
    """`settings.json` says what was asked, `rollouts.jsonl` holds the models' own responses, `references.json` the
    teacher's votes where answers are missing, `decay.jsonl` one line a problem with the outcomes of all prefixes, and
    `gifts.json` the further gifts at the chosen length.

    Raises RunFolderError when `folder` holds a diagnosis with other `settings`, or cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        asked = json.loads(json.dumps(settings))
        path = folder / "settings.json"
        make_folder(folder)
        if not path.exists():
            write_json(path, asked)
        found = json.loads(path.read_text(encoding="utf-8"))
        if other := described(differences(found, asked)):
            raise RunFolderError(
                f"{folder} holds a diagnosis with other settings ({'; '.join(other)}); choose another folder with "
                "--out, or delete that one"
            )
        self._responses = {(line["speaker"], line["index"]): line for line in read_lines(folder / "rollouts.jsonl")}
        self.outcomes = {line["index"]: _outcome(line) for line in read_lines(folder / "decay.jsonl")}

    def is_whole(self, prompts: Sequence[Prompt]) -> bool:
        """Whether every prompt is measured, or left out because the teacher's votes gave no reference answer."""
        votes = self.references()
        unasked = {index for index, answer in votes.answers.items() if answer is None} if votes else set()
        return all(p.index in self.outcomes or p.index in unasked for p in prompts)

    def response(self, who: Speaker, prompt: Prompt) -> Response | None:
        """The response of `who` to `prompt`, if it was written."""
        line = self._responses.get((who, prompt.index))
        if line is None:
            return None
        rollout = Rollout(prompt, 0, tuple(line["ids"]), line["stopped"])
        return Response(rollout, line["correct"], line["answer"], line["seconds"])

    def add_responses(self, who: Speaker, responses: Sequence[Response]) -> None:
        lines = [
            {
                "speaker": who,
                "index": r.rollout.prompt.index,
                "problem_id": r.rollout.prompt.problem_id,
                "correct": r.correct,
                "answer": r.answer,
                "stopped": r.rollout.stopped,
                "seconds": r.seconds,
                "ids": r.rollout.completion_ids,
            }
            for r in responses
        ]
        append_lines(self.folder / "rollouts.jsonl", lines)
        self._responses |= {(who, line["index"]): line for line in lines}

    def add_outcomes(self, outcomes: Sequence[ProblemOutcome]) -> None:
        append_lines(self.folder / "decay.jsonl", [asdict(outcome) for outcome in outcomes])
        self.outcomes |= {outcome.index: outcome for outcome in outcomes}

    def references(self) -> References | None:
        path = self.folder / "references.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return References(**{**found, "answers": {int(k): v for k, v in found["answers"].items()}})

    def add_references(self, references: References) -> None:
        write_json(self.folder / "references.json", asdict(references))

    def gifts(self, tokens: int) -> list[float] | None:
        path = self.folder / "gifts.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found["shares"] if found.get("tokens") == tokens else None

    def add_gifts(self, tokens: int, shares: Sequence[float]) -> None:
        write_json(self.folder / "gifts.json", {"tokens": tokens, "shares": shares})


def _outcome(line: Mapping[str, Any]) -> ProblemOutcome:
    return ProblemOutcome(**{**line, "points": tuple(PrefixOutcome(**point) for point in line["points"])})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; one that a kill tore is cut off, so that the next is not glued to it."""
    if not path.exists():
        return []
    *whole, torn = path.read_text(encoding="utf-8").split("\n")
    if torn:
        write_atomic(path, "".join(line + "\n" for line in whole))
    return [json.loads(line) for line in whole]


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add records to a JSONL file, on disk before this returns."""
    with path.open("ab", buffering=0) as file:
        append(path, file, "".join(json.dumps(record) + "\n" for record in records).encode())
        os.fsync(file.fileno())
