"""A section of the sweep: its cases, what was counted, what failed, and its file of results."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import random
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tests.sweep.commands import Commands, Ended
from tests.sweep.reference import Reference, differences

T = TypeVar("T")
PROGRESS_SECONDS = 60
"""How often a line says how far a section is."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to try; the label names it in results and seeds its random choices."""

    label: str
    run: Callable[[], object]


class Section:
    """What the cases of a section work with.

    Args:
        name: Of the section, and of its file of results.
        folder: Everything lies below it.
        seed: Of all random choices.
    """

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        self.name = name
        self.folder = folder
        self.work = folder / "work" / name
        shutil.rmtree(self.work, ignore_errors=True)
        for place in (self.work, folder / "home", folder / "results"):
            place.mkdir(parents=True, exist_ok=True)
        self.commands = Commands(folder, self.work)
        self.reference = Reference(folder / "reference", self.commands)
        self._seed = seed
        self.random = self.random_for("")
        self._counts: collections.Counter[str] = collections.Counter()
        self._failures: list[dict[str, object]] = []
        self._numbers = itertools.count()
        self._began = time.monotonic()

    @property
    def failed(self) -> bool:
        return bool(self._failures)

    def random_for(self, what: str) -> random.Random:
        """A generator that depends on the seed and on what it is for."""
        return random.Random(f"{self._seed}-{self.name}-{what}")

    def count(self, what: str, number: int = 1) -> None:
        self._counts[what] += number

    def note(self, what: str, value: float) -> None:
        """A figure that is no count."""
        self._counts[what] = round(value)

    def fail(self, what: str, ended: Ended | None = None, **more: object) -> None:
        output = None if ended is None else ended.tail(1200)
        self._failures.append({"what": what, **more, "output": output})
        print(f"   !! [{self.name}] {what}", flush=True)

    def run(self, cases: Iterable[Case], most: int | None = None) -> None:
        """Run all cases, or so many of them; results are written after each."""
        chosen = drawn(list(cases), most, self.random_for("cases"))
        told = time.monotonic()
        for number, case in enumerate(chosen, 1):
            self.random = self.random_for(case.label)
            try:
                case.run()
            except Exception:
                self._failures.append(
                    {
                        "what": f"{case.label}: the sweep itself failed",
                        "output": traceback.format_exc(),
                    }
                )
                print(f"   !! [{self.name}] {case.label}: the sweep itself failed", flush=True)
            self._save(number, len(chosen))
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                print(f"{self.name}: {number} of {len(chosen)} {self.summary()}", flush=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def summary(self) -> str:
        seconds = round(time.monotonic() - self._began)
        return f"{seconds} s, {len(self._failures)} failures, {json.dumps(self._counts)}"

    def _save(self, done: int, total: int) -> None:
        result = {
            "section": self.name,
            "seed": self._seed,
            "seconds": round(time.monotonic() - self._began),
            "cases": {"done": done, "of": total},
            "counts": self._counts,
            "failures": self._failures,
        }
        path = self.folder / "results" / f"{self.name}.json"
        half = path.with_suffix(".half")
        half.write_text(json.dumps(result, indent=1))
        half.replace(path)

    def new_path(self, name: str = "ws") -> Path:
        return self.work / f"{name}{next(self._numbers)}"

    @contextlib.contextmanager
    def workspace(self, source: Path | None) -> Iterator[Path]:
        """A copy of a workspace, or the path of none; removed afterwards."""
        place = self.new_path()
        if source is not None:
            shutil.copytree(source, place, symlinks=True)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def finished(self) -> contextlib.AbstractContextManager[Path]:
        """A copy of the workspace that holds the whole chain."""
        return self.workspace(self.reference.after("finetune"))

    @contextlib.contextmanager
    def disk(self, size: str = "512m", options: str = "") -> Iterator[Disk]:
        """A file system of its own in memory, which takes root; unmounted afterwards."""
        place = self.new_path("disk")
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(place)]
        subprocess.run(command, check=True)
        try:
            yield Disk(place)
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)
            place.rmdir()

    def compare_rerun(self, stage: str, workspace: Path, ended: Ended, label: str) -> None:
        """After a disturbance: the stage run again must succeed and leave what it always leaves."""
        self.count("reruns")
        found = differences(workspace, self.reference.after(stage))
        if ended.code == 0 and not ended.traceback:
            self.count("reruns fine")
        else:
            self.fail(f"{label}: rerun exit {ended.code}", ended)
        if not found.changed and not found.missing:
            self.count("reruns identical")
        else:
            self.fail(f"{label}: rerun {found}", ended)
        if found.extra:
            self.count("reruns with leftovers")
            self.fail(f"{label}: leftovers {found.extra}", ended)
        if ended.traceback:
            self.count("reruns with tracebacks")


@dataclasses.dataclass(frozen=True)
class Disk:
    """A mounted file system."""

    place: Path

    @property
    def used_kib(self) -> int:
        state = shutil.disk_usage(self.place)
        return state.used // 1024

    def remount(self, options: str) -> None:
        command = ["mount", "-o", f"remount,{options}", str(self.place)]
        subprocess.run(command, check=True)


def drawn(items: Sequence[T], most: int | None, generator: random.Random) -> list[T]:
    """At most so many: one of each of ``most`` equal stretches, so that no part is left out."""
    if most is None or len(items) <= most:
        return list(items)
    bounds = [index * len(items) // most for index in range(most + 1)]
    return [items[generator.randrange(*pair)] for pair in itertools.pairwise(bounds)]


def rewritten(path: Path, data: bytes | None) -> None:
    """Give a file other bytes, or delete it."""
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
