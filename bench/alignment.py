"""How much of a text a teacher with another tokenizer can score: real tokenizers in pairs, each way.

    OMP_NUM_THREADS=1 python -m bench.alignment --out docs/results/cross-tokenizer-coverage.json [NAME=FOLDER ...]

Texts: GSM8K answers, MBPP programs, function calls (200 each), as the student's tokenizer writes them. Prints the share
of the student's tokens that are scored by `coarse`, that are one to one (`strict`) and that `byte` adds up to; whether
all bytes came back; and milliseconds to align 1,600 tokens. Tokenizers and texts are those of `../shared/data`; further
folders with tokenizers are named on the command line.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import lzma
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from headstart.config.schema import Alignment
from headstart.models.alignment import Aligner, Side
from headstart.models.token_bytes import TokenBytes
from headstart.records import Prompt, Rollout

DATA = Path(__file__).parents[2] / "shared" / "data"
NAMES = ("qwen2_5", "gpt2", "phi3_mini")
TEXTS = 200


def tokenizer(name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        source = DATA / "tokenizers" / name
        (Path(folder) / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
        (Path(folder) / "tokenizer.json").write_bytes(lzma.decompress((source / "tokenizer.json.xz").read_bytes()))
        return AutoTokenizer.from_pretrained(folder)


def texts() -> Iterator[tuple[str, list[str]]]:
    for name, column in (("gsm8k/test.jsonl", "answer"), ("mbpp/mbpp.jsonl", "code")):
        rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()[:TEXTS]]
        yield name.split("/", maxsplit=1)[0], [row[column] for row in rows]
    talks = json.loads(gzip.decompress((DATA / "tools/glaive_toolcall_en_demo.json.gz").read_bytes()))
    turns = [turn["value"] for talk in talks for turn in talk["conversations"] if turn["from"] == "function_call"]
    yield "function calls", turns[:TEXTS]


def row(student: Side, teacher: Side, some: list[str]) -> dict[str, Any]:
    aligner = Aligner(student, teacher, "coarse")
    encoded = [student.tokens.encode(text) or () for text in some]
    rollouts = [Rollout(Prompt(0, "", (0,), (0,)), 0, (*ids, student.stop_ids[0]), True) for ids in encoded]
    tokens = sum(len(r.completion_ids) for r in rollouts)
    assert aligner.events
    start = time.process_time()
    aligned = [aligner.align(r).aligned for r in rollouts]
    seconds = time.process_time() - start
    kinds: tuple[Alignment, ...] = ("strict", "byte")
    others = {kind: replace(aligner, kind=kind) for kind in kinds}
    counts = {kind: sum(len(other.align(r).rows) for r in rollouts) for kind, other in others.items()}
    back = all(
        a is not None and teacher.tokens.join(a.ids) == student.tokens.join(r.completion_ids) == text.encode()
        for a, r, text in zip(aligned, rollouts, some, strict=True)
    )
    return {
        "tokens": tokens,
        "coarse": sum(len(a.rows) for a in aligned if a is not None) / tokens,
        **{kind: count / tokens for kind, count in counts.items()},
        "bytes_come_back": back,
        "ms_per_1600_tokens": 1600e3 * seconds / tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("more", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    made = {name: tokenizer(name) for name in NAMES}
    made |= {
        name: AutoTokenizer.from_pretrained(folder) for name, _, folder in (m.partition("=") for m in arguments.more)
    }
    sides = {
        name: Side(TokenBytes.of(t), (t.eos_token_id,), max(t.get_vocab().values()) + 1) for name, t in made.items()
    }
    found = []
    for kind, some in texts():
        for student, teacher in itertools.permutations(sides, 2):
            figures = row(sides[student], sides[teacher], some)
            found.append({"text": kind, "student": student, "teacher": teacher, **figures})
            shares = " | ".join(f"{figures[k]:.1%}" for k in ("coarse", "strict", "byte"))
            print(f"| {kind} | {student} | {teacher} | {shares} | {figures['ms_per_1600_tokens']:.1f} |", flush=True)
            assert figures["bytes_come_back"]
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
