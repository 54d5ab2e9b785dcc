"""Ctrl-C and SIGTERM at any moment: they end the command, quietly and soon.

In a command's own body a signal unwinds it, so that every ``finally`` runs. Elsewhere (while
modules are imported, an outcome is printed, Python ends) and the second time, the process ends at
once: what is on the disk is whole at any moment. No heavy imports, since it is wanted before them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

HANDLED = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 1.5
"""Seconds for native code (a solver, a matrix product) to give way to Python."""
_AGAIN = 0.3
"""The same when the signal comes a second time."""


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C."""


class Interrupts:
    """What a process does on signals.

    Args:
        last_words: Called with the signal's number before the process ends at once.
        repeated: Whether a launcher may pass on a signal that came already: only one counts then.
    """

    def __init__(self, last_words: Callable[[int], None], *, repeated: bool = False) -> None:
        self._last_words, self._repeated = last_words, repeated
        self._unwinds = False
        self._seen = threading.Event()
        self._count = 0

    def install(self) -> None:
        """End at once from now on; ``unwinding`` is for the command's body."""
        for number in HANDLED:
            signal.signal(number, self.handle)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # a forked child has its own signals, which are no news to this process
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()

    @contextlib.contextmanager
    def unwinding(self) -> Iterator[None]:
        """A block that the first signal unwinds.

        Raises:
            KeyboardInterrupt: SIGINT.
            Terminated: SIGTERM.
        """
        self._unwinds = True
        try:
            yield
        finally:
            self._unwinds = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        self._seen.set()
        self._count += 1
        if self._count > 1 and self._repeated:
            return
        if not self._unwinds or self._count > 1 or _importing(frame):
            self._end(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def _watch(self, reading: int) -> None:
        """In a thread: end the process where Python's own handler does not come to run."""
        count = 0
        while True:
            for number in os.read(reading, 64):
                if number not in HANDLED or signal.getsignal(number) != self.handle:
                    continue  # training has its own way
                count += 1
                if count == 1 and not self._seen.wait(_PATIENCE):
                    self._end(number)
                elif count > 1 and not self._repeated:
                    threading.Event().wait(_AGAIN)
                    self._end(number)

    def _end(self, number: int) -> NoReturn:
        with contextlib.suppress(Exception):
            self._last_words(number)
        os._exit(128 + number)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: half of one would be left, and worse tracebacks."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
