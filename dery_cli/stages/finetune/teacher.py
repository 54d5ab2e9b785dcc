"""The teacher of a run: a whole donor with a closed-form head, the best of them, or a network.

Its head is fitted, and the best donor chosen, on the images that the student is trained on, never
on those that are held out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from dery_cli.core.stitching.head import NotFiniteError
from dery_cli.data.classes import class_difference
from dery_cli.data.samples import Split, choose_samples
from dery_cli.data.sets import DataSet
from dery_cli.errors import DeryError, UsageError
from dery_cli.io.artifacts import Workspace, read_record
from dery_cli.io.records import Artifact, json_sha256
from dery_cli.runtime.processes import Processes
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import check_name
from dery_cli.stages.finetune.splits import Splits
from dery_cli.stages.finetune.start import (
    Start,
    fit_donor,
)
from dery_cli.training.distill import Teacher
from dery_cli.types import Donor
from dery_cli.zoo.found import find_record, made_by
from dery_cli.zoo.networks import load_assembly
from dery_cli.zoo.registry import Zoo, require_zoo
from dery_cli.zoo.whole import WholeDonor

BEST = "best"
SAMPLES = 2048
"""Training images that heads of donors are fitted and compared on, as in ``assemble``."""

FOLDERS = ("runs", "assemblies")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherChoice:
    """Which teacher was asked for, before anything of it is loaded.

    Args:
        name: A donor, ``best``, ``runs/NAME`` or ``assemblies/NAME``.
        sha256: Of the donor's weights, of all donors' for ``best``, or of the network's record.
    """

    name: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedTeacher:
    """A teacher ready to be shown the student's images.

    Args:
        module: The network, which takes the student's images.
        name: Of the donor or the network; what ``best`` came to.
        sha256: Of the donor's weights or the network's record.
        accuracy: Cross-validated, of a donor's head; None for a network of the workspace.
    """

    module: Teacher
    name: str
    sha256: str
    accuracy: float | None

    @property
    def identity(self) -> str:
        """What a resumed run compares."""
        return f"{self.name} {self.sha256[:16]}"


def choose_teacher(
    workspace: Workspace, name: str, classes: Sequence[str], splits: Splits
) -> TeacherChoice:
    """Find the teacher that ``--teacher`` names.

    Raises:
        UsageError: No such donor or network, it tells other classes apart, or it was fitted on the
            images that the run holds out to choose on.
        StaleError: The zoo is empty.
    """
    folder, _, rest = name.partition("/")
    if rest and folder in FOLDERS:
        name = f"{folder}/{check_name(rest.rstrip('/'), 'teacher')}"
        return TeacherChoice(name=name, sha256=_check_network(workspace, name, classes, splits))
    zoo = require_zoo(workspace)
    if name == BEST:
        hashes = {donor.name: donor.weights_sha256 for donor in zoo.donors.values()}
        return TeacherChoice(name=name, sha256=json_sha256(hashes))
    return TeacherChoice(name=name, sha256=zoo[name].weights_sha256)


def _check_network(workspace: Workspace, name: str, classes: Sequence[str], splits: Splits) -> str:
    """The hash of a network of the workspace, if it may teach."""
    folder = workspace.root / name
    if not folder.is_dir():
        there = sorted(
            f"{kind}/{path.name}"
            for kind in FOLDERS
            for path in (workspace.root / kind).glob("*")
            if path.is_dir()
        )
        raise UsageError(
            f"there is no {name} in {workspace.root} to learn from",
            f"there are {', '.join(there)}" if there else "dery assemble",
        )
    path, kind = find_record(folder)
    hint = made_by(path, kind)
    record = read_record(path, kind, missing=f"there is no {path}", hint=hint)
    taught = record.data["network"]["classes"]
    if taught is None:
        raise UsageError(
            f"{name} has no head: it was made without labels", "--teacher with a donor's name"
        )
    if tuple(taught) != tuple(classes):
        raise UsageError(
            f"the teacher {name} tells other classes apart than the run: "
            f"{class_difference(taught, classes)}",
            "--teacher best, or a network made for these data",
        )
    if _knows_held_out(record, splits):
        raise UsageError(
            f"the teacher {name} was fitted on images that this run holds out to choose on",
            "--valid-fraction 0, or a teacher made with the same split and --seed",
        )
    return record.sha256


def _knows_held_out(record: Artifact, splits: Splits) -> bool:
    """Whether a network may have seen the images to choose on."""
    if splits.valid is None or record.data["target"] != splits.target:
        return False
    same = Split(**record.data["split"]) == splits.split
    return not same or record.data["fitted_on"] == "all"


def load_teacher(
    terminal: Terminal,
    processes: Processes,
    workspace: Workspace,
    choice: TeacherChoice,
    start: Start,
    data: DataSet,
    splits: Splits,
    *,
    seed: int,
    workers: int,
) -> LoadedTeacher:
    """Load the chosen teacher, fitting a donor's head; all processes call this together.

    Raises:
        DeryError: A donor's weights changed, or its features are not finite.
    """
    transform = start.assembly.transform
    if choice.name.partition("/")[0] in FOLDERS:
        assembly = load_assembly(workspace.root / choice.name)
        if assembly.record.sha256 != choice.sha256:
            raise DeryError(f"{choice.name} was replaced meanwhile", "rerun, to learn from it")
        module = Teacher(
            assembly.network, student=transform.input, teacher=assembly.transform.input
        )
        return LoadedTeacher(module=module, name=choice.name, sha256=choice.sha256, accuracy=None)
    zoo = require_zoo(workspace)
    indices = choose_samples(splits.kept, data.train.labels, SAMPLES, seed)

    def fitted(donor: Donor, advance: Callable[[int], None]) -> WholeDonor:
        return fit_donor(
            workspace,
            donor,
            data,
            indices,
            crop=transform.crop,
            device=processes.device,
            workers=workers,
            advance=advance,
        )

    whole: WholeDonor | None = None
    name = choice.name
    if name == BEST:
        if processes.main:
            whole = _best(terminal, zoo, len(indices), fitted)
        name = processes.share(None if whole is None else whole.donor.name)[0]
    if whole is None:
        with terminal.progress(f"fitting {name}", len(indices)) as bar:
            whole = fitted(zoo[name], bar.advance)
    terminal.say(
        f"teacher: {name}{f', the best of {len(zoo)} donors' if choice.name == BEST else ''}; "
        f"its probe is right on {whole.accuracy:.4f} of {len(indices)} training images "
        "(cross-validated)"
    )
    return LoadedTeacher(
        module=Teacher(whole.network, student=transform.input, teacher=whole.donor.input),
        name=name,
        sha256=whole.donor.weights_sha256,
        accuracy=whole.accuracy,
    )


def _best(
    terminal: Terminal,
    zoo: Zoo,
    images: int,
    fitted: Callable[[Donor, Callable[[int], None]], WholeDonor],
) -> WholeDonor:
    """The donor whose probe is most accurate; of equals the first by name."""
    best: WholeDonor | None = None
    with terminal.progress("comparing teachers", images * len(zoo)) as bar:
        for number, donor in enumerate(zoo.donors.values(), start=1):
            try:
                whole = fitted(donor, bar.advance)
            except NotFiniteError as error:
                terminal.warn(f"{error.message}: it cannot teach")
                bar.update(number * images)
                continue
            terminal.detail(f"{donor.name}: {whole.accuracy:.4f}")
            if best is None or whole.accuracy > best.accuracy:
                best = whole
    if best is None:
        raise DeryError("no donor of the zoo can teach", "dery zoo add SPEC")
    return best
