"""The push stage: a network as a folder that timm and ``load_assembly`` read, sent to the hub."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from dery_cli.io.files import file_sha256
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.push.config import PushConfig
from dery_cli.zoo.hub import check_repo, send
from dery_cli.zoo.licences import licence_conflicts
from dery_cli.zoo.networks import load_assembly
from dery_cli.zoo.timm_folder import CARD_FILE, write_timm_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was sent, or would be.

    Args:
        files: (name, bytes, sha256) of each.
        card: The model card.
        conflicts: What speaks against passing the network on.
        url: Of the commit; None where nothing was sent.
    """

    files: list[tuple[str, int, str]]
    card: str
    conflicts: list[str]
    url: str | None


def push(terminal: Terminal, source: Path, config: PushConfig) -> Pushed:
    """Write the folder, and send it unless it is a dry run.

    Raises:
        UsageError: The repository's name is none.
        DeryError: The network is damaged, or the hub is out of reach.
    """
    check_repo(config.repo)
    assembly = load_assembly(source)
    licences = [block["license"] for block in assembly.record.data["network"]["blocks"]]
    conflicts = licence_conflicts(licences)
    for conflict in conflicts:
        terminal.warn(f"licences: {conflict}")
    name = config.repo.partition("/")[2]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        files = write_timm_folder(assembly, folder, name=name, repo=config.repo)
        listed = [(file.name, file.stat().st_size, file_sha256(file)) for file in files]
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        url = None
        if not config.dry_run:
            url = send(
                folder,
                config.repo,
                private=config.private,
                revision=config.revision,
                message=f"{name}: assembled by dery",
            )
    return Pushed(files=listed, card=card, conflicts=conflicts, url=url)
