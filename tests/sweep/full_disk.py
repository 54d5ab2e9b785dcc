"""A disk with little, no or read-only space: file systems in memory, which take root to mount.

Where the space does not do, the error must say so, what was there before must stay, nothing
unfinished may lie about, and the same command must succeed once there is space.
"""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.sweep.commands import Ended, words
from tests.sweep.harness import Case, Disk, Section
from tests.sweep.hostile import demo_weights
from tests.sweep.reference import (
    ORDER,
    OTHER_OPTIONS,
    STAGES,
    differences,
    file_sha256,
    files_of,
    litter,
)

READERS = (["zoo", "list"], ["eval"], ["eval", "assemblies/default"])
PARETO = words("assemble --max-params 500k --pareto --no-whole --target-samples")
OTHERS = (
    [*PARETO, "80", "--fit-samples", "32"],
    [*PARETO, "60", "--name", "p"],
    words(
        "assemble --max-params 500k --max-latency 50ms --no-whole --target-samples 60"
        " --name l --effort 1"
    ),
    [*STAGES["finetune"], "--name", "tb", "--steps", "4", "--tensorboard"],
)
"""Commands that write more than the stages above do."""


def cases(section: Section) -> Iterator[Case]:
    for stage in ORDER:
        before, after = section.reference.before(stage), section.reference.after(stage)
        yield from cases_of(section, stage, STAGES[stage], before, after)
        other = section.reference.after_other(stage)
        yield from cases_of(section, stage, OTHER_OPTIONS[stage], after, other)
    for stage in ORDER[1:]:
        yield Case(f"{stage} without inodes", partial(no_inodes, section, stage))
    yield Case("read-only readers", partial(read_only_readers, section))
    for stage in ORDER:
        for args in (STAGES[stage], OTHER_OPTIONS[stage]):
            run = partial(read_only_writer, section, args)
            yield Case(f"read-only {' '.join(args)}", run)
    for kib in (0, 4, 8):
        yield Case(f"others with {kib} KiB", partial(full_for_others, section, kib))


def cases_of(
    section: Section, stage: str, args: list[str], base: Path | None, wanted: Path
) -> Iterator[Case]:
    """One command line with so much space left, from none to enough."""
    needed = growth_kib(wanted, base)
    # fine-tuning holds two checkpoints at a time
    peak = needed * (2 if stage == "finetune" else 1)
    shares = {int(peak * share) // 4 * 4 for share in (0.15, 0.4, 0.6, 0.8, 0.9)}
    sizes = {0, 4, 8, *shares, needed - 4, needed, needed + 4}
    if needed < 60:
        sizes = set(range(0, needed + 12, 4))
    for kib in sorted(size for size in sizes if size >= 0):
        if base is not None or kib >= 4:
            variant = "again" if args is OTHER_OPTIONS[stage] else "first"
            label = f"{stage} ({variant}) with {kib} KiB left of {needed} needed"
            run = partial(fill_disk, section, label, stage, args, base, wanted, kib)
            yield Case(label, run)


def growth_kib(wanted: Path, base: Path | None) -> int:
    """KiB in whole blocks that a workspace takes more than the one before."""
    before = {} if base is None else files_of(base)
    return sum(
        (path.stat().st_size + 4095) // 4096 * 4
        for name, path in files_of(wanted).items()
        if name not in before or not filecmp.cmp(path, before[name], shallow=False)
    )


def fill_disk(
    section: Section,
    label: str,
    stage: str,
    args: list[str],
    base: Path | None,
    wanted: Path,
    kib: int,
) -> None:
    with section.disk() as disk:
        workspace = place_workspace(disk, base)
        disk.remount(f"size={disk.used_kib + kib}k")
        ended = section.commands.forked(args, workspace)
        section.count("runs")
        if ended.code == 0:
            section.count("enough space after all")
        else:
            section.count("full")
            check_message(section, label, ended)
            if base is not None:
                check_old_files(section, label, stage, workspace, base, ended)
            check_litter(section, label, workspace, ended)
            check_readers(section, label, workspace)
        disk.remount("size=512m")
        again = section.commands.forked(args, workspace)
        found = differences(workspace, wanted)
        if again.code != 0 or again.traceback or any(found):
            section.count("reruns with space, bad")
            section.fail(f"{label}: rerun with space exit {again.code}, {found}", again)
        else:
            section.count("reruns with space, identical")


def place_workspace(disk: Disk, base: Path | None) -> Path:
    workspace = disk.place / "ws"
    if base is None:
        workspace.mkdir()
    else:
        shutil.copytree(base, workspace)
    return workspace


def check_message(section: Section, label: str, ended: Ended) -> None:
    clear = re.search(r"space|disk is full|the disk has", ended.text)
    section.count("tracebacks", ended.traceback)
    if ended.code == 1 and not ended.traceback and clear:
        section.count("clear error, exit 1")
    else:
        section.fail(f"{label}: exit {ended.code}, traceback {ended.traceback}", ended)


def check_old_files(
    section: Section, label: str, stage: str, workspace: Path, base: Path, ended: Ended
) -> None:
    """What was there before is as it was, but for what the stage may replace one by one."""
    changed, missing, _ = differences(workspace, base)
    if stage == "finetune":  # a run of other options begins anew: its own checkpoints go
        changed = [name for name in changed if not re.search("/(last|best)-|metrics", name)]
        missing = [name for name in missing if not re.search("/(last|best)-|metrics", name)]
    if stage == "zoo" and changed == ["zoo.json"]:
        changed = []
    if stage == "embed":  # donor by donor: those that are done are done
        changed = [name for name in changed if not embedding_is_whole(workspace / name)]
    if changed or missing:
        section.count("old artifacts changed")
        section.fail(f"{label}: changed {changed}, gone {missing}", ended)
    else:
        section.count("old artifacts intact")


def embedding_is_whole(path: Path) -> bool:
    record = path.with_suffix(".json")
    try:
        files = json.loads(record.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(file_sha256(record.parent / name) == digest for name, digest in files.items())


def check_litter(section: Section, label: str, workspace: Path, ended: Ended) -> None:
    if left := litter(workspace):
        section.count("litter")
        section.fail(f"{label}: left {left}", ended)


def check_readers(section: Section, label: str, workspace: Path) -> None:
    for reader in (["zoo", "list", "--json"], ["eval", "--json"]):
        ended = section.commands.forked(reader, workspace)
        if ended.code in (0, 4) and not ended.traceback:
            section.count("readers fine")
        else:
            section.fail(f"{label}: then {reader[0]} exits {ended.code}", ended)


def no_inodes(section: Section, stage: str) -> None:
    """Space for bytes, but not for one more file."""
    with section.disk(options=",nr_inodes=2000") as disk:
        workspace = place_workspace(disk, section.reference.before(stage))
        used = sum(1 for _ in disk.place.rglob("*")) + 1
        disk.remount(f"size=512m,nr_inodes={used}")
        ended = section.commands.forked(STAGES[stage], workspace)
        section.count("without inodes")
        if ended.code != 1 or ended.traceback or not re.search("space|disk", ended.text):
            told = f"exit {ended.code}, traceback {ended.traceback}"
            section.fail(f"{stage} without inodes: {told}", ended)
        disk.remount("size=512m,nr_inodes=4000")
        again = section.commands.forked(STAGES[stage], workspace)
        section.compare_rerun(stage, workspace, again, f"{stage} after inodes ran out")


def read_only_readers(section: Section) -> None:
    with section.disk("64m") as disk:
        workspace = place_workspace(disk, section.reference.after("finetune"))
        disk.remount("ro,size=64m")
        for args in READERS:
            ended = section.commands.forked(args, workspace)
            section.count("read-only readers")
            if ended.code or ended.traceback:
                section.fail(f"read-only workspace: {' '.join(args)}: exit {ended.code}", ended)
        ended = section.commands.load_assembly(workspace / "runs/default")
        if ended.code:
            section.fail("read-only workspace: load_assembly", ended)


def read_only_writer(section: Section, args: list[str]) -> None:
    """It may have nothing to do; else it says that it cannot write."""
    with section.disk("64m") as disk:
        workspace = place_workspace(disk, section.reference.after("finetune"))
        disk.remount("ro,size=64m")
        ended = section.commands.forked(args, workspace)
        section.count("read-only writers")
        section.count(f"read-only writers, exit {ended.code}")
        if ended.traceback or ended.code not in (0, 1):
            section.fail(f"read-only workspace: {' '.join(args)}: exit {ended.code}", ended)


def full_for_others(section: Section, kib: int) -> None:
    weights = demo_weights(section)
    large = ["zoo", "add", "demo/vit_avg", "--weights", str(weights), "--as", "big"]
    with section.disk("64m") as disk:
        workspace = place_workspace(disk, section.reference.after("finetune"))
        disk.remount(f"size={disk.used_kib + kib}k")
        for args in (*OTHERS, large):
            ended = section.commands.forked(args, workspace)
            label = f"{' '.join(args)} with {kib} KiB left"
            section.count("others")
            if ended.code == 0:
                section.count("others, enough space")
            elif ended.code != 1 or ended.traceback or not re.search("space|disk", ended.text):
                section.fail(f"{label}: exit {ended.code}, traceback {ended.traceback}", ended)
            else:
                section.count("others, clear error")
            check_litter(section, label, workspace, ended)
