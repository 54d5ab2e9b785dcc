"""The same chain in other circumstances, to the same bytes: locales, hash seeds, folders, umask."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from tests.sweep.commands import words
from tests.sweep.harness import Case, Section
from tests.sweep.hostile import write_images
from tests.sweep.reference import DONORS, STAGES, Difference, differences, files_of, is_log

TURKISH = "tr_TR.UTF-8"
"""Its i has no dot where others have one."""
EMBED = words("embed -n 24 --grid 1 --grid-samples 12 --threads 1 --data")
REORDERED = {
    "zoo, two": ["zoo", "add", DONORS[3], DONORS[1]],
    "zoo, one": ["zoo", "add", DONORS[0]],
    "zoo, another": ["zoo", "add", DONORS[2]],
    **{stage: args for stage, args in STAGES.items() if stage != "zoo"},
}


@dataclasses.dataclass(frozen=True)
class Place:
    """What is different."""

    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    umask: int = -1
    relative: bool = False


PLACES = {
    "as before": Place(),
    "another hash seed": Place({"PYTHONHASHSEED": "12345"}),
    "hash seed 0": Place({"PYTHONHASHSEED": "0"}),
    "LC_ALL=C": Place({"LC_ALL": "C", "LANG": "C"}),
    "POSIX without UTF-8 mode": Place(
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ),
    "umask 077": Place(umask=0o077),
    "umask 0": Place(umask=0),
    "another folder, relative path": Place(relative=True),
    "TZ and HOME": Place({"TZ": "Asia/Tokyo", "HOME": "elsewhere"}),
    "python -O": Place({"PYTHONOPTIMIZE": "1"}),
    "PYTHONDEVMODE": Place({"PYTHONDEVMODE": "1"}),
    "COLUMNS and NO_COLOR": Place({"COLUMNS": "40", "NO_COLOR": "1", "FORCE_COLOR": "1"}),
}


def cases(section: Section) -> Iterator[Case]:
    places = dict(PLACES)
    if turkish := make_turkish(section):
        places[TURKISH] = Place(turkish)
    for what, place in places.items():
        yield Case(what, partial(chain_there, section, what, place))
    yield Case("donors in another order", partial(chain_reordered, section))
    yield Case("images in another folder", partial(chain_on_moved_images, section))


def make_turkish(section: Section) -> dict[str, str] | None:
    """The environment of a Turkish locale, if this machine can make one."""
    folder = section.folder / "locale"
    folder.mkdir(exist_ok=True)
    target = folder / TURKISH
    if shutil.which("localedef"):
        command = ["localedef", "-i", "tr_TR", "-f", "UTF-8", str(target)]
        subprocess.run(command, capture_output=True, check=False)
    section.note(f"{TURKISH} available", target.is_dir())
    return {"LOCPATH": str(folder), "LC_ALL": TURKISH} if target.is_dir() else None


def chain(
    section: Section,
    workspace: Path,
    stages: Mapping[str, list[str]],
    place: Place,
    folder: Path | None = None,
) -> None:
    """All stages one after the other, as far as they succeed."""
    start = folder or section.folder
    given = os.path.relpath(workspace, start) if place.relative else workspace
    env = dict(place.env)
    if "HOME" in env:
        env["HOME"] = str(section.folder / env["HOME"])
    for stage, args in stages.items():
        started = section.commands.start(args, given, folder=start, env=env, umask=place.umask)
        ended = started.finish()
        if ended.code or ended.traceback:
            section.fail(f"{stage} under {place}: exit {ended.code}", ended)
            return


def chain_there(section: Section, what: str, place: Place) -> None:
    root = section.work / f"place {what} é"
    folder, workspace = root / "folder", root / "ws"
    folder.mkdir(parents=True)
    chain(section, workspace, STAGES, place, folder)
    found = compare(section, what, workspace)
    asked = sum(not is_log(name) for name in files_of(section.reference.after("finetune")))
    section.count("files compared", asked)
    section.count("files identical", asked - len(found.changed) - len(found.missing))
    modes = {oct(path.stat().st_mode & 0o777) for path in files_of(workspace).values()}
    section.count(f"modes {what if place.umask != -1 else 'usual'} {sorted(modes)}")
    shutil.rmtree(root)


def chain_reordered(section: Section) -> None:
    """Donors added in another order, and one by one."""
    with section.workspace(None) as workspace:
        chain(section, workspace, REORDERED, Place())
        compare(section, "donors added in another order", workspace)


def compare(section: Section, what: str, workspace: Path) -> Difference:
    found = differences(workspace, section.reference.after("finetune"))
    section.count("chains")
    if any(found):
        section.fail(f"{what}: {found}")
    else:
        section.count("chains identical")
    return found


def chain_on_moved_images(section: Section) -> None:
    """The same images in two folders give the same network."""
    source = section.reference.after("zoo")
    with section.workspace(source) as one, section.workspace(source) as other:
        for name, workspace in (("one", one), ("two/deeper", other)):
            images = write_images(section.work / "images" / name, 20, seed=4)
            stages = {
                "embed": [*EMBED, str(images)],
                "sim": ["sim"],
                "partition": STAGES["partition"],
                "assemble": words("assemble --max-params 500k --effort 1 --no-whole"),
                "finetune": words("finetune --steps 4 --batch-size 4"),
            }
            chain(section, workspace, stages, Place())
        changed = differences(one, other).changed
        section.note("files that differ for the same images at another path", len(changed))
        if changed:
            told = f"{len(changed)} files differ: {changed}"
            section.fail(f"the same images in another folder: {told}")
