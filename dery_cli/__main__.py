"""``python -m dery_cli``, and the console script ``dery``: signals first, then the imports."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys


def main() -> None:
    """Run ``dery`` and exit with the code its outcome stands for."""
    if sys.getfilesystemencoding() != "utf-8" and os.name == "posix":
        _begin_anew_in_utf8()
    code: list[object] = [1]
    atexit.register(lambda: _leave(code[0]))  # before all others, so that it comes after them
    for number in (signal.SIGINT, signal.SIGTERM):  # until the next two imports are done
        signal.signal(number, lambda number, _: os._exit(128 + number))

    from dery_cli.runtime.startup import begin

    begin(sys.argv[1:])

    from dery_cli.cli import main as run

    try:
        run()
    except SystemExit as done:
        code[0] = done.code
        raise


def _begin_anew_in_utf8() -> None:
    """Names of files are UTF-8 in records and in safetensors; what is printed stays as it was."""
    shown_in = getattr(sys.stdout, "encoding", "ascii")  # there may be none
    os.environ.setdefault("PYTHONIOENCODING", f"{shown_in}:backslashreplace")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606


def _leave(code: object) -> None:
    """End now: Python takes a second, deaf to signals, to take apart what torch and timm made."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
