"""Ctrl-C and SIGTERM during training: noted at once, acted on between two updates."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM)
WORKER_SECONDS = 30
"""How long a loading process outlives SIGTERM: an update, and more."""


class Interruption:
    """While entered, the first signal is noted in ``received``; a second one acts as before.

    ``redeliver`` afterwards lets it act as it would have: KeyboardInterrupt, or whatever the
    program does on SIGTERM. Outside the main thread, where Python sets no handlers, nothing is
    caught.

    Args:
        repeated: A launcher passes signals on to processes that had them from the terminal
            already, and ends those that do not stop: only the first one counts.
    """

    def __init__(self, *, repeated: bool = False) -> None:
        self.received: int | None = None
        self._repeated = repeated
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def redeliver(self) -> None:
        """Let the noted signal act now."""
        self._restore()
        if self.received is not None:
            signal.raise_signal(self.received)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        elif not self._repeated:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def ignore_in_worker(_: int) -> None:
    """Loading processes leave Ctrl-C and SIGTERM, which may go to the group, to the main process.

    They end when it closes its batches, seconds after it dies, and a while after SIGTERM: that is
    what Python sends them as it exits, to wait for them then, should an error's traceback still
    hold the batches.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))
