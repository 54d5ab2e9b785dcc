"""Options of ``dery eval``, and the folder that they name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from dery_cli.errors import StaleError, UsageError
from dery_cli.io.artifacts import Workspace, is_there
from dery_cli.sizes import check_at_least, check_one_of
from dery_cli.types import is_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of ``dery eval``.

    Args:
        data: Data spec; None for what the network was made for.
        skip_bad: Leave out images that cannot be decoded.
        split: ``test`` or ``train``.
        batch_size: Images a batch.
    """

    data: str | None = None
    skip_bad: bool = False
    split: str = "test"
    batch_size: int = 256
    device: str | None = None
    workers: int = 0

    SPLITS: ClassVar[tuple[str, ...]] = ("test", "train")

    def __post_init__(self) -> None:
        check_one_of("--split", self.split, self.SPLITS)
        check_at_least("--batch-size", self.batch_size)


def find_network(space: Workspace, what: str | None) -> Path:
    """The folder of the network that is asked for.

    Raises:
        StaleError: Nothing was asked for, and there is no ``default``.
        UsageError: No such network.
    """
    if what is None:
        for path in (space.run("default"), space.assembly("default").parent):
            if is_there(path / "run.json") or is_there(path / "assembly.json"):
                return path
        raise StaleError(f"no run or assembly 'default' in {space.root}", "dery assemble")
    places = [Path(what), space.root / what]
    if is_name(what):
        places += [space.run(what), space.assembly(what).parent]
    for path in places:
        if path.is_dir():
            return path
    raise UsageError(
        f"no such run or assembly: {what}", "give runs/NAME, assemblies/NAME or a folder"
    )
