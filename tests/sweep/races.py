"""Two writers at once: of the same stage, of different ones, and of a donor that is removed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from tests.sweep.commands import Ended
from tests.sweep.harness import Case, Section
from tests.sweep.reference import (
    ORDER,
    OTHER_OPTIONS,
    STAGES,
    differences,
    files_of,
    is_log,
    litter,
)

PAIRS = (
    (STAGES["embed"], OTHER_OPTIONS["embed"]),
    (STAGES["embed"], ["sim"]),
    (OTHER_OPTIONS["sim"], STAGES["partition"]),
    (OTHER_OPTIONS["embed"], STAGES["partition"]),
    (OTHER_OPTIONS["partition"], STAGES["assemble"]),
    (OTHER_OPTIONS["assemble"], STAGES["finetune"]),
)
SECONDS = 240
REMOVED = "demo__resnext"


def cases(section: Section) -> Iterator[Case]:
    for stage in ORDER:
        for offset, share in ((0.0, 0.0), (0.02, 0.0), (0.0, 0.3), (0.0, 0.6)):
            run = partial(same_stage, section, stage, offset, share)
            yield Case(f"two of {stage}, {offset} s and {share:.0%} apart", run)
    for one, other in PAIRS:
        for offset in (0.0, 1.5):
            run = partial(different_stages, section, one, other, offset)
            yield Case(f"{' '.join(one)} | {' '.join(other)} {offset} s later", run)
    for before, stage in pairwise(ORDER):
        for share in (0.0, 0.3, 0.5, 0.7):
            run = partial(remove_donor, section, before, stage, share)
            yield Case(f"zoo remove during {stage} at {share:.0%}", run)


def both(
    section: Section, workspace: Path, one: Sequence[str], other: Sequence[str], offset: float
) -> tuple[Ended, Ended]:
    """Two commands, the second so many seconds after the first."""
    first = section.commands.start(one, workspace)
    time.sleep(offset)
    second = section.commands.start(other, workspace)
    return first.finish(SECONDS), second.finish(SECONDS)


def same_stage(section: Section, stage: str, offset: float, share: float) -> None:
    """Both succeed, or the second fine-tuning is refused; what they leave is as always."""
    offset += share * section.reference.seconds[stage]
    with section.workspace(section.reference.before(stage)) as workspace:
        pair = both(section, workspace, STAGES[stage], STAGES[stage], offset)
        section.count("pairs")
        codes = [ended.code for ended in pair]
        allowed = {0, 1} if stage == "finetune" else {0}
        good = set(codes) <= allowed and 0 in codes and not any(e.traceback for e in pair)
        for ended in pair:
            if stage == "finetune" and ended.code == 1:
                section.count("fine-tunings refused")
                good = good and "another process is fine-tuning" in ended.stderr
        found = differences(workspace, section.reference.after(stage))
        if good and not any(found):
            section.count("pairs fine")
        else:
            what = f"two of {stage}, {offset:.2f} s apart: exits {codes}, {found}"
            section.fail(what, pair[0] if pair[0].code else pair[1])


def different_stages(
    section: Section, one: Sequence[str], other: Sequence[str], offset: float
) -> None:
    with section.workspace(section.reference.after("assemble")) as workspace:
        section.count("different")
        for ended in both(section, workspace, one, other, offset):
            section.count(f"different, exit {ended.code}")
            if ended.traceback or ended.code not in (0, 4):
                lines = f"{' '.join(one)} | {' '.join(other)} {offset} s later"
                section.fail(f"{lines}: exit {ended.code}", ended)


def remove_donor(section: Section, before: str, stage: str, share: float) -> None:
    """The donor is gone afterwards with its embedding, and the chain can go on."""
    label = f"zoo remove during {stage} at {share:.0%}"
    removal = ["zoo", "remove", REMOVED]
    with section.workspace(section.reference.after(before)) as workspace:
        offset = share * section.reference.seconds[stage]
        made, removed = both(section, workspace, STAGES[stage], removal, offset)
        section.count("removals")
        codes = f"exits {made.code} {removed.code}"
        section.count(f"removal during {stage}: {codes}")
        tracebacks = made.traceback or removed.traceback
        if tracebacks or removed.code != 0 or made.code not in (0, 4):
            section.fail(f"{label}: {codes}", made if made.code or made.traceback else removed)
        check_removed(section, label, workspace, made)
        for following in ("embed", "sim", "partition"):
            ended = section.commands.forked(STAGES[following], workspace)
            if ended.code or ended.traceback:
                section.fail(f"{label}: then {following} exits {ended.code}", ended)
                break
        if left := litter(workspace):
            section.fail(f"{label}: litter {left}")


def check_removed(section: Section, label: str, workspace: Path, ended: Ended) -> None:
    donors = json.loads((workspace / "zoo.json").read_text())["data"]["donors"]
    names = [donor["name"] for donor in donors]
    prefix = f"embeddings/{REMOVED}"
    left = [name for name in files_of(workspace) if name.startswith(prefix) and not is_log(name)]
    if REMOVED in names or left:
        section.count("removed donors left")
        section.fail(f"{label}: afterwards donors {names}, files {left}", ended)
