"""SIGKILL: at random moments, before every single change of a file, and twice in a row.

After each, other commands must find something whole to work with, and the stage run again must
leave what it leaves when nothing disturbs it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.sweep.commands import words
from tests.sweep.harness import Case, Section
from tests.sweep.reference import ORDER, STAGES

RANDOM_KILLS = 10
"""Per stage."""
CHANGE_POINTS = 45
"""Per stage; drawn where there are more."""
REPEATS = 3
TWICE = {
    "embed": words("embed --data demo -n 40 --grid 2 --grid-samples 24 --threads 1"),
    "assemble": [*STAGES["assemble"], "--seed", "3"],
    "finetune": [*STAGES["finetune"], "--seed", "3"],
}
"""The other options of a first run, which is killed too."""


def cases(section: Section) -> Iterator[Case]:
    for stage in ORDER:
        for number in range(RANDOM_KILLS):
            label = f"{stage} killed, {number}"
            yield Case(label, partial(kill_anywhere, section, stage, late=number % 2 == 0))
    points = cache(partial(change_points, section))  # per stage, when first asked for
    for stage in ORDER:
        yield Case(f"{stage} undisturbed", partial(points, stage))
        for number in range(CHANGE_POINTS):
            label = f"{stage} killed before a change, {number}"
            yield Case(label, partial(kill_before_change, section, stage, points, number))
    for stage in TWICE:
        for number in range(REPEATS):
            label = f"{stage} killed twice, {number}"
            yield Case(label, partial(kill_twice, section, stage))


def kill_anywhere(section: Section, stage: str, *, late: bool) -> None:
    """A process killed at a random moment; a late one is in the part where files are written."""
    seconds = section.reference.seconds[stage]
    with section.workspace(section.reference.before(stage)) as workspace:
        when = section.random.uniform(0.45 if late else 0.05, 1.0) * seconds
        started = section.commands.start(STAGES[stage], workspace)
        killed = started.signal_after(when, signal.SIGKILL)
        ended = started.finish()
        hit = killed and ended.code == -signal.SIGKILL
        section.count("random kills" if hit else "random kills too late")
        label = f"{stage}, SIGKILL at {when:.2f} s"
        if stage != "zoo":
            use_what_is_left(section, stage, workspace, label)
        section.compare_rerun(
            stage, workspace, section.commands.run(STAGES[stage], workspace), label
        )


def change_points(section: Section, stage: str) -> tuple[list[int], list[str]]:
    """Which changes of files to kill at, and all changes that an undisturbed run makes."""
    log = section.new_path("changes")
    with section.workspace(section.reference.before(stage)) as workspace:
        workspace.mkdir(exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

        def note(_number: int, what: str) -> None:
            os.write(descriptor, f"{what}\n".encode())  # raises no audit event

        hook = partial(watch_changes, workspace, note)
        ended = section.commands.forked(STAGES[stage], workspace, hook=hook)
        os.close(descriptor)
        section.compare_rerun(stage, workspace, ended, f"{stage} undisturbed in a fork")
    changes = log.read_text().splitlines()
    points = list(range(1, len(changes) + 1))
    if len(points) > CHANGE_POINTS:
        generator = section.random_for(f"changes of {stage}")
        points = sorted(generator.sample(points, CHANGE_POINTS))
    return points, changes


def kill_before_change(
    section: Section,
    stage: str,
    points_of: Callable[[str], tuple[list[int], list[str]]],
    number: int,
) -> None:
    points, changes = points_of(stage)
    if number >= len(points):
        return
    point = points[number]

    def kill(seen: int, _what: str) -> None:
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)

    with section.workspace(section.reference.before(stage)) as workspace:
        workspace.mkdir(exist_ok=True)
        hook = partial(watch_changes, workspace, kill)
        ended = section.commands.forked(STAGES[stage], workspace, hook=hook)
        hit = ended.code == -signal.SIGKILL
        section.count("kills before a change" if hit else "kills before a change that did not come")
        label = f"{stage}, SIGKILL before change {point}/{len(changes)} ({changes[point - 1]})"
        if point % 2 and stage != "zoo":
            use_what_is_left(section, stage, workspace, label)
        ended = section.commands.forked(STAGES[stage], workspace)
        section.compare_rerun(stage, workspace, ended, label)


def kill_twice(section: Section, stage: str) -> None:
    """First with other options, killed, then as usual, killed."""
    seconds = section.reference.seconds[stage]
    with section.workspace(section.reference.before(stage)) as workspace:
        for args in (TWICE[stage], STAGES[stage]):
            started = section.commands.start(args, workspace)
            started.signal_after(section.random.uniform(0.4, 0.95) * seconds, signal.SIGKILL)
            section.count("double kills", started.finish().code == -signal.SIGKILL)
        ended = section.commands.run(STAGES[stage], workspace)
        label = f"{stage}: first with other options, killed, then as usual"
        section.compare_rerun(stage, workspace, ended, label)


CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}
"""Audit events of what changes files; of ``open`` only where it is for writing."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch_changes(root: Path, tell: Callable[[int, str], object]) -> None:
    """Tell of each change below a folder just before this process makes it, with its number."""
    below = os.path.realpath(root)
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or isinstance(args[0], int):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
            return
        path = os.fsdecode(args[0])
        # rmtree names what it removes from the folder that it has open
        relative = event in ("os.remove", "os.rmdir") and args[1] != -1
        if not relative and not path.startswith(below):
            return
        seen += 1
        tell(seen, f"{event} {path if relative else os.path.relpath(path, below)}")

    sys.addaudithook(hook)


def use_what_is_left(section: Section, stage: str, workspace: Path, label: str) -> None:
    """Other commands on a workspace that a kill left: no crash, no half-read file."""
    lines = [["zoo", "list", "--json"], ["eval", "--json"]]
    if stage == "finetune":
        lines.append([*STAGES["assemble"], "--json"])
    elif stage in ("sim", "partition"):  # the stage before
        lines.append([*STAGES[ORDER[ORDER.index(stage) - 1]], "--json"])
    elif stage != "assemble":
        lines.append(["assemble", "--max-params", "500k", "--json"])
    for args in lines:
        ended = section.commands.forked(args, workspace)
        section.count("commands in between")
        sound = ended.code in (0, 4) and not ended.traceback
        if not sound or not answers_truly(section, args[0], ended.stdout, ok=ended.code == 0):
            section.count("commands in between, bad")
            section.fail(f"{label}: in between: {' '.join(args)}", ended)


def answers_truly(section: Section, command: str, stdout: str, *, ok: bool) -> bool:
    """Whether a JSON answer, if it is no error, tells of donors and scores of the reference."""
    try:
        answer = json.loads(stdout)
        if ok and command == "zoo":
            donors = section.reference.donors
            return all(donors.get(found["name"]) == found for found in answer["result"]["donors"])
        if ok and command == "eval":
            top1 = answer["result"]["top1"]
            return any(abs(top1 - score) < 1e-9 for score in section.reference.scores)
    except (ValueError, KeyError, TypeError):
        return False
    return True
