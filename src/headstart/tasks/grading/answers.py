r"""The final answer of a response: where it stands. All graders of text and mathematics read it here.

The first rule that applies to what is left without thinking blocks:

1. a box (`\boxed`, `\fbox`, `\framebox`) that was opened last and never closed is a cut response: no answer;
2. the last complete box, with those that commas, "and" or "or" join to it: `\boxed{3} and \boxed{5}` is `3, 5`;
3. what follows the last `####` that marks a value, with a few lower-case words at most: `#### Step 1: eggs` and
   `#### 1. eggs` are headings; with words it gives way to a later sentence;
4. the last sentence with "answer is", "answer:" or the like that states a value (see `_stated`);
5. the whole response, if it is one line without words.
"""

from __future__ import annotations

import re
from collections import deque
from itertools import pairwise
from typing import NamedTuple

from headstart.tasks.grading.notation import canonical, plain, spelled
from headstart.tasks.grading.thinking import answer_part

LONGEST_LINE = 200
"""Characters of a sentence or line that are searched for a value."""

_BOX = r"\\(?:boxed|fbox|framebox)(?![A-Za-z])"
# Two backslashes are a line break, so a brace after them is a real one; yet a box escaped twice is still read as a box.
_BRACES = re.compile(
    rf"(?P<box>{_BOX}\s*(?:\{{|\Z))"
    rf"|{_BOX}\s*(?P<bare>[-+]?(?:\$?[0-9](?:[0-9.,/]*[0-9])?|[A-Za-z](?=[$.,;)\\]|\s*\Z)|\([^()$\n]{{1,99}}\)"
    r"|\\[A-Za-z]+(?:[0-9]|\{(?:[^{}]|\{[^{}]*\})*\})*))"
    rf"|\\(?!{_BOX}).|[{{}}]",
    re.DOTALL,
)
# What may stand between two boxes that are one answer: at least one separator, and labels such as "y =".
_JOINT = re.compile(
    r"(?=.*(?:[,;&]|\b(?:and|or)\b|quad))"
    r"(?:[\s$,;&*}]|\\[,;:! ()\[\]]|\\q?quad|\\text\s*\{|\b(?:and|or)\b|\b[A-Za-z](?:_\{?\w\}?)?\s*=)*",
    re.DOTALL,
)
_MARK = re.compile(r"(?i)(?<!#)####(?!#)[ \t*]*(?:(?:the |final )*(?:answer|result|total)[ \t*]*(?:is|[:=]))?(.*)")
_SENTENCE = re.compile(
    r"(?im)\banswers?\b(?:[^.\n]|\.(?=\d)){0,60}?(?:\b(?:is|are)\b|[:=])|^[#* \t]*(?:the |final )*answer[* \t]*$"
)
_FORMULA = re.compile(
    r"\$\$[^$]+\$\$|\\\[.*?\\\]|\\\(.*?\\\)|\$(?=\S)[^$\n]*(?<=\S)\$(?!\d)"
    r"|\\[A-Za-z]+(?:\{(?:[^{}]|\{[^{}]*\})*\})+",
    re.DOTALL,
)
_STOP = re.compile(r"\n|\.(?=\s+[A-Z]|\s*\Z)|(?<![ .(][A-Za-z])\.(?=\s)|[!?](?=\s|\Z)")
_LABEL = re.compile(r"\b[A-Za-z](?:_\{?\w+\}?)?\s*=(?!=)\s*")
_WORD = re.compile(r"(?<![\\A-Za-z0-9^_{])(?:[A-Za-z]{2,}|[aAI](?= [A-Za-z]))(?:['\u2019.-][A-Za-z]+)*")
_VALUE = re.compile(r"[0-9\ue000-\uf8ff]|\\[A-Za-z]{2}")  # a digit, a formula in its place, or a command
_RESTATED = re.compile(
    r"(?i)\b(?:(?:which|that) (?:is|are|equals?|gives|makes|means)|namely|equals?|gives|giving|makes|making|so|hence"
    r"|thus|therefore|is|are|that's|not\b[^.;]{1,40}?\bbut)\b|\bi\.? ?e\.?,?|=|\\approx|:(?!\d)"
)
_REASON = re.compile(
    r"(?i)\b(?:because|since|as|for|in|per|on|at(?! most| least)|after|when|where|with|given|using|from|rather|instead"
    r"|if|each|every|not)\b| \((?!or\b)(?=[^()]*[A-Za-z]{2})"
)
_UNSURE = re.compile(
    r"(?i)\b(?:not|neither|nor|either|between|at (?:least|most)|up to|over|under|above|below|exceeds?|within|squared"
    r"|(?:more|less|fewer|greater|smaller|larger|higher|lower) than|or (?:more|less|fewer|so|above|below|over|even)"
    r"|twice|thrice|double|triple|times(?= (?!a\b)\S)|half(?= (?:of|the|as)\b)|plus|minus|divided|multiplied|cubed)\b"
    r"|n['\u2019]t\b"
)
_SUM = re.compile(r"[0-9a-z)\ue000-\uf8ff] ?(?:[-+*/]|\\(?:times|cdot|div)) ?\$?[0-9(\ue000-\uf8ff]")
# "18 eggs", but not "1. eggs"
_MARKED = re.compile(r"[^A-Za-z]*(?<![0-9][.):-])(?<![0-9][.):-] )(?<=\s)[a-z][^A-Z:]*\Z")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")  # that is no LaTeX command


class Reading(NamedTuple):
    r"""What a response says; `answer` and `boxes` are `notation.plain`."""

    answer: str | None  # None where nothing marks one, empty where the marked one is cut, hedged or empty
    marked: bool  # the answer stands in a box or behind ####
    boxes: tuple[str, ...]  # the first and the last complete one, joined ones being one
    open_box: bool  # a box was opened and never closed


def read(response: str) -> Reading:
    """Find the answer of `response`, see the module. Linear in its length; never raises."""
    text = answer_part(response)
    boxes, open_box, cut = find_boxes(text)
    ends = tuple(plain(box) for box in boxes[:1] + boxes[-1:])
    if cut or ends:
        return Reading("" if cut else ends[-1], not cut, ends, open_box)
    return Reading(*_unboxed(text), (), open_box=False)


def has_answer_mark(text: str) -> bool:
    r"""Whether the text gives its answer away: the last box is complete, or a `####` marks a value."""
    return read(text).marked


def gold_answer(gold: str) -> str:
    """A reference answer in plain notation: bare, boxed, or behind `####`."""
    boxed = last_boxed(gold)
    return plain(gold.rpartition("####")[2] if boxed is None else boxed)


def last_boxed(text: str) -> str | None:
    r"""What the last complete box holds, with those joined to it, or None."""
    return next(reversed(find_boxes(text)[0]), None)


def find_boxes(text: str) -> tuple[list[str], bool, bool]:
    """What the complete boxes hold in order, those of one answer joined; whether one stays open; whether the last does.

    Braces are balanced; of nested boxes only the inner counts.
    """
    # One pass with a stack: looking for the closing brace of each box on its own is quadratic on "\boxed{" * n.
    stack: list[re.Match[str] | None] = []  # what opened a box; None for an ordinary brace
    spans: list[tuple[int, int, int, int]] = []  # of a box: its command, its content, the text after it
    for token in _BRACES.finditer(text):
        if token.lastgroup == "bare":
            spans.append((token.start(), *token.span("bare"), token.end()))
        elif token.lastgroup == "box":
            stack.append(token)
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack and (opened := stack.pop()):
            spans.append((opened.start(), opened.end(), token.start(), token.end()))
    still_open = [opened.start() for opened in stack if opened]
    spans.sort()
    inner = [span for span, following in pairwise([*spans, (-1, -1, -1, -1)]) if not span[0] <= following[0] < span[3]]
    cut = bool(still_open) and (not inner or still_open[-1] > inner[-1][0])
    return _joined(text, inner), bool(still_open), cut


def _joined(text: str, spans: list[tuple[int, int, int, int]]) -> list[str]:
    """The contents of boxes, one text for those that are one answer."""
    answers: list[list[str]] = []
    before = 0
    for begin, start, end, after in spans:
        between, content = text[before:begin] if begin - before <= 80 else "", text[start:end]
        if not answers or not _JOINT.fullmatch(between):
            answers.append([content])
        elif canonical(plain(content)) == canonical(plain(answers[-1][-1])):
            answers[-1][-1] = content  # the same in another form
        else:
            answers[-1].append(content)
        before = after
    return [", ".join(contents) for contents in answers]


def _unboxed(text: str) -> tuple[str | None, bool]:
    """The answer of a text without boxes, and whether a `####` marks it."""
    sentences = deque(_SENTENCE.finditer(text), maxlen=20)
    stated = next(
        ((lead, value) for lead in reversed(sentences) if (value := _stated(text[lead.end() :])) is not None), None
    )
    for mark in reversed(deque(_MARK.finditer(text), maxlen=20)):
        content = _masked(mark[1])[0]
        word = _WORD.search(content)
        if not _VALUE.search(content[: word.start() if word else None]):
            continue
        if not word:
            return plain(mark[1]), True
        if _MARKED.match(content) and not (stated and stated[0].start() > mark.start()):
            return _stated(mark[1]), True
    if stated is not None:
        return stated[1], False
    line = text.strip()
    readable = len(line) <= LONGEST_LINE and "\n" not in line and not _LONG_WORD.search(line)
    return (plain(line) or None) if readable else None, False


def _stated(text: str) -> str | None:
    """The value that a sentence at the start of `text` states, empty where it states no single one, None without any.

    It is the only value of the sentence, or the one before an explanation ("18, because 9 * 2 = 18"), or the one behind
    a restatement ("3 times 4, which is 12"; "9 * 2 = 18"), or a list ("3, 5 and 7", "x = 3 or x = 5"). "5 or 7" is thus
    never 5, and "more than 18", "not 18", "between 3 and 5" are no values.
    """
    masked, formulas = _masked(text)
    sentence = spelled(_STOP.split(masked.strip(" \t\n:=*_#"), maxsplit=1)[0])
    if not _VALUE.search(sentence):
        letter = re.fullmatch(r"\(?[A-Z]\)?", sentence.strip(" *"))  # of a multiple choice
        return letter and letter[0]
    return plain(re.sub("[\ue000-\uf8ff]", lambda place: formulas[ord(place[0]) - 0xE000], _value(sentence)))


def _masked(text: str) -> tuple[str, list[str]]:
    """The start of `text` with one character of Unicode's private area for every formula, and the formulas."""
    formulas: list[str] = []

    def place(formula: re.Match[str]) -> str:
        formulas.append(formula[0])
        return chr(0xE000 + len(formulas) - 1)

    return _FORMULA.sub(place, re.sub("[\ue000-\uf8ff]", "", text[:LONGEST_LINE])), formulas


def _value(sentence: str) -> str:
    if not _WORD.search(sentence):
        return sentence
    sentence = _LABEL.sub("", sentence)
    pieces = [piece for piece in _RESTATED.split(sentence) if _VALUE.search(piece)]
    if not pieces:
        return ""
    first = _single(pieces[0])
    if first and (len(pieces) == 1 or not _SUM.search(pieces[0])):
        return first
    values = _values(pieces[-1])
    listed = len(values) > 1 and {word.lower() for word in _WORD.findall(pieces[-1])} <= {"and", "or", "both", "either"}
    return ", ".join(values) if listed else _single(pieces[-1]) or first


def _single(piece: str) -> str:
    """The only value of a part of a sentence; empty where there are several, or it is only a bound of the answer."""
    cuts = (piece[: reason.start()] for reason in _REASON.finditer(piece))
    piece = next((before for before in cuts if _VALUE.search(before)), piece)
    values = _values(piece)
    return values[0] if len(values) == 1 and not _UNSURE.search(piece) else ""


def _values(piece: str) -> list[str]:
    parts = [part.strip(" ,;*_") for part in _WORD.split(piece)]
    parts = [part if part.count("(") == part.count(")") else part.strip("() ,;") for part in parts]
    return [part for part in parts if _VALUE.search(part)]
