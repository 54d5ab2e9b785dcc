"""What the hostile sections share: what is expected of a command, limits, bait, small images."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from tests.sweep.commands import TIMEOUT, Ended, words
from tests.sweep.harness import Section
from tests.sweep.reference import contents

ESCAPES = "\x1b[31mRED\x1b]0;owned\x07\x1b[2J"
"""Colours, sets the title of, and clears a terminal that it is printed to."""
SECONDS = 60
TO_AN_ASSEMBLY = (
    words("sim"),
    words("partition -K 3 --restarts 3"),
    words("assemble --max-params 500k --effort 1"),
)
"""What follows ``embed``."""


def limited(gib: int = 8) -> Callable[[], None]:
    """A hook that keeps a fork from filling the memory."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (gib << 30, gib << 30))

    return limit


def expect(
    section: Section, label: str, ended: Ended, codes: Collection[int], *, escapes: bool = True
) -> None:
    """No hang, no crash, one of the exit codes; and no raw escape, where ``escapes`` asks."""
    section.count("cases")
    bad = None
    if ended.code == TIMEOUT:
        bad = "hang"
    elif ended.crashed:
        bad = "traceback"
    elif ended.killed_by:
        bad = f"died of signal {ended.killed_by}"
    elif ended.code not in codes:
        bad = f"exit {ended.code} (expected {sorted(codes)})"
    elif escapes and "\x1b" in ended.text:
        bad = "raw terminal escapes printed"
    section.count(bad or "fine")
    if bad:
        section.fail(f"{label}: {bad}", ended)


class Victim:
    """A folder outside of the workspace, with files that nothing may touch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("keep.txt", "x.json", "x.safetensors", "x.log.json"):
            (folder / name).write_text(name)
        self.watch()

    def watch(self) -> None:
        """What is there now must stay."""
        self._was = contents(self.folder)

    def check(self, section: Section, label: str, ended: Ended) -> None:
        section.count("victims")
        was, found = self._was, contents(self.folder)
        if found != was:
            section.count("FILES OUTSIDE THE WORKSPACE CHANGED")
            gone, new = sorted(was.keys() - found.keys()), sorted(found.keys() - was.keys())
            changed = [name for name in was if name in found and found[name] != was[name]]
            told = f"gone {gone}, new {new}, changed {changed}"
            section.fail(f"{label}: outside the workspace: {told}", ended)


@contextlib.contextmanager
def victim(section: Section) -> Iterator[Victim]:
    folder = section.new_path("victim")
    try:
        yield Victim(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_images(
    folder: Path, count: int, *, classes: int = 2, size: int = 16, seed: int = 0
) -> Path:
    """Class folders c0, c1, ... of noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    for index in range(classes):
        place = folder / f"c{index}"
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number:04}.png")
    return folder


def demo_weights(section: Section) -> Path:
    """A file of good weights for demo/vit_avg; made once."""
    path = section.folder / "weights.safetensors"

    def save() -> None:
        from safetensors.torch import save_file

        from dery_cli.zoo.registry import build_model, parse_spec, resolve

        spec = parse_spec("demo/vit_avg")
        plugin, _ = resolve(spec)
        model = build_model(spec, plugin, pretrained=True, image_size=None)
        state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
        save_file(state, path)

    if not path.exists():
        ended = section.commands.call(save).finish()
        assert ended.code == 0, ended.tail()
    return path
