"""Standard output and error that fail neither the work nor the command.

A reader that has gone, a full disk, a descriptor that was closed before dery began, an encoding
without the character: what was to be shown is lost then, nothing else. With ``--json`` the object
alone gets to standard output, whatever plugins and native code print.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EBADF)
"""Nobody reads, and nobody wants to know."""


class Steady:
    """A text stream whose ``write`` and ``flush`` raise nothing.

    ``failure`` is what failed; ``flushed`` whether something went out, or would have.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        self.flushed = False

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()
        self.flushed = True

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # it was closed
            self.failure = self.failure or OSError(errno.EBADF, os.strerror(errno.EBADF))
        except OSError as error:
            self.failure = self.failure or error
            with contextlib.suppress(OSError, ValueError):  # what is buffered goes nowhere
                _to_nowhere(self._stream.fileno())

    @property
    def lost(self) -> OSError | None:
        """What kept somebody from reading who would want to know; None where nobody does."""
        failure = self.failure
        return None if failure is None or failure.errno in _GONE else failure

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_answer: Steady | None = None


def answer_stream() -> TextIO | Steady:
    """Where the JSON object goes."""
    return sys.stdout if _answer is None else _answer


def steady_streams(*, json: bool) -> None:
    """Make this process's standard streams steady.

    Args:
        json: Keep standard output for ``answer_stream``; the rest goes to standard error.
    """
    global _answer
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # or the next file that is opened gets this number
            _to_nowhere(number)
    if json:
        handle = os.dup(1)
        os.dup2(2, 1)
        _answer = Steady(os.fdopen(handle, "w", encoding="ascii", newline="\n"))
    sys.stderr = _steady(sys.stderr, 2)
    sys.stdout = sys.stderr if json else _steady(sys.stdout, 1)


def _steady(stream: TextIO | None, number: int) -> Any:
    if stream is None:
        stream = os.fdopen(number, "w", encoding="utf-8", closefd=False)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return Steady(stream)


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
