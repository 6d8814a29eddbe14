"""Do training prompts contain the test, whatever is written around it? Counts by kind, with examples."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import product, takewhile
from typing import Literal, NamedTuple

from headstart.records import Problem

RUN = 13
"""Words in a row that two questions must share to be near (the length used by GPT-3's contamination check)."""
WHOLE = 7
"""Words that a question must have to be looked for inside longer texts; a shorter one must be a line of its own."""
SOLUTION = 16
"""Words that a reference solution must have to count: a shorter one is what anybody would write."""
COMMON = 0.01
"""What is found in more than this share of the test problems is an instruction or a phrase of the genre, not a copy."""
EXAMPLES, EXCERPT = 3, 60

Words = tuple[str, ...]
Kind = Literal["same", "inside", "solution", "near"]
COPIES: Mapping[Kind, str] = {
    "same": "as the same question", "inside": "with something around it", "solution": "by the reference solution"
}  # fmt: skip
KINDS: Sequence[Kind] = (*COPIES, "near")
"""The surest first."""

# Signs stay, as all that tells some formulas apart. Hyphens in words, LaTeX's layout, GSM8K's <<1+1=2>> do not.
_WORD = re.compile(r"[^\W_]+|[+*/=<>^]|(?<![^\W\d_]{2})-|-(?![^\W\d_]{2})")
_LAYOUT = re.compile(r"<<[^<>\n]*>>|\\(?:left|right|q?quad|text)(?![a-z])|\\[dt](?=frac)|(?<=\d),(?=\d{3})")
_DASHES = {**dict.fromkeys(range(0x2010, 0x2015), "-"), 0x2212: "-"}


@dataclass(frozen=True, slots=True)
class Match:
    """A test problem and the training prompt that it was found in: ids, and how the two questions begin."""

    kind: Kind
    test: str
    train: str
    asked: str
    found: str

    def __str__(self) -> str:
        text = f"test problem {self.test} (“{self.asked}”) in prompt {self.train}"
        return text if self.found == self.asked else f"{text} (“{self.found}”)"


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many training prompts and test problems were compared, and the latter that were found, in their order."""

    train: int
    test: int
    matches: tuple[Match, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Test problems by kind; each counts once, as the surest."""
        return {kind: sum(match.kind == kind for match in self.matches) for kind in KINDS}

    @property
    def copies(self) -> int:
        """Test problems that are among the training prompts: all kinds but `near`."""
        return len(self.matches) - self.counts["near"]

    @property
    def examples(self) -> list[Match]:
        """Up to three, of as many kinds as there are."""
        first = {match.kind: match for match in reversed(self.matches)}
        ranked = [first[kind] for kind in KINDS if kind in first]
        return [*ranked, *(match for match in self.matches if match not in ranked)][:EXAMPLES]

    def warning(self, task: str) -> str | None:
        """The counts by kind, the remedy and examples, or None without any overlap."""
        if not self.matches:
            return None
        counts = self.counts
        kinds = ", ".join(f"{counts[kind]:,} {words}" for kind, words in COPIES.items() if counts[kind])
        text = f"{task}: {self.copies:,} of {self.test:,} test problems are among the {self.train:,} training prompts"
        text += f"{f' ({kinds})' if kinds else ''}, {counts['near']:,} more share a run of {RUN} words with one"
        inflated = "; its accuracy is inflated: remove these prompts or choose another test"
        text += inflated if kinds else " (variants of a problem, or phrases of the genre)"
        return f"{text}. For example {'; '.join(map(str, self.examples))}"


class _Texts(NamedTuple):
    """A problem in words: the bare question, the same without what those of all problems begin and end with, the prompt
    that it stands in; reference solutions; everything that its row says. `keys` are shared by problems that ask the
    same: words, or all letters and signs where there are few words, as in the short `lines` of its prompt."""

    bare: Words
    core: Words
    prompt: Words
    solutions: Sequence[Words]
    row: Words
    keys: Set[Hashable]
    lines: Set[Hashable]


def overlap(train: Sequence[Problem], test: Sequence[Problem]) -> Overlap:
    """Test problems that occur in `train`: as the same question, with something around it on either side, by their
    reference solution, or in part, by a run of 13 words.

    Compared are prompts and answers and, where a problem's `meta` holds them, its bare `question` and its `references`
    (solution, tests). Letter case, white space, punctuation and ways to write a character do not count. Time is linear
    in the words of both.
    """
    ours, theirs = _read(train), _read(test)
    rows, prompts = [[texts.row] for texts in ours], [texts[:3] for texts in theirs]
    places = {key: mine for mine, texts in reversed([*enumerate(ours)]) for key in texts.keys | texts.lines}
    held = _held([texts[:3] for texts in ours], prompts, WHOLE, COMMON)
    steps: Sequence[Iterable[tuple[int, int]]] = (
        ((place, places[key]) for place, texts in enumerate(theirs) for key in texts.keys if key in places),
        (*_held(prompts, rows, WHOLE), *((place, mine) for mine, place in held)),
        _held([texts.solutions for texts in theirs], rows, SOLUTION),
        _near([texts.bare for texts in theirs], [texts.bare for texts in ours]),
    )
    found: dict[int, tuple[int, int]] = {}
    for rank, pairs in enumerate(steps):
        for place, mine in pairs:
            found[place] = min(found.get(place, (rank, mine)), (rank, mine))
    matches = (
        Match(KINDS[rank], test[place].id, train[mine].id, _excerpt(test[place]), _excerpt(train[mine]))
        for place, (rank, mine) in sorted(found.items())
    )
    return Overlap(len(train), len(test), tuple(matches))


def _asked(problem: Problem) -> str:
    """What a problem asks: its text, or what its user turns say; of which images, by their digests."""
    turns = [message["content"] for message in problem.messages or () if message["role"] == "user"]
    return " ".join([problem.text or "\n".join(turns), *(picture.sha256 for picture in problem.images)])


def _bare(problem: Problem) -> str:
    return str(problem.meta.get("question") or _asked(problem))


def _excerpt(problem: Problem) -> str:
    text = " ".join(_bare(replace(problem, images=())).split())
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT].rstrip()}…"


def _plain(text: str) -> str:
    text = text if text.isascii() else unicodedata.normalize("NFKC", text).translate(_DASHES)
    return _LAYOUT.sub("", text.casefold())


def _words(text: str) -> Words:
    return tuple(_WORD.findall(_plain(text)))


def _read(problems: Sequence[Problem]) -> list[_Texts]:
    bare = [_words(_bare(problem)) for problem in problems]
    start, end = shared(bare), shared([words[::-1] for words in bare])
    read = []
    for problem, words in zip(problems, bare, strict=True):
        core = words[start : len(words) - end]
        prompt = _words(_asked(problem)) if "question" in problem.meta else words
        solutions = [_words(text) for text in (problem.answer or "", *problem.meta.get("references", ()))]
        others = (turn["content"] for turn in problem.messages or () if turn["role"] != "user")
        row = (*prompt, *(word for solution in solutions for word in solution), *_words("\n".join(others)))
        asked = {_bare(problem), _asked(problem)}
        short: set[Hashable] = {_letters(text) for text in asked if len(text.split()) < 2 * WHOLE}
        lines = {_letters(line) for text in asked for line in text.splitlines() if 0 < len(line.split()) < WHOLE}
        keys = short.union(text for text in (words, core, prompt) if len(text) >= WHOLE)
        read.append(_Texts(words, core, prompt, solutions, row, keys, lines))
    return read


def _letters(text: str) -> str:
    return "".join(_plain(text).replace("$", "").split()).rstrip(".:?")


def shared(texts: Sequence[Words] | Sequence[str]) -> int:
    """How many words, or letters, all of several texts begin with: what the first and the last in order do."""
    ends = (min(texts), max(texts)) if len(texts) > 1 else ((), ())
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))])


def _held(
    sought: Sequence[Sequence[Words]], several: Sequence[Sequence[Words]], least: int, common: float = 1.0
) -> Iterator[tuple[int, int]]:
    """(place of what is sought, place of a text that holds it whole), for what has `least` words and is not in more
    than the share `common` of the texts."""
    owners: dict[Words, set[int]] = defaultdict(set)
    for owner, texts in enumerate(sought):
        for words in texts:
            if len(words) >= least:
                owners[words].add(owner)
    # Each is looked for by the rarest of three of its runs: a genre's openings and endings would find everything.
    probes = {
        words: [words[i : i + WHOLE] for i in (0, (len(words) - WHOLE) // 2, len(words) - WHOLE)] for words in owners
    }
    spread = Counter(run for runs in probes.values() for run in runs)
    anchors: dict[Words, list[Words]] = defaultdict(list)
    for words, runs in probes.items():
        anchors[min(runs, key=spread.__getitem__)].append(words)
    hits: dict[Words, set[int]] = defaultdict(set)
    for place, texts in enumerate(several):
        for text in {*texts}:
            near = {run for run in _runs(text, WHOLE) if run in anchors}
            line = f" {' '.join(text)} " if near else ""
            for words in (words for run in near for words in anchors[run] if f" {' '.join(words)} " in line):
                hits[words].add(place)
    for words, places in hits.items():
        if len(places) <= max(1.0, common * len(several)):
            yield from product(owners[words], places)


def _near(test: Sequence[Words], train: Sequence[Words]) -> Iterator[tuple[int, int]]:
    """(test, train) places of questions that share a run of words, signs not counted."""
    wanted: dict[Words, set[int]] = defaultdict(set)
    for place, words in enumerate(test):
        for run in _runs(tuple(filter(str.isalnum, words)), RUN):
            wanted[run].add(place)
    wanted = {run: places for run, places in wanted.items() if len(places) <= max(1.0, COMMON * len(test))}
    for mine, words in enumerate(train):
        for run in _runs(tuple(filter(str.isalnum, words)), RUN):
            yield from ((place, mine) for place in wanted.get(run, ()))


def _runs(words: Words, length: int) -> Iterator[Words]:
    return zip(*(words[start:] for start in range(length)), strict=False)
