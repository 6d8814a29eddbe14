"""Find the program in a model's response.

Python's parser says what is a statement, and names say which statements belong to the program: all of them up to the
function that is tested, and after it only what that function needs. Nothing of the response is run. Time is linear in
the length: text beyond LIMIT is not read, and each statement is parsed at most CUTS times.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import textwrap
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

from headstart.tasks.grading.thinking import answer_part

LIMIT = 2**17
"""Characters of an answer that are read: the last, or the first of a base model."""
CUTS = 16
ROUNDS = 32
"""Longest chain of functions after the tested one, each needed by the one before."""
_LATE_FENCE = re.compile(r"^([^`\n]*[^`\s])[ \t]*(```+\w*[ \t]*)$", re.MULTILINE)
_FENCE = re.compile(r"^([ \t]*)(```+|~~~+)([^\n]*)$", re.MULTILINE)
_TOKEN = re.compile(
    r"""("{3}|'{3})(?:[^\\]|\\.?)*?(?:\1|\Z)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|#[^\n]*|[][(){}]|\\\n|\n(?=[^\s#])""",
    re.DOTALL,
)
_DEFINITION = re.compile(r"(?:(?:async +)?def|class|import|from +\S+ +import)\b|@")
_BROKEN = re.compile(r"(?:async +)?def +\w+ *\(|class +\w+ *[(:]")
_DECORATED = re.compile(r"(?:(?:async +)?def|class)\b|@")
_CLAUSE = re.compile(r"(?:else|elif|except|finally)\b")
_SETTING = re.compile(
    r"\b(?:setrecursionlimit|set_int_max_str_digits|[gs]etcontext|seed|exec|globals|setattr) *\(|import +\*"
)
"""What changes how functions run although no name shows it."""
_CODE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
_BUILTINS = frozenset(vars(builtins))
_parsing = threading.Lock()  # warning filters belong to the process, and several threads grade


Kind = Literal["code", "stub", "value", "use", "inert", "other"]


class Statement(NamedTuple):
    """A top-level statement. `binds` are the names that it gives a value, `reads` those that it uses when it runs,
    `inner` the globals that a function or class in it uses later. `cut`: lines at its end did not parse."""

    text: str
    kind: Kind
    binds: set[str]
    reads: set[str]
    inner: set[str]
    cut: bool


class Block(NamedTuple):
    """A piece of a response: a code block, or the text between two."""

    text: str
    fenced: bool
    statements: list[Statement]


def extract_code(
    response: str, entry_point: str, prompt: str = "", *, also: Sequence[str] = (), chat: bool = True
) -> str | None:
    """The program in a response that defines `entry_point` (and the names in `also`), or None without code in it.

    Thinking blocks are no part of it. Of several code blocks the last complete one that defines `entry_point` counts,
    with imports and helpers from the others; text outside of blocks counts where no block defines it. A base model
    (`chat=False`) continues with other tasks, so there the first definition counts. With a `prompt` (code that ends
    inside the function to be completed) the result is prompt and response together, and the response may continue the
    prompt's function or be a whole one. A program with errors in the definition itself is returned as it is.
    """
    text = answer_part(response)[-LIMIT if chat else 0 :][:LIMIT].replace("\r\n", "\n").replace("\r", "\n")
    text = _LATE_FENCE.sub(r"\1\n\2", text)  # behind the last line of code, or the sentence in front of it
    names = (entry_point, *also)
    with _parsing, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes such as "\d" in plain strings
        blocks = [Block(part, fenced, _statements(part, fenced, closed)) for part, fenced, closed in _parts(text)]
        ranked = sorted(blocks, key=lambda block: block.fenced)[::-1] if chat else blocks
        lead = blocks[0].text
        if prompt and _parse(_split(lead.strip("\n"))[0]) is None and (code := _continue(prompt, lead, names)):
            return code
        for kinds, cut in ((("code",), False), (("code",), True), (("value", "other"), True)):
            for block in ranked:
                if any(p.kind in kinds and p.cut <= cut and entry_point in p.binds for p in block.statements):
                    others = [part for other in blocks if other is not block for part in other.statements]
                    return _join(prompt, _program(block.statements, others, names, first=not chat))
        for block in ranked[:ROUNDS] if prompt else ():
            if code := _continue(prompt, block.text, names):
                return code
    # Code that does not define the entry point is run for its error message.
    broken = re.compile(rf"^(?:async +)?(?:def|class) +{re.escape(entry_point)}\b.*", re.MULTILINE | re.DOTALL)
    for block in ranked:
        if error := broken.search(block.text):
            return _join(prompt, [block.text if block.fenced else error[0]])
    fenced = [block.text for block in ranked if block.fenced and block.text.strip()]
    loose = "\n".join(part.text for block in blocks for part in block.statements)
    return None if prompt else (*fenced, loose)[0] or None


def _join(prompt: str, parts: Sequence[str]) -> str:
    """Prompt and program as one; imports from `__future__` must come first."""
    lines = "\n".join([prompt, *parts] if prompt else parts).split("\n")
    return "\n".join(sorted(lines, key=lambda line: not line.startswith("from __future__ import ")))


def _continue(prompt: str, text: str, names: Sequence[str]) -> str | None:
    """Prompt and text as one program, where the text continues the function at the prompt's end.

    The white space that the text starts with is often lost, with the prompt's last line or in decoding: then its first
    line, or all of them, must be indented again.
    """
    body = text[text.rfind("\n", 0, len(text) - len(text.lstrip())) + 1 :]
    margin = body[: len(body) - len(body.lstrip())]
    last = prompt.rstrip().rpartition("\n")[2]
    indent = last[: len(last) - len(last.lstrip())] + "    " * last.endswith(":")
    shifted = "\n".join(indent + line[len(margin) :] if line.startswith(margin) else line for line in body.split("\n"))
    attempts = [shifted, indent + body.lstrip()]
    if not margin and not re.search(r"\n(?:return|yield)\b", body):
        attempts.reverse()
    lines, program = _split(prompt)[-1].rstrip().count("\n"), None
    for attempt in attempts:
        statements = _statements(f"{prompt.rstrip()}\n{attempt}", fenced=False, closed=False)
        target = next((part for part in statements if part.kind == "code" and names[0] in part.binds), None)
        if target is not None and target.text.count("\n") > lines and (not target.cut or program is None):
            program = "\n".join(_program(statements, [], names, first=True))
            if not target.cut:
                break
    return program


def _program(
    statements: Sequence[Statement], others: Sequence[Statement], names: Sequence[str], *, first: bool
) -> list[str]:
    """All statements up to the first definition of one of `names`, and what is needed of the rest and of `others`."""
    statements = _once(statements, names, first)
    start = next(i for i, part in enumerate(statements) if part.kind != "stub" and part.binds.intersection(names))
    own = _needed(statements, names, start)
    missing = {name for part in own for name in part.reads | part.inner} - _BUILTINS
    missing.difference_update(*[part.binds for part in own])
    return [part.text for part in (*_needed(_once(others, names, first), missing), *own)]


def _once(statements: Sequence[Statement], names: Collection[str], first: bool) -> list[Statement]:
    """Without empty functions that repeat one of `names` and, where the `first` counts, without further definitions."""
    kept: list[Statement] = []
    defined: set[str] = set()
    for part in statements:
        again = (part.binds & defined) - part.reads
        if not (again and part.kind == "code" and first) and not (part.kind == "stub" and again.intersection(names)):
            kept.append(part)
            defined |= part.binds if part.kind != "stub" else set()
    return kept


def _needed(statements: Sequence[Statement], names: Collection[str], start: int = -1) -> list[Statement]:
    """The statements before `start`, and of the others those on which `names` depend.

    That is what binds a name that is needed, and what uses needed data when it runs, itself or in a function that it
    calls: it may change them.
    """
    made = set().union(*[p.binds for p in statements if p.kind in ("code", "stub")])
    kept = {
        i
        for i, p in enumerate(statements)
        if i < start or (start >= 0 and p.kind == "other" and _SETTING.search(p.text))
    }
    data: set[str] = set()
    for _ in range(ROUNDS):
        before = len(kept) + len(data)
        wanted = set(names).union(*[statements[i].reads | statements[i].inner for i in kept])
        # `list = [1, 2]` in an example is not what a function means that calls `list`.
        values = (wanted - _BUILTINS).union(names)
        data |= values - made
        data |= {name for p in statements if p.kind == "code" and p.inner & data for name in p.binds}
        data.difference_update(names)
        for i, p in enumerate(statements):
            if p.binds & (wanted if p.kind in ("code", "stub") else values) or (
                p.kind in ("other", "code") and p.reads & data
            ):
                kept.add(i)
        if len(kept) + len(data) == before:
            break
    return [statements[i] for i in sorted(kept)]


def _parts(text: str) -> Iterator[tuple[str, bool, bool]]:
    """The text in order as (content, whether it is a code block, whether that is closed).

    A fence without a language opens a block or closes one, a fence with one always opens; none in a docstring counts.
    """
    opened: re.Match[str] | None = None
    start = place = quotes = 0
    marks = [mark for mark in _FENCE.finditer(text) if "`" not in mark[3]]  # that would be code within a line
    for mark, following in zip(marks, [*marks[1:], None], strict=False):
        language = mark[3].strip()
        if opened is not None:
            quotes += sum(text.count(quote, place, mark.start()) for quote in ('"""', "'''"))
            place = mark.start()
            # A long string that is never closed holds the fence at the block's end, and then that of the next block.
            next_block = not language and following is not None and following[3].strip() and mark[1] == opened[1]
            if (quotes % 2 and not next_block) or mark[2][0] != opened[2][0]:
                continue
            if not language and len(mark[2]) < len(opened[2]):
                continue
        yield _content(text[start : mark.start()], opened), opened is not None, not language
        opened = mark if language or opened is None else None
        start = place = mark.end() + 1
        quotes = 0
    yield _content(text[start:], opened), opened is not None, False


def _content(text: str, fence: re.Match[str] | None) -> str:
    """A block in a list item is indented with its fence, or behind it."""
    if fence is None:
        return text
    text = "\n".join(line.removeprefix(fence[1]) for line in text.split("\n"))
    return textwrap.dedent(text) if _DEFINITION.match(text.lstrip()) else text


def _statements(text: str, fenced: bool, closed: bool) -> list[Statement]:
    """The statements of a code block up to the first error; between blocks prose is passed over."""
    statements: list[Statement] = []
    chunks = _split(text)
    for number, chunk in enumerate(chunks, start=1):
        parsed = _parse(chunk, shorten=not fenced or (number == len(chunks) and not closed))
        if parsed is None and (fenced or _BROKEN.match(chunk)):
            break
        statements += parsed or []
    return statements


def _split(text: str) -> list[str]:
    """Cut before each line that starts a top-level statement. Brackets and strings are followed, nothing is parsed."""
    starts, depth = [0], 0
    decorated = text.startswith("@")
    for token in _TOKEN.finditer(text):
        if token[0] in ("(", "[", "{"):
            depth += 1
        elif token[0] in (")", "]", "}"):
            depth = max(0, depth - 1)
        elif token[0] == "\n" and (depth == 0 or _DEFINITION.match(text, token.end())):
            depth, start = 0, token.end()
            if not (_CLAUSE.match(text, start) or (decorated and _DECORATED.match(text, start))):
                starts.append(start)
            decorated = text[start] == "@"
    return [text[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _parse(text: str, *, shorten: bool = False) -> list[Statement] | None:
    """The statements in a chunk that do anything, or None where it does not parse.

    `shorten` leaves out lines at the end until the rest parses.
    """
    for attempt in range(max(2, min(CUTS, LIMIT // (len(text) + 1))) if shorten else 1):
        text = text.rstrip()
        try:
            body = ast.parse(text).body
            useful = [node for node in body if _kind(node) != "inert"]
            if useful:
                compile(text, "response", "exec", dont_inherit=True)
            texts = [text] if len(body) == 1 else map(ast.unparse, useful)
            return [_statement(part, node, attempt > 0) for part, node in zip(texts, useful, strict=False)]
        except SyntaxError as error:
            lines = text.split("\n")
            text = "\n".join(lines[: min(error.lineno or 1, len(lines)) - 1])
        except (ValueError, MemoryError, RecursionError):
            return None
        if not text.strip():
            return None
    return None


def _statement(text: str, node: ast.stmt, cut: bool) -> Statement:
    table = symtable.symtable(text, "response", "exec")
    binds = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    reads = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
    inner: set[str] = set()
    tables = list(table.get_children())
    for below in tables:  # grows
        inner |= {symbol.get_name() for symbol in below.get_symbols() if symbol.is_global()}
        tables += below.get_children()
    if not isinstance(node, _CODE):
        reads |= inner  # comprehensions
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute | ast.Subscript) and not isinstance(part.ctx, ast.Load):
                binds |= {name.id for name in ast.walk(part) if isinstance(name, ast.Name)}
    return Statement(text, _kind(node), binds, reads, inner, cut)


def _kind(node: ast.stmt) -> Kind:
    """What a statement is for: `code` names a function or class, a `stub` is a function that does nothing (such as a
    repeated prompt), `value` names data, `use` prepares nothing, `inert` does nothing at all (a word of prose)."""
    match node:
        case ast.FunctionDef(body=body) | ast.AsyncFunctionDef(body=body):
            return "stub" if all(_kind(part) == "inert" for part in body) else "code"
        case ast.ClassDef() | ast.Import() | ast.ImportFrom():
            return "code"
        case ast.If(body=body) | ast.Try(body=body) if any(isinstance(part, _CODE) for part in body):
            return "code"
        case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
            return "code" if isinstance(value, ast.Lambda | ast.Name | ast.Attribute) else "value"
        case ast.Assert() | ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
            return "use"
        case ast.Pass() | ast.AnnAssign():
            return "inert"
        case ast.Expr(value=value):
            calls = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom)
            return "other" if any(isinstance(part, calls) for part in ast.walk(value)) else "inert"
    return "other"
