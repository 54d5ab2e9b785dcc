"""Options of ``dery push``, and the network that they name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from dery_cli.errors import UsageError
from dery_cli.io.artifacts import Workspace, is_there

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Options of ``dery push``.

    Args:
        repo: ``OWNER/REPO`` on the Hugging Face hub.
        private: Make a new repository private; None for the owner's default.
        revision: Branch to push to; None for ``main``.
        dry_run: Write the files, show them, send nothing.
    """

    repo: str
    private: bool | None = None
    revision: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if _REPO.fullmatch(self.repo) is None:
            raise UsageError(f"'{self.repo}' is not OWNER/REPO", "dery push default me/my-network")
        if self.revision is not None and not self.revision.strip():
            raise UsageError("--revision is empty", "a branch, or leave it out")


def find_pushed(space: Workspace, what: str) -> Path:
    """The folder of the network: a run or else an assembly of this name, or a folder.

    Raises:
        UsageError: There is none.
    """
    for path in (space.root / "runs" / what, space.root / "assemblies" / what, space.root / what):
        if is_there(path / "run.json") or is_there(path / "assembly.json"):
            return path
    if Path(what).is_dir():
        return Path(what)
    raise UsageError(
        f"no such run or assembly: {what}",
        "give a NAME, runs/NAME, assemblies/NAME or a folder",
    )
