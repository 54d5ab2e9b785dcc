"""What a command says to people: tables, progress, warnings. Answers for programs go to ``cli``.

With ``--json`` stdout belongs to the one JSON object, so everything here goes to stderr.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from dery_cli.runtime.launcher import is_follower
from dery_cli.runtime.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_SECONDS = 10.0
_PLAIN_WIDTH = 80
"""Columns of what is no terminal, unless ``COLUMNS`` says otherwise."""


class Progress:
    """One running task; ``advance`` is called as its parts are done."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.note = ""
        self.left: float | None = None

    def advance(self, count: int = 1) -> None:
        self.done += count

    def update(self, done: int, note: str = "", left: float | None = None) -> None:
        """Set the position.

        Args:
            done: Parts done.
            note: Stands beside the description.
            left: Seconds, where the caller knows better than the mean pace so far.
        """
        self.note, self.left = note, left
        self.advance(done - self.done)


class Terminal:
    """Where a command prints. Of several launched processes only the main one does.

    Args:
        json: Keep stdout for the JSON object.
        quiet: Print warnings and errors only.
        verbose: Print details too.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self.warnings: list[str] = []
        self._out: Console | None = None
        self._err: Console | None = None

    @property
    def err(self) -> Console:
        if self._err is None:
            from rich.console import Console

            self._err = Console(
                stderr=True,
                highlight=False,
                soft_wrap=True,
                width=_width(sys.stderr),
                quiet=is_follower(),
            )
        return self._err

    @property
    def out(self) -> Console:
        if self.json:
            return self.err
        if self._out is None:
            from rich.console import Console

            self._out = Console(
                highlight=False, soft_wrap=True, width=_width(sys.stdout), quiet=is_follower()
            )
        return self._out

    def say(self, text: str = "", style: str | None = None) -> None:
        """A line of the command's answer."""
        if not self.quiet:
            self.out.print(printable(text), style=style, markup=False)

    def note(self, text: str) -> None:
        """A line about what is going on; stderr."""
        if not self.quiet:
            self.err.print(printable(text), style="dim", markup=False)

    def detail(self, text: str) -> None:
        """A line for ``--verbose``."""
        if self.verbose:
            self.err.print(printable(text), style="dim", markup=False)

    def warn(self, text: str) -> None:
        """A warning: stderr, and the ``warnings`` of the JSON object."""
        text = printable(text)
        self.warnings.append(text)
        self.err.print(f"warning: {text}", style="yellow", markup=False)

    def table(
        self,
        title: str | None,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        highlight: int | None = None,
    ) -> None:
        """A table that fits the terminal; columns of figures align right."""
        if self.quiet:
            return
        from dery_cli.runtime.tables import draw_table

        names = [printable(column) for column in columns]
        cells = [[("-" if cell is None else printable(str(cell))) for cell in row] for row in rows]
        heading = None if title is None else printable(title)
        for line in draw_table(heading, names, cells, self.out.width):
            bold = line.kind in ("head", str(highlight))
            self.out.print(line.text, style="bold" if bold else None, markup=False)

    def growing_table(self, columns: Mapping[str, int]) -> GrowingTable:
        """A table on stderr whose rows are printed as they come.

        Args:
            columns: Headings, and the characters that the longest figure below each takes.
        """
        return GrowingTable(self, columns)

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Progress]:
        """A progress bar on a terminal, a line every few seconds elsewhere."""
        description = printable(description)
        if self.quiet or is_follower():
            yield Progress(total)
        elif self.err.is_terminal:
            yield from self._bar(description, total)
        else:
            plain = _PlainProgress(self, description, total)
            yield plain
            plain.finish()

    def _bar(self, description: str, total: int) -> Iterator[Progress]:
        from rich import progress as rich_progress

        columns = (
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("eta"),
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=self.err, transient=False) as bar:
            task = bar.add_task(description, total=total)

            class Bar(Progress):
                def advance(self, count: int = 1) -> None:
                    super().advance(count)
                    bar.advance(task, count)

                def update(self, done: int, note: str = "", left: float | None = None) -> None:
                    self.done, self.left = done, left
                    text = f"{description} {printable(note)}" if note else description
                    bar.update(task, completed=done, description=text)

            yield Bar(total)


class GrowingTable:
    """Rows under a heading that comes before the first of them; numbers, aligned right."""

    def __init__(self, terminal: Terminal, columns: Mapping[str, int]) -> None:
        self._terminal, self._columns = terminal, list(columns)
        self._widths = [max(len(name), most) for name, most in columns.items()]
        if sum(self._widths) + 2 * len(columns) - 2 > terminal.err.width:
            self._widths = [max(most, *map(len, name.split(" "))) for name, most in columns.items()]
        self._headed = False

    def row(self, cells: Sequence[object]) -> None:
        if not self._headed:
            from dery_cli.runtime.tables import fold

            names = [fold(*one) for one in zip(self._columns, self._widths, strict=True)]
            tall = max(map(len, names))
            for line in zip(*([""] * (tall - len(one)) + one for one in names), strict=True):
                self._line(line)
            self._headed = True
        self._line(cells)

    def _line(self, cells: Sequence[object]) -> None:
        padded = [str(cell).rjust(width) for cell, width in zip(cells, self._widths, strict=True)]
        self._terminal.note("  ".join(padded))


class _PlainProgress(Progress):
    def __init__(self, terminal: Terminal, description: str, total: int) -> None:
        super().__init__(total)
        self._terminal, self._description = terminal, description
        self._start = self._last = time.monotonic()

    def advance(self, count: int = 1) -> None:
        super().advance(count)
        now = time.monotonic()
        if now - self._last >= _PLAIN_SECONDS and 0 < self.done < self.total:
            self._last = now
            left = self.left
            if left is None:
                left = (now - self._start) * (self.total - self.done) / self.done
            self._terminal.note(
                f"{self._description} {self.done}/{self.total}, about {left:.0f} s left"
                f"{'  ' + self.note if self.note else ''}"
            )

    def finish(self) -> None:
        seconds = time.monotonic() - self._start
        self._terminal.note(f"{self._description} {self.done}/{self.total} in {seconds:.1f} s")


def _width(stream: TextIO) -> int | None:
    """Columns of a stream; None where rich finds them: a terminal, or ``COLUMNS``."""
    known = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return None if known else _PLAIN_WIDTH


_current: contextvars.ContextVar[Terminal | None] = contextvars.ContextVar("terminal", default=None)


def use_terminal(terminal: Terminal) -> None:
    """Make ``terminal`` the one ``current_terminal`` gives."""
    _current.set(terminal)


def current_terminal() -> Terminal:
    """The running command's terminal; a plain one before a command has started."""
    terminal = _current.get()
    if terminal is None:
        terminal = Terminal(json="--json" in sys.argv)
        _current.set(terminal)
    return terminal
