"""What is being done now, shown while it lasts: drawn on a terminal and in a notebook, said in lines elsewhere.

What is being done is a stack: a verb, the part it is at, what that part is at. Those who work only write down where
they are; a thread reads it, so that being watched costs the work nothing.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import wraps
from importlib.util import find_spec
from threading import Event, Thread
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from headstart.interfaces import OnProgress, silent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

P = ParamSpec("P")
R = TypeVar("R")
BEAT = 10.0
"""Seconds after which a line comes whatever happens."""
LOOK = 1.0
"""Seconds between looks at what is being done: lines come no faster."""


@dataclass(slots=True, eq=False)
class Doing:
    """One thing that is being done. Calling it, as an OnProgress, says how far it is."""

    name: str
    read: Callable[[], tuple[int, int]] | None = None
    """How far it is, (done, in all), for what has no time to say so itself."""
    unit: str = ""
    told: bool = False
    """Whether `report` goes here."""
    text: str = ""
    done: int = 0
    total: int = 0
    since: float = field(default_factory=time.monotonic)
    start: tuple[float, int] = (0.0, 0)
    """When the counting began, and at what."""
    readings: tuple[str, ...] = ()
    """Lines below a live display."""
    seconds: Callable[[], float] | None = None
    """The time that is left, where that is known better than from the counts."""

    def __call__(self, done: int, total: int, text: str = "", /) -> None:
        if total != self.total:
            self.start = time.monotonic(), done
        self.done, self.total, self.text = done, total, text

    def __str__(self) -> str:
        return f"{self.name}: {self.text}" if self.text else self.name

    def at(self) -> tuple[int, int]:
        return (self.done, self.total) if self.read is None else self.read()

    def count(self) -> str:
        done, total = self.at()
        return f"{done:,} of {total:,}{self.unit}" if total else ""

    def left(self) -> float | None:
        """Seconds, when what is left takes as long as what was done; None before anything was."""
        if self.seconds is not None:
            return self.seconds()
        (done, total), (since, first) = self.at(), self.start if self.read is None else (self.since, 0)
        return (time.monotonic() - since) * (total - done) / (done - first) if done > first else None


_stack: list[Doing] = []
_screen: _Screen | None = None


@contextmanager
def doing(name: str, read: Callable[[], tuple[int, int]] | None = None, unit: str = "") -> Iterator[Doing]:
    """Within what is being done, this. Also a decorator."""
    own = Doing(name, read, unit)
    _stack.append(own)
    try:
        yield own
    finally:
        if own in _stack:
            del _stack[_stack.index(own) :]


@contextmanager
def shown(name: str, console: Console | None = None) -> Iterator[OnProgress]:
    """A bar with spinner, count, elapsed and remaining time on a terminal or in a notebook; elsewhere lines on stderr:
    at the start, when what is being done changes (at most one a second), and every 10 s whatever happens (a thread).
    Within another one it is a part of that. Silent on ranks but 0."""
    global _screen
    if os.environ.get("RANK", "0") != "0":
        yield silent
        return
    with doing(name) as own:
        own.told = True
        if _screen is not None:
            yield own
            return
        _screen = _Screen(console)
        try:
            with _screen.on():
                yield own
        finally:
            _screen = None


def shows(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of verbs: shown, unless the caller gives a `progress` of its own. The verb tells `report`."""

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        @wraps(verb)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            with nullcontext() if kwargs.get("progress") else shown(name):
                return verb(*args, **kwargs)

        return watched

    return decorate


def report(done: int, total: int, text: str = "", /) -> None:
    """The OnProgress of whatever is shown innermost; silent where nothing is."""
    if (own := _told()) is not None:
        own(done, total, text)


def note(readings: tuple[str, ...], seconds: Callable[[], float]) -> bool:
    """Give what is shown readings and a better estimate of the time that is left; whether they are seen."""
    if (own := _told()) is not None:
        own.readings, own.seconds = readings, seconds
    return own is not None and _screen is not None and _screen.above()


def printing(console: Console | None = None, *, stderr: bool = False) -> Console:
    """Where a line for the reader goes: above what is drawn, else `console`, else stdout. It is a sign of life."""
    from rich.console import Console

    if _screen is not None:
        _screen.heard = time.monotonic()
        if console is None and _screen.above():
            return _screen.console
    return console or Console(stderr=stderr)


def _told() -> Doing | None:
    return next((own for own in reversed(_stack) if own.told), None)


class _Screen:
    """Where the stack is seen: drawn anew several times a second, or a line at a time."""

    def __init__(self, console: Console | None) -> None:
        from rich.console import Console

        c = self.console = console or Console(file=sys.stderr)  # this one, wherever a part redirects its own
        # Where only stderr is a terminal, what goes into a pipe (`| tee`) may come back to it.
        terminal = c.is_interactive and (console is not None or sys.stdout.isatty())
        self.drawn = terminal or (c.is_jupyter and find_spec("ipywidgets") is not None)
        self.stdout = sys.stdout
        self.said: list[str] = []
        self.started = self.heard = time.monotonic()

    def above(self) -> bool:
        """Whether lines can be printed above what is drawn: stdout is where it was."""
        return self.drawn and sys.stdout is self.stdout

    @contextmanager
    def on(self) -> Iterator[None]:
        if self.drawn:
            from rich.live import Live
            from rich.spinner import Spinner

            self.spinner = Spinner("dots" if self.console.encoding.startswith("utf") else "line")
            # Downloads draw on stderr themselves.
            with Live(console=self.console, get_renderable=self._picture, transient=True, redirect_stderr=False):
                self.stdout = sys.stdout
                yield
            return
        process, ended = os.getpid(), Event()
        self._line()
        thread = Thread(target=self._watch, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            if os.getpid() == process:  # a fork has no such thread
                ended.set()
                thread.join()

    def _watch(self, ended: Event) -> None:
        while not ended.wait(LOOK):
            if self._headline() != self.said or time.monotonic() - self.heard >= BEAT:
                self._line()

    def _headline(self) -> list[str]:
        """What a line is worth: the stack down to the first that counts, whatever the numbers in it."""
        stack = [*_stack]
        counting = next((place for place, own in enumerate(stack) if own.total), len(stack))
        return [re.sub(r"\d[\d,.]*", "", str(own)) for own in stack[: counting + 1]]

    def _line(self) -> None:
        self.said, self.heard = self._headline(), time.monotonic()
        stack = [*_stack]
        parts = [f"{own} ({count})" if (count := own.count()) else str(own) for own in stack]
        left = next((f", about {_clock(s)} left" for own in stack if (s := own.left()) is not None), "")
        with suppress(OSError, ValueError):  # nobody reads it any more
            self.console.file.write(f"[{_clock(self.heard - self.started)}] {', '.join(parts)}{left}\n")
            self.console.file.flush()

    def _picture(self) -> RenderableType:
        """A row down to each that counts, the rest in the last; readings below."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table
        from rich.text import Text

        now, names, mark = time.monotonic(), list[str](), self.spinner.render(self.console.get_time())
        grid = Table.grid(Column(), Column(no_wrap=True, overflow="ellipsis"), Column(width=20), padding=(0, 1))
        stack, since = [*_stack], 0.0
        for own in stack:
            since = since if names else own.since
            names.append(str(own))
            (done, total), left = own.at(), own.left()
            if total or own is stack[-1]:
                bar = ProgressBar(total=total, completed=done, width=20) if total else ""
                rest = "" if left is None else f"about {_clock(left)} left"
                grid.add_row(mark, ": ".join(names), bar, own.count(), _clock(now - since), rest)
                names, mark = [], ""
        lines = [Text(line, overflow="ellipsis", no_wrap=True) for own in stack for line in own.readings]
        return Group(grid, *lines)


def _clock(seconds: float) -> str:
    """`0:20`, `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes}:{second:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
