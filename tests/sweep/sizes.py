"""Peak memory and seconds of the real command line, over 300 and 3,000 images."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.sweep.commands import PROGRAM, words
from tests.sweep.harness import Case, Section
from tests.sweep.hostile import write_images

SHORT = ("--help", "--version", "zoo --help", "embed --help")
IMAGES = (300, 3000)
OPTIONS = ("", "--workers 2", "--skip-bad")
EMBED = words(
    "embed -n 4000 --grid 2 --threads 1 --grid-samples 64 --donor demo__resnext"
    " --donor demo__vit_cls --data"
)
UNUSED = ("demo__mobilenetv3", "demo__resnet.rotation")
FOLLOWING = (
    "sim",
    "partition -K 3 --restarts 3",
    "assemble --max-params 500k --effort 1 --target-samples 4000 --fit-samples 64",
    "finetune --steps 4 --batch-size 8",
    "eval",
)
LAUNCHER = """
import pathlib
import resource
import subprocess
import sys

code = subprocess.run(sys.argv[2:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
pathlib.Path(sys.argv[1]).write_text(str(peak))
sys.exit(code)
"""
"""Between: the system counts what a process was forked from as its memory too."""


def cases(section: Section) -> Iterator[Case]:
    for line in SHORT:
        yield Case(line, partial(measure, section, words(line), None, f"dery {line}"))
    yield Case("zoo list", partial(measure_list, section))
    for options in OPTIONS:
        for count in IMAGES:
            label = f"embed {count} {options}".strip()
            yield Case(label, partial(measure_chain, section, count, words(options), label))


def measure(section: Section, args: Sequence[str], workspace: Path | None, label: str) -> None:
    """Note the MiB and the seconds of a command, which must succeed."""
    peak = section.new_path("peak")
    program = (sys.executable, "-c", LAUNCHER, str(peak), *PROGRAM)
    ended = section.commands.start(args, workspace, program=program).finish()
    if ended.code:
        section.fail(f"{label}: exit {ended.code}", ended)
    section.note(f"MiB {label}", int(peak.read_text()) / 1024)
    section.note(f"s {label}", ended.seconds)


def measure_list(section: Section) -> None:
    measure(section, ["zoo", "list"], section.reference.after("finetune"), "zoo list")


def measure_chain(section: Section, count: int, options: list[str], label: str) -> None:
    """``embed``; where it has no further options, all that follows too."""
    images = noise(section, count)
    with section.workspace(section.reference.after("zoo")) as workspace:
        measure(section, [*EMBED, str(images), *options], workspace, label)
        if options:
            return
        donors = json.loads((workspace / "zoo.json").read_text())["data"]["donors"]
        assert {donor["name"] for donor in donors} > set(UNUSED)
        section.commands.forked(["zoo", "remove", *UNUSED], workspace)
        for line in FOLLOWING:
            measure(section, words(line), workspace, f"{words(line)[0]} {count}")


def noise(section: Section, count: int) -> Path:
    """So many images in two classes, copies of ten; made once."""
    folder = section.folder / "noise" / str(count)
    if folder.exists():
        return folder
    source = write_images(section.folder / "noise" / "source", 5, size=64, seed=1)
    half = section.new_path("noise")
    for name in ("c0", "c1"):
        (half / name).mkdir(parents=True)
        for number in range(count // 2):
            image = source / name / f"{number % 5:04}.png"
            shutil.copy(image, half / name / f"{number:05}.png")
    half.rename(folder)
    return folder
