"""What is being done now, shown while it lasts: drawn on a terminal and in a notebook, said in lines elsewhere.

What is being done is a stack: a verb, the part it is at, what that part is at. Those who work only write down where
they are; a thread reads it, so that being watched costs the work nothing.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import wraps
from importlib.util import find_spec
from itertools import zip_longest
from threading import Event, Thread
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from headstart.interfaces import OnProgress, silent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
BEAT = 10.0
"""Seconds after which a line comes whatever happens."""
LOOK = 1.0
"""Seconds between looks at what is being done: lines come no faster."""


@dataclass(slots=True, eq=False)
class Doing:
    """One thing that is being done. Calling it, as an OnProgress, says how far it is; `read` says so for what has no
    time to."""

    name: str
    read: Callable[[], tuple[int, int]] | None = None
    even: bool = True
    """Whether what is counted takes about equally long, so that the time left can be told."""
    told: bool = False
    """Whether `report` goes here."""
    text: str = ""
    done: int = 0
    total: int = 0
    began: tuple[float, int] = field(default_factory=lambda: (time.monotonic(), 0))
    """When the counting began, and at what."""
    counted: float = 0.0
    """When it came to `done`."""

    def __call__(self, done: int, total: int, text: str = "", /) -> None:
        now = time.monotonic()
        if total != self.total:
            self.began = now, done
        self.counted = now if done != self.done else self.counted
        self.done, self.total, self.text = done, total, text

    def __str__(self) -> str:
        return f"{self.name}: {self.text}" if self.text else self.name

    def numbers(self, inner: Doing | None = None) -> list[str]:
        """How far it is, and the time that is left if that takes as long as what was done, once anything was. What is
        done inside and `read` knows better: of responses that are sampled together the first to end say nothing."""
        now, (since, first) = time.monotonic(), self.began
        if self.read is not None:
            self.counted, (self.done, self.total) = now, self.read()
            if not self.done:  # what comes before the first, such as encoding the prompts, says nothing of the others
                self.began = now, 0
        texts = [f"{self.done:,} of {self.total:,}"] if self.total else []
        if self.even and first < self.done < self.total and (inner is None or inner.read is None):
            made, rest, before = self.done - first, self.total - self.done, self.counted - since
            this = 0.0 if inner is not None and inner.told else now - self.counted  # an evaluation between is no step
            each = max(before / made, (before + this) / (made + 1))  # this one may take longer than those
            left = max(each * (rest - 1), each * rest - this)
            texts += [f"about {_clock(left)} left"] if left >= 1 else []
        return texts


_stack: list[Doing] = []
_screen: _Screen | None = None


@contextmanager
def doing(name: str, read: Callable[[], tuple[int, int]] | None = None) -> Iterator[Doing]:
    """Within what is being done, this. Also a decorator."""
    own = Doing(name, read)
    _stack.append(own)
    try:
        yield own
    finally:
        _stack.remove(own)


@contextmanager
def shown(name: str, console: Console | None = None, *, even: bool = True) -> Iterator[OnProgress]:
    """A bar with spinner, count, elapsed and remaining time on a terminal or in a notebook; elsewhere lines on stderr:
    at the start, when what is being done changes (at most one a second), and every 10 s whatever happens (a thread).
    Within another one it is a part of that. Silent on ranks but 0."""
    global _screen
    if not first_rank():
        yield silent
        return
    with doing(name) as own:
        own.told, own.even = True, even
        if _screen is not None:
            yield own
            return
        _screen = _Screen(console)
        try:
            with _screen.on():
                yield own
        finally:
            _screen = None


def through(items: Sequence[T], name: str) -> Iterator[T]:
    """`items` one after another, counted while they are worked through."""
    with doing(name) as own:
        for place, item in enumerate(items):
            own(place, len(items))
            yield item


def shows(name: str, *, even: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of verbs: shown, unless the caller gives a `progress` of its own. The verb tells `report`."""

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        @wraps(verb)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            with nullcontext() if kwargs.get("progress") else shown(name, even=even):
                return verb(*args, **kwargs)

        return watched

    return decorate


def first_rank() -> bool:
    """Whether this is the only process or the first of several: what all of them would say is said once."""
    return os.environ.get("RANK", "0") == "0"


def report(done: int, total: int, text: str = "", /) -> None:
    """The OnProgress of whatever is shown innermost; silent where nothing is."""
    next((own for own in reversed(_stack) if own.told), silent)(done, total, text)


def printing(console: Console | None = None, *, stderr: bool = False) -> Console:
    """Where a line for the reader goes: above what is drawn, else `console`, else stdout. It is a sign of life."""
    from rich.console import Console

    if _screen is not None:
        _screen.heard = time.monotonic()
        if console is None and _screen.drawn and sys.stdout is _screen.stdout:  # nobody has redirected it
            return _screen.console
    return console or Console(stderr=stderr)


def _looked() -> list[tuple[Doing, list[str]]]:
    stack = [*_stack]
    return [(own, own.numbers(inner)) for own, inner in zip_longest(stack, stack[1:])]


class _Screen:
    """Where the stack is seen: drawn anew several times a second, or a line at a time."""

    def __init__(self, console: Console | None) -> None:
        from rich.console import Console
        from rich.spinner import Spinner

        c = self.console = console or Console(file=sys.stderr)  # this one, wherever a part redirects its own
        # Where only stderr is a terminal, what goes into a pipe (`| tee`) may come back to it.
        terminal = c.is_interactive and (console is not None or sys.stdout.isatty())
        self.drawn = terminal or (c.is_jupyter and find_spec("ipywidgets") is not None)
        self.spinner = Spinner("dots" if c.encoding.startswith("utf") else "line")
        self.stdout = sys.stdout
        self.said: list[str] = []
        self.started = self.heard = time.monotonic()

    @contextmanager
    def on(self) -> Iterator[None]:
        if self.drawn:
            from rich.live import Live

            # Downloads draw on stderr themselves.
            with Live(console=self.console, get_renderable=self._picture, transient=True, redirect_stderr=False):
                self.stdout = sys.stdout
                yield
            return
        self._line()
        ended = Event()
        thread = Thread(target=self._watch, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            if thread.is_alive():  # not in a fork
                ended.set()
                thread.join()

    def _watch(self, ended: Event) -> None:
        last = False
        while not last:
            last, headline = ended.wait(LOOK), self._headline()
            if headline != self.said[: len(headline)] or time.monotonic() - self.heard >= BEAT:
                self._line()

    def _headline(self) -> list[str]:
        """What a line is worth: the stack down to the first that counts, whatever the readings in it."""
        stack = [*_stack]
        counting = next((place for place, own in enumerate(stack) if own.total), len(stack))
        names = [own.name if place else str(own) for place, own in enumerate(stack[: counting + 1])]
        return [re.sub(r"[\d,]+(\.\d+|%| of [\d,]+)", "", name) for name in names]

    def _line(self) -> None:
        self.said, self.heard = self._headline(), time.monotonic()
        parts = [f"{own} ({', '.join(numbers)})" if numbers else str(own) for own, numbers in _looked()]
        with suppress(OSError, ValueError):  # nobody reads it any more
            self.console.file.write(f"[{_clock(self.heard - self.started)}] {', '.join(parts)}\n")
            self.console.file.flush()

    def _picture(self) -> RenderableType:
        """A row down to each that counts, the rest in the last."""
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table
        from rich.text import Text

        now, names, since = time.monotonic(), list[str](), self.started
        mark = self.spinner.render(self.console.get_time())
        kept = (Column(no_wrap=True) for _ in range(3))  # names give way
        grid = Table.grid(Column(), Column(), Column(width=20), *kept, padding=(0, 1))
        for own, numbers in (looked := _looked()):
            since = since if names or own is looked[0][0] else own.began[0]
            names.append(str(own))
            if own.total or own is looked[-1][0]:
                bar = ProgressBar(total=own.total, completed=own.done, width=20) if own.total else ""
                name = Text(": ".join(names), no_wrap=True, overflow="ellipsis")
                grid.add_row(mark, name, bar, _clock(now - since), *numbers)
                names, mark = [], ""
        return grid


def _clock(seconds: float) -> str:
    """`0:20`, `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes}:{second:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
