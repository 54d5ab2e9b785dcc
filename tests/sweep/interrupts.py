"""SIGTERM and Ctrl-C: at random moments, to a whole group, during imports; and broken pipes."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from tests.sweep.commands import PROGRAM, Ended
from tests.sweep.harness import Case, Section
from tests.sweep.reference import ORDER, STAGES, litter

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
PER_STAGE = 7
"""Signals of each kind; the first two come while the program starts."""
DURING_IMPORTS = 40
STARTUP_SECONDS = 1.0
"""Before that, a process may be ended by the signal itself: nobody listens yet."""
SLOW_SECONDS = 5.0
IMPORTERS = (["sim"], ["finetune", "--steps", "1"])
"""Where there is no zoo, they end just after their imports."""
TALKERS = (
    "zoo list --json",
    "zoo list",
    "zoo show demo__resnext",
    "--help",
    "zoo plugins --models demo",
)


def cases(section: Section) -> Iterator[Case]:
    for stage in ORDER:
        for number in EXIT_CODES:
            for index in range(PER_STAGE):
                label = f"{stage} {number.name} {index}"
                yield Case(label, partial(interrupt_stage, section, stage, number, index))
    for number in EXIT_CODES:
        for twice in (False, True):
            for index in range(2):
                label = f"group {number.name} twice {twice} {index}"
                yield Case(label, partial(interrupt_group, section, number, twice=twice))
    seconds_of = cache(lambda number: import_seconds(section, IMPORTERS[number]))
    for which, args in enumerate(IMPORTERS):
        for number in EXIT_CODES:
            for index in range(DURING_IMPORTS):
                run = partial(interrupt_imports, section, args, number, partial(seconds_of, which))
                yield Case(f"imports of {args[0]} {number.name} {index}", run)
    for line in TALKERS:
        yield Case(f"broken pipe: {line}", partial(break_pipe, section, line))


def interrupt_stage(section: Section, stage: str, number: signal.Signals, index: int) -> None:
    seconds = section.reference.seconds[stage]
    with section.workspace(section.reference.before(stage)) as workspace:
        early = section.random.uniform(0.03, 0.4)
        when = early if index < 2 else section.random.uniform(0.1, 0.98) * seconds
        started = section.commands.start(STAGES[stage], workspace)
        sent = started.signal_after(when, number)
        since = time.monotonic()
        ended = started.finish(60)
        label = f"{stage} {number.name} at {when:.2f} s"
        if not sent or ended.code == 0:
            section.count(f"{number.name} too late")
        else:
            section.count(f"{number.name} sent")
            judge_end(section, label, number, ended, early=when < STARTUP_SECONDS)
            judge_manners(section, label, number, time.monotonic() - since, workspace, ended)
        again = section.commands.forked if index % 3 else section.commands.run
        section.compare_rerun(stage, workspace, again(STAGES[stage], workspace), label)


def judge_end(
    section: Section, label: str, number: signal.Signals, ended: Ended, *, early: bool
) -> None:
    """The exit code of the signal, a message, no traceback."""
    wanted = EXIT_CODES[number]
    if ended.code == wanted:
        section.count(f"{number.name} exit {wanted}")
    elif ended.killed_by == number:
        moment = "startup" if early else "later"
        section.count(f"{number.name} died of the signal itself at {moment}")
        if not early:
            section.fail(f"{label}: ended by the signal itself, no message", ended)
    else:
        section.fail(f"{label}: exit {ended.code}", ended)
    if ended.traceback:
        section.count(f"{number.name} tracebacks")
        section.fail(f"{label}: traceback (exit {ended.code})", ended)
    elif ended.code == wanted and "error: " not in ended.stderr:
        section.count(f"{number.name} without message")
        section.fail(f"{label}: exit {ended.code} without a message", ended)


def judge_manners(
    section: Section,
    label: str,
    number: signal.Signals,
    seconds: float,
    workspace: Path,
    ended: Ended,
) -> None:
    """It ends soon, and leaves no unfinished files."""
    if seconds > SLOW_SECONDS:
        section.count(f"{number.name} slower than {SLOW_SECONDS:.0f} s")
        section.fail(f"{label}: {seconds:.1f} s until it ended", ended)
    if left := litter(workspace):
        section.count(f"{number.name} litter")
        section.fail(f"{label}: left at once after the signal {left}", ended)


def interrupt_group(section: Section, number: signal.Signals, *, twice: bool) -> None:
    """To the whole group, with loading processes; a second signal may come soon after the first."""
    args = [*STAGES["finetune"], "--workers", "2", "--steps", "200"]
    with section.workspace(section.reference.before("finetune")) as workspace:
        started = section.commands.start(args, workspace, new_group=True)
        group = started.process.pid
        time.sleep(section.random.uniform(5, 9))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
        if twice:
            time.sleep(section.random.uniform(0.05, 0.4))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)
        ended = started.finish(90)
        time.sleep(0.5)
        left = group_members(group)
        section.count("signals to a group")
        label = f"finetune --workers 2, {number.name}{' twice' if twice else ''} to the group"
        if ended.code not in (EXIT_CODES[number], -number) or ended.traceback or left:
            told = f"exit {ended.code}, traceback {ended.traceback}, left alive {left}"
            section.fail(f"{label}: {told}", ended)
            for process in left:
                os.kill(process, signal.SIGKILL)
        else:
            section.count(f"signals to a group, exit {ended.code}")


def group_members(group: int) -> list[int]:
    """Processes of a group that are alive."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] != "Z":
                    found.append(int(folder.name))
    return found


def import_seconds(section: Section, args: list[str]) -> float:
    nothing = section.work / "nothing"
    return min(section.commands.run(args, nothing).seconds for _ in range(2))


def interrupt_imports(
    section: Section, args: list[str], number: signal.Signals, seconds: Callable[[], float]
) -> None:
    """While torch, numpy and others are imported, which is most of a short command's time."""
    total = seconds()
    started = section.commands.start(args, section.work / "nothing")
    when = section.random.uniform(0.3, total)
    started.signal_after(when, number)
    since = time.monotonic()
    ended = started.finish(60)
    late = time.monotonic() - since
    name = f"imports of {args[0]}, {number.name}"
    if ended.code == 4 and re.search("error: (the zoo in|no assembly in)", ended.stderr):
        section.count(f"{name} too late, or without effect")
        return
    section.count(f"{name} sent")
    section.count(f"{name} exit {ended.code}{' with a traceback' if ended.traceback else ''}")
    if ended.code != EXIT_CODES[number] or ended.traceback:
        moment = f"at {when:.2f} s of {total:.2f}, ended {late:.1f} s later"
        told = f"exit {ended.code}, traceback {ended.traceback}"
        section.fail(f"{' '.join(args)}: {number.name} {moment}: {told}", ended)


def break_pipe(section: Section, line: str) -> None:
    """A reader that goes away."""
    words = line.split()
    if "plugins" not in words and words[0] == "zoo":
        words += ["-w", str(section.reference.after("zoo"))]
    told = section.new_path("told")
    command = shlex.join([*PROGRAM, *words])
    script = (
        f"{command} 2>{shlex.quote(str(told))} | head -c 10 >/dev/null; echo ${{PIPESTATUS[0]}}"
    )
    folder = section.commands.folder
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=folder)
    code, stderr = done.stdout.strip(), told.read_text()
    section.count("broken pipes")
    if "Traceback" in stderr or "Exception ignored" in stderr:
        section.count("broken pipes with noise")
        section.fail(f"{line} | head -c 10: exit {code}, stderr {stderr[-500:]!r}")
    else:
        section.count(f"broken pipes, exit {code}")
