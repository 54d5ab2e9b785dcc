"""What a ``dery`` process does first: its standard streams and signals, before any heavy import."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from dery_cli.runtime.interrupts import Interrupts, Terminated
from dery_cli.runtime.launcher import is_follower, launched
from dery_cli.runtime.streams import Steady, answer_stream, steady_streams

_interrupts: Interrupts | None = None
_answers = False


def begin(args: Sequence[str]) -> None:
    """Prepare the process for one command line; a second call does nothing."""
    global _interrupts, _answers
    if _interrupts is not None:
        return
    _answers = wants_json(args)
    steady_streams(json=_answers)
    _interrupts = Interrupts(_last_words, repeated=launched())
    _interrupts.install()


def wants_json(args: Sequence[str]) -> bool:
    """Whether this process is to answer with the JSON object."""
    return "--json" in args and not is_follower()


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """A command's body: SIGINT and SIGTERM unwind it.

    Raises:
        KeyboardInterrupt: SIGINT.
        Terminated: SIGTERM.
    """
    if _interrupts is not None:
        with _interrupts.unwinding():
            yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)  # in somebody else's process
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_sigterm(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def _last_words(number: int) -> None:
    """What an outcome says, without anything that may be half imported or half printed by now."""
    word, told = ("interrupted",) * 2 if number == signal.SIGINT else ("terminated", "SIGTERM")
    if is_follower():
        return
    os.write(2, f"error: {word}{'' if told == word else f' by {told}'}\n".encode())
    answer = answer_stream()
    if _answers and isinstance(answer, Steady) and not answer.flushed:
        text = (
            '{"schema": "dery/1", "command": "", "ok": false, "result": null, "error": '
            f'{{"code": "{word}", "message": "{word}", "hint": null}}, "warnings": []}}\n'
        )
        os.write(answer.fileno(), text.encode())
