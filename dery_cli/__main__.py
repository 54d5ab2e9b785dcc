"""``python -m dery_cli``, and the console script ``dery``: signals first, then the imports."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run ``dery`` and exit with the code its outcome stands for."""
    for number in (signal.SIGINT, signal.SIGTERM):  # until the next two imports are done
        signal.signal(number, lambda number, _: os._exit(128 + number))

    import sys

    from dery_cli.runtime.startup import begin

    begin(sys.argv[1:])

    from dery_cli.cli import main as run

    run()


if __name__ == "__main__":
    main()
