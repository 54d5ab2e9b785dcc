"""Helpers of all tests: the real command line, and small zoos that are made once."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DERY_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _signals_act() -> None:
    """Ctrl-C acts, in children too, though a background job or a CI runner ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout; fails where there is more or less than one."""
        return json.loads(self.stdout)


def run_dery(*args: str, cwd: Path | None = None) -> Outcome:
    """Run ``dery ARGS`` in this process, through the very entry point of the command."""
    from dery_cli.cli import run
    from dery_cli.runtime import terminal

    terminal.use_terminal(terminal.Terminal(json="--json" in args))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        if cwd is not None:
            stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        code = run(list(args))
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def dery(tmp_path: Path) -> Callable[..., Outcome]:
    """``dery(*args)`` in a fresh folder, ``.dery`` below it."""

    def call(*args: str) -> Outcome:
        return run_dery(*args, cwd=tmp_path)

    return call


def make_images(folder: Path, classes: Sequence[str], count: int, *, size: int = 40) -> Path:
    """Class folders of small pictures: each class a bright bar at its own place, with noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for index, name in enumerate(classes):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 90, (size, size + 6, 3), dtype=np.uint8)
            start = 4 + index * (size - 12) // max(1, len(classes) - 1)
            pixels[start : start + 6] = 255 - pixels[start : start + 6]
            Image.fromarray(pixels).save(place / f"{number:03d}.png")
    return folder
