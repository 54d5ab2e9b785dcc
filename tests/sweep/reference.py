"""The reference: a small chain of all stages, and the workspace after each of them."""

from __future__ import annotations

import filecmp
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.sweep.commands import Commands, words

DONORS = ("demo/mobilenetv3", "demo/resnext", "demo/vit_cls", "demo/resnet.rotation")
STAGES = {
    "zoo": ["zoo", "add", *DONORS],
    "embed": words("embed --data demo -n 48 --grid 2 --grid-samples 24 --threads 1"),
    "sim": ["sim"],
    "partition": words("partition -K 3 --restarts 5"),
    "assemble": words(
        "assemble --max-params 500k --effort 2 --max-stitches 1 --start demo__mobilenetv3"
        " --end demo__resnext --fit-samples 32 --target-samples 36 --no-whole"
    ),
    "finetune": words(
        "finetune --steps 20 --report-every 4 --batch-size 8 --effort 0 --valid-fraction 0.2"
    ),
}
"""The command line of every stage, in their order."""
ORDER = tuple(STAGES)
OTHER_OPTIONS = {
    "zoo": ["zoo", "add", "demo/vit_avg"],
    "embed": words("embed --data demo -n 56 --grid 2 --grid-samples 24 --threads 1"),
    "sim": ["sim", "--biased"],
    "partition": words("partition -K 2 --restarts 5"),
    "assemble": [*STAGES["assemble"], "--seed", "3"],
    "finetune": [*STAGES["finetune"], "--seed", "3"],
}
"""The same stages asked for something else."""


class Reference:
    """Workspaces to start from and to compare with; made once in a folder, and never written to."""

    def __init__(self, folder: Path, commands: Commands) -> None:
        self._folder = folder
        self._commands = commands

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """What each stage takes undisturbed; the workspaces are made when this is first asked."""
        times = self._folder / "times.json"
        if times.exists():
            return dict(json.loads(times.read_text()))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        workspace, seconds = self._folder / "workspace", {}
        for stage, args in STAGES.items():
            ended = self._commands.run(args, workspace)
            assert ended.code == 0, ended.tail()
            seconds[stage] = ended.seconds
            shutil.copytree(workspace, self._folder / f"after_{stage}")
        times.write_text(json.dumps(seconds))
        return seconds

    def after(self, stage: str) -> Path:
        assert self.seconds
        return self._folder / f"after_{stage}"

    def before(self, stage: str) -> Path | None:
        """What the stage finds; None before the first."""
        number = ORDER.index(stage)
        return self.after(ORDER[number - 1]) if number else None

    def after_other(self, stage: str) -> Path:
        """The workspace after the stage was run again with ``OTHER_OPTIONS``."""
        place = self._folder / f"other_{stage}"
        if not place.exists():
            half = self._folder / f"half_{stage}"
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(self.after(stage), half)
            ended = self._commands.forked(OTHER_OPTIONS[stage], half)
            assert ended.code == 0, ended.tail()
            half.rename(place)
        return place

    def read(self, name: str) -> dict[str, Any]:
        """A record of the finished chain."""
        return dict(json.loads((self.after("finetune") / name).read_text()))

    @functools.cached_property
    def scores(self) -> list[float]:
        """What a correct ``eval`` may say: top-1 of the assembly and of the run."""
        records = ("assemblies/default/assembly.json", "runs/default/run.json")
        return [self.read(name)["data"]["test_top1"] for name in records]

    @functools.cached_property
    def donors(self) -> dict[str, dict[str, Any]]:
        return {donor["name"]: donor for donor in self.read("zoo.json")["data"]["donors"]}


class Difference(NamedTuple):
    """How one workspace differs from another: names of files."""

    changed: list[str]
    missing: list[str]
    extra: list[str]

    def __str__(self) -> str:
        return f"differs {self.changed}, missing {self.missing}, extra {self.extra}"


def files_of(folder: Path) -> dict[str, Path]:
    """All files below a folder by their relative names; links too."""
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_of(folder).items()}


def is_log(name: str) -> bool:
    """Logs hold times, which are never the same."""
    return name.endswith(".log.json")


def differences(workspace: Path, wanted: Path) -> Difference:
    """How the bytes of a workspace differ from those it should have, logs apart."""
    found, asked = files_of(workspace), files_of(wanted)
    return Difference(
        changed=[
            name
            for name, path in asked.items()
            if name in found
            and not is_log(name)
            and not filecmp.cmp(found[name], path, shallow=False)
        ],
        missing=[name for name in asked if name not in found and not is_log(name)],
        extra=[name for name in found if name not in asked],
    )


def litter(workspace: Path) -> list[str]:
    """Unfinished files that lie about."""
    return [
        name
        for name in files_of(workspace)
        if re.search(r"\.(pending|part|tmp)$|\.tmp/|\.gone", name)
    ]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str | None:
    """The hash of a file; None where there is none."""
    return sha256(path.read_bytes()) if path.exists() else None


def resealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the hashes that dery would give it, as an author of hostile files can do."""
    from tests.unit.io.samples import sealed

    try:
        return sealed(record)
    except (TypeError, ValueError):  # nobody can
        return {**record, "sha256": "0" * 64, "checksum": "0" * 64}


def put(path: Path, record: object) -> None:
    path.write_text(json.dumps(record, indent=1))


def shown(args: Sequence[str]) -> str:
    """A command line by its first words."""
    return " ".join(args[:2] if args[0] in ("zoo", "eval") else args[:1])
