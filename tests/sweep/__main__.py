"""A reliability sweep: the real command line damaged, killed, interrupted, starved and attacked.

    python -m tests.sweep [--seed N] [--only damage,kills] [--dir DIR] [--most N]

Every section tries many cases and counts what came of them; results are in DIR/results, one JSON
file a section, which is written after every case. It takes Linux, for the full disks root, and
hours for all. A case's random choices depend on the seed and the case alone.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

from tests.sweep.commands import environment
from tests.sweep.harness import Section

SECTIONS = (
    "kills",
    "interrupts",
    "damage",
    "full_disk",
    "races",
    "readers",
    "hostile_records",
    "hostile_files",
    "hostile_folders",
    "hostile_names",
    "places",
    "sizes",
)
"""Modules of this package with a function ``cases``."""


def names(text: str) -> list[str]:
    """The sections that a list with commas names."""
    found = text.split(",")
    if unknown := [name for name in found if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(
            f"no section {unknown[0]}; there are {', '.join(SECTIONS)}"
        )
    return found


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="tests.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=names, default=SECTIONS, help=", ".join(SECTIONS))
    parser.add_argument("--dir", type=Path, help="for work and results; else a temporary folder")
    parser.add_argument("--most", type=int, help="cases of a section, drawn evenly")
    args = parser.parse_args()
    folder = (args.dir or Path(tempfile.mkdtemp(prefix="dery-sweep-"))).resolve()
    print(f"results in {folder / 'results'}", flush=True)
    os.environ.clear()
    os.environ.update(environment(folder))
    failed = False
    for name in SECTIONS:
        if name in args.only:
            section = Section(name, folder, args.seed)
            cases = importlib.import_module(f"tests.sweep.{name}").cases(section)
            section.run(cases, args.most)
            print(f"{name}: {section.summary()}", flush=True)
            failed |= section.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
