"""What a diagnosis has measured so far, on disk, so that a killed one resumes and gives the same numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.assemble.pair import Speaker
from headstart.config.differences import keep_settings
from headstart.diagnosis.curve import PrefixOutcome, ProblemOutcome
from headstart.diagnosis.probes import References, Response
from headstart.files import append_lines, make_folder, read_lines, write_json
from headstart.records import Prompt, Rollout


class Store:
    """`settings.json` holds what was asked, `rollouts.jsonl` the models' own responses, `references.json` the teacher's
    votes where answers are missing, `decay.jsonl` the outcomes of all prefixes, one line a problem, and `gifts.json`
    the further continuations at the chosen length.

    Raises RunFolderError when `folder` holds a diagnosis with other `settings`, or cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        make_folder(folder)
        remedy = "choose another folder with --out, or delete that one"
        keep_settings(folder / "settings.json", f"{folder} holds a diagnosis", settings, remedy)
        self._responses = {(line["speaker"], line["index"]): line for line in read_lines(folder / "rollouts.jsonl")}
        self.outcomes = {line["index"]: _outcome(line) for line in read_lines(folder / "decay.jsonl")}

    def is_whole(self, prompts: Sequence[Prompt]) -> bool:
        """Whether every prompt is measured, or left out because the teacher's votes gave no reference answer."""
        answers = self.references.answers
        return all(p.index in self.outcomes or answers.get(p.index, "") is None for p in prompts)

    def response(self, who: Speaker, prompt: Prompt) -> Response | None:
        """The response of `who` to `prompt`, if it is stored."""
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

    @property
    def references(self) -> References:
        """The votes so far, none at first."""
        stored = self._read("references.json") or {"answers": {}}
        return References(**{**stored, "answers": {int(k): v for k, v in stored["answers"].items()}})

    def set_references(self, references: References) -> None:
        write_json(self.folder / "references.json", asdict(references))

    def gifts(self, tokens: int) -> list[float] | None:
        stored = self._read("gifts.json")
        return stored["shares"] if stored.get("tokens") == tokens else None

    def set_gifts(self, tokens: int, shares: Sequence[float]) -> None:
        write_json(self.folder / "gifts.json", {"tokens": tokens, "shares": shares})

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _outcome(line: Mapping[str, Any]) -> ProblemOutcome:
    return ProblemOutcome(**{**line, "points": tuple(PrefixOutcome(**point) for point in line["points"])})
