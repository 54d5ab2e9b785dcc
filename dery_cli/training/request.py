"""What a user asks of ``dery finetune`` beside how to train; checked before the heavy imports."""

from __future__ import annotations

import dataclasses
import importlib.util

from dery_cli.errors import UsageError
from dery_cli.sizes import check_between, check_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneRequest:
    """What a run starts from, which images it gets, who teaches it, and what it is called.

    Args:
        assembly: Name of the assembly to start from.
        donor: Whole donor to start from instead, or None.
        scratch: Start from the assembly's architecture with random weights.
        data: Data spec; None for the assembly's.
        skip_bad: Leave broken images out.
        valid_fraction: Share of the training images to choose on; None leaves it to their number.
        teacher: What to learn from: a donor, ``best``, ``runs/NAME`` or ``assemblies/NAME``.
        name: Of the run; None for that of the donor or assembly.
        resume: Go on from the last checkpoint.
        tensorboard: Write the curves for TensorBoard.

    Raises:
        UsageError: Two of these exclude each other, or a value is out of its range.
    """

    assembly: str = "default"
    donor: str | None = None
    scratch: bool = False
    data: str | None = None
    skip_bad: bool = False
    valid_fraction: float | None = None
    teacher: str | None = None
    name: str | None = None
    resume: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.valid_fraction is not None:
            check_between("--valid-fraction", self.valid_fraction, 0, 1, below=True)
        if self.donor is not None and self.scratch:
            raise UsageError("--donor and --scratch exclude each other")
        if self.donor is not None and self.data is None:
            raise UsageError(
                "--donor needs --data: which images?",
                f"dery finetune --donor {self.donor} --data SPEC",
            )
        check_name(self.run_name, "run")
        if self.teacher == f"runs/{self.run_name}":
            raise UsageError(
                f"the run '{self.run_name}' cannot be its own teacher", "give another --name"
            )
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError(
                "--tensorboard needs the package tensorboard",
                "pip install 'dery-cli[tensorboard]'",
            )

    @property
    def run_name(self) -> str:
        """What the run is called."""
        return self.name or self.donor or self.assembly


def check_distillation(teacher: str | None, logits: float, features: float, given: bool) -> None:
    """Refuse distillation without a teacher, and a teacher without distillation.

    Args:
        teacher: Of ``--teacher``.
        logits: Weight of its logits.
        features: Weight of its features.
        given: Whether any option of distillation was.

    Raises:
        UsageError: One is there without the other.
    """
    if teacher is None and given:
        raise UsageError(
            "--distill-logits, --distill-features and --distill-temperature need a teacher",
            "add --teacher best, or a donor's name",
        )
    if teacher is not None and not (logits or features):
        raise UsageError(
            "--teacher with --distill-logits 0 and --distill-features 0 teaches nothing",
            "leave one of them above 0",
        )


def check_search(lr: float | None, effort: float | None) -> None:
    """Refuse a rate together with an allowance to search for one.

    Raises:
        UsageError: Both are there.
    """
    if lr is not None and effort:
        raise UsageError(
            "--lr and --effort exclude each other: a rate that is given is not searched for",
            "leave out one of them",
        )
