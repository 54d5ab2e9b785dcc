"""The zoo stage: models become donors of a workspace, and cease to be."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dery_cli.errors import DeryError, UsageError
from dery_cli.io.artifacts import Workspace
from dery_cli.io.files import PART, PENDING, file_sha256, not_written, sync
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import check_name
from dery_cli.stages.zoo.config import AddConfig
from dery_cli.types import WEIGHTS_FOLDER, Donor, is_file_name
from dery_cli.zoo.manifest import ManifestEntry, load_manifest
from dery_cli.zoo.plugin import BrokenPluginError
from dery_cli.zoo.registry import (
    Zoo,
    default_name,
    parse_spec,
    plugin_sha256,
    prepare_donor,
    read_zoo,
    resolve,
    write_zoo,
)

_LONGEST_SUFFIX = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Added:
    """What adding models came to.

    Args:
        donors: The new ones.
        unchanged: Names of those that were there already.
        failed: Why each other was not added.
        zoo: Names of all donors now.
    """

    donors: list[Donor]
    unchanged: list[str]
    failed: dict[str, DeryError]
    zoo: list[str]

    def failure(self) -> DeryError | None:
        """The error that sums up ``failed``, or None."""
        if not self.failed:
            return None
        ours = all(isinstance(error, UsageError) for error in self.failed.values())
        total = len(self.donors) + len(self.unchanged) + len(self.failed)
        return (UsageError if ours else DeryError)(
            f"{len(self.failed)} of {total} models were not added: {', '.join(self.failed)}",
            "the warnings above say why; the same command goes on with those that are left",
            details={
                "failed": {name: error.message for name, error in self.failed.items()},
                "added": [donor.name for donor in self.donors],
            },
        )


def add_donors(terminal: Terminal, space: Workspace, config: AddConfig) -> Added:
    """Resolve, fetch, hash and dissect models; each is registered when it is done.

    Of several models those that fail are left out with a warning.

    Raises:
        UsageError: A spec or name is wrong, which is seen before anything is fetched.
        DeryError: The only model cannot be added.
    """
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    named = _named(_entries(config))
    donors: list[Donor] = []
    unchanged: list[str] = []
    failed: dict[str, DeryError] = {}
    with space.lock(terminal.note):
        zoo = _present(terminal, space)
        for name, entry in named.items():
            zoo.check_free(name, entry.spec)
        with terminal.progress("adding donors", len(named)) as progress:
            for name, entry in named.items():
                try:
                    donor = _prepare(name, entry, config, terminal.warn)
                except DeryError as error:
                    if len(named) == 1:
                        raise
                    hint = f" ({error.hint})" if error.hint else ""
                    terminal.warn(f"{name} is left out: {error.message}{hint}")
                    failed[name] = error
                else:
                    if zoo.donors.get(donor.name) == donor:
                        unchanged.append(donor.name)
                    else:
                        _tell_twins(zoo, donor, terminal.warn)
                        zoo = _register(space, zoo, donor, entry)
                        donors.append(donor)
                progress.advance()
    return Added(donors=donors, unchanged=unchanged, failed=failed, zoo=zoo.names())


def _present(terminal: Terminal, space: Workspace) -> Zoo:
    """The zoo that is added to; one whose record cannot be read is begun anew, which is said."""
    try:
        return read_zoo(space)
    except DeryError as error:
        terminal.warn(f"{error.message}: the zoo is begun anew; donors it had have to be added too")
        return Zoo([])


def _entries(config: AddConfig) -> list[ManifestEntry]:
    entries = [
        ManifestEntry(
            spec=spec,
            name=config.name,
            weights=config.weights,
            weights_key=config.weights_key,
            license=config.license,
            task=config.task,
            source=config.source,
        )
        for spec in config.specs
    ]
    return entries if config.manifest is None else entries + load_manifest(config.manifest)


def _named(entries: Sequence[ManifestEntry]) -> dict[str, ManifestEntry]:
    """The entries by the donor's name; says what is wrong with any before the first is fetched."""
    named: dict[str, ManifestEntry] = {}
    for entry in entries:
        spec = parse_spec(entry.spec)
        name = check_name(entry.name or default_name(spec), "donor")
        if name in named:
            raise UsageError(
                f"two of the models would be named '{name}': {named[name].spec} and {entry.spec}",
                "give one of them a name, with --as NAME or in the manifest",
            )
        named[name] = entry
        # a broken plugin is its own models' failure alone, and is met again there
        with contextlib.suppress(*(() if len(entries) == 1 else (BrokenPluginError,))):
            resolve(spec)
    return named


def _prepare(
    name: str, entry: ManifestEntry, config: AddConfig, warn: Callable[[str], None]
) -> Donor:
    side = entry.image_size or config.image_size
    if entry.weights is not None and not entry.weights.is_file():
        raise UsageError(f"no such weights file: {entry.weights}", entry.note)
    if entry.sha256 is not None and (config.pretrained or entry.weights is not None):
        _check_hash(entry, entry.sha256, warn)
    donor, _ = prepare_donor(
        entry.spec,
        name=name,
        image_size=None if side is None else (side, side),
        pretrained=config.pretrained,
        weights=entry.weights,
        weights_key=entry.weights_key,
        allow_partial=config.allow_partial or entry.allow_partial,
        warn=warn,
    )
    known = {
        key: value
        for key in ("license", "task", "source")
        if (value := getattr(entry, key)) is not None
    }
    kept = None
    if entry.weights is not None:
        suffix = ".safetensors" if entry.weights_key else _plain_suffix(entry.weights)
        kept = f"{WEIGHTS_FOLDER}/{donor.name}{suffix}"
    return dataclasses.replace(donor, card=dataclasses.replace(donor.card, **known), weights=kept)


def _tell_twins(zoo: Zoo, donor: Donor, warn: Callable[[str], None]) -> None:
    """Say that a donor is there already under another name: it adds nothing but a copy."""
    for other in zoo.donors.values():
        same = other.weights_sha256 == donor.weights_sha256 and other.anatomy == donor.anatomy
        if same and other.name != donor.name:
            warn(f"{donor.name} has the same weights as {other.name}; one of the two is enough")
            return


def _plain_suffix(path: Path) -> str:
    """A file's suffix, where it may stand in a workspace's own file names."""
    plain = is_file_name(f"x{path.suffix}") and len(path.suffix) <= _LONGEST_SUFFIX
    return path.suffix if plain and path.suffix not in (PART, PENDING) else ""


def _check_hash(entry: ManifestEntry, wanted: str, warn: Callable[[str], None]) -> None:
    """Compare the manifest's sha256 with that of the weights file, or of the plugin's own."""
    if entry.weights is not None:
        what, actual = entry.weights.name, file_sha256(entry.weights)
    else:
        what, found = f"the weights of {entry.spec}", plugin_sha256(parse_spec(entry.spec))
        if found is None:
            warn(f"the sha256 of {what} is not checked: its plugin does not tell it")
            return
        actual = found
    if actual != wanted:
        raise DeryError(
            f"{what}: sha256 is {actual[:12]}, the manifest says {wanted[:12]}",
            "fetch the file again, or correct the manifest",
        )


def _register(space: Workspace, zoo: Zoo, donor: Donor, entry: ManifestEntry) -> Zoo:
    """Write the zoo with one more donor, and its local checkpoint, if it has one, beside it."""
    zoo = zoo.with_donor(donor)
    if entry.weights is not None and donor.weights is not None:
        _keep_copy(entry.weights, entry.weights_key, space.root / donor.weights)
    write_zoo(space, zoo)
    return zoo


def _keep_copy(source: Path, key: str | None, target: Path) -> None:
    """Copy a local checkpoint into the workspace: later stages do not depend on its place.

    Where a key chose one of several state dicts, that one alone is kept.
    """
    half = target.with_name(target.name + PART)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if key is None:
            shutil.copyfile(source, half)
        else:
            from dery_cli.io.row_stream import write_tensors
            from dery_cli.zoo.checkpoints import read_checkpoint

            write_tensors(half, read_checkpoint(source, key).tensors)
        sync(half)
        half.replace(target)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise not_written(target, error) from error


def remove_donors(
    terminal: Terminal, space: Workspace, names: Sequence[str]
) -> tuple[list[Donor], Zoo]:
    """Drop donors with their embeddings and checkpoints.

    Returns:
        Those that are gone, in the order asked for, and the zoo that is left.

    Raises:
        UsageError: There is no donor of that name; nothing is dropped then.
    """
    with space.lock(terminal.note):
        zoo = read_zoo(space)
        gone = [zoo[name] for name in dict.fromkeys(names)]
        for donor in gone:
            zoo = zoo.without(donor.name)
        write_zoo(space, zoo)
        for donor in gone:
            space.remove(space.embedding(donor.name), [f"{donor.name}.safetensors"])
            if donor.weights is not None:
                (space.root / donor.weights).unlink(missing_ok=True)
    return gone, zoo
