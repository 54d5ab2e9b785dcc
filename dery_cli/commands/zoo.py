"""``dery zoo``: register pretrained models, look at them, drop them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dery_cli.commands._options import Result, WorkspaceOption, command, open_workspace
from dery_cli.commands.check import check
from dery_cli.errors import DeryError, UsageError
from dery_cli.io.artifacts import file_sha256
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import check_name, show_count
from dery_cli.types import WEIGHTS_FOLDER, Donor, is_file_name
from dery_cli.zoo.manifest import ManifestEntry, load_manifest
from dery_cli.zoo.plugin import (
    ZOO_GROUP,
    BrokenPluginError,
    ZooPlugin,
    describe_plugins,
    find_plugin,
    list_models,
)
from dery_cli.zoo.registry import (
    default_name,
    parse_spec,
    plugin_sha256,
    prepare_donor,
    read_zoo,
    resolve,
    write_zoo,
)

zoo_app = typer.Typer(help="Register pretrained models as donors, look at them, drop them.")
zoo_app.command("check")(check)


@zoo_app.command("add")
@command
def add(
    terminal: Terminal,
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SPEC...", help="plugin/name[.tag], such as timm/resnet18.a1_in1k"),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Name in the zoo, for a single SPEC.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Local checkpoint for a single SPEC."),
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option(
            "--manifest", "-m", help="Add every model of this list: a TOML file, or demo."
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Input side in pixels; fixed from here on.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Load weights, or leave random.")
    ] = True,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Load of --weights what fits.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Fetch nothing; weights must be at hand.")
    ] = False,
    workspace: WorkspaceOption = None,
) -> Result:
    """Resolve, fetch, hash and dissect models, and register them as donors.

    Adding the same model again changes nothing. A donor's input size, and with it every grid, is
    fixed here. Of several models each is registered when it is done; one that fails is left out
    with a warning, and the exit code is 1 in the end. A model without a place to cut is registered
    with a warning and serves as a whole.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    entries = [ManifestEntry(spec=spec) for spec in specs or []]
    if (name or weights) and len(entries) != 1:
        raise UsageError("--as and --weights go with a single SPEC", f"got {len(entries)}")
    if entries:
        entries[0] = dataclasses.replace(entries[0], name=name, weights=weights)
    if manifest is not None:
        entries += load_manifest(manifest)
    if not entries:
        raise UsageError("nothing to add", "dery zoo add SPEC..., or dery zoo add --manifest demo")
    named = _named(entries)
    space = open_workspace(workspace)
    added: list[Donor] = []
    present: list[str] = []
    failed: dict[str, DeryError] = {}
    with space.lock(terminal.note):
        zoo = read_zoo(space)
        for donor_name, entry in named.items():
            zoo.check_free(donor_name, entry.spec)
        with terminal.progress("adding donors", len(named)) as progress:
            for donor_name, entry in named.items():
                try:
                    donor = _prepare(
                        donor_name,
                        entry,
                        terminal.warn,
                        image_size=image_size,
                        pretrained=pretrained,
                        allow_partial=allow_partial,
                    )
                except DeryError as error:
                    if len(named) == 1:
                        raise
                    hint = f" ({error.hint})" if error.hint else ""
                    terminal.warn(f"{donor_name} is left out: {error.message}{hint}")
                    failed[donor_name] = error
                    progress.advance()
                    continue
                if zoo.donors.get(donor.name) == donor:
                    present.append(donor.name)
                else:
                    zoo = zoo.with_donor(donor)
                    if donor.weights is not None:
                        _keep_copy(entry.weights, space.root / donor.weights)
                    write_zoo(space, zoo)
                    added.append(donor)
                progress.advance()
    _table(terminal, added)
    for donor_name in present:
        terminal.say(f"{donor_name} was there already")
    if failed:
        raise _summary(failed, len(named), [donor.name for donor in added])
    return {"added": [d.to_json() for d in added], "unchanged": present, "donors": zoo.names()}


def _named(entries: list[ManifestEntry]) -> dict[str, ManifestEntry]:
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


def _summary(failed: dict[str, DeryError], total: int, added: list[str]) -> DeryError:
    kind = UsageError if all(isinstance(e, UsageError) for e in failed.values()) else DeryError
    return kind(
        f"{len(failed)} of {total} models were not added: {', '.join(failed)}",
        "the warnings above say why; the same command goes on with those that are left",
        details={"failed": {name: e.message for name, e in failed.items()}, "added": added},
    )


def _prepare(
    name: str,
    entry: ManifestEntry,
    warn: Callable[[str], None],
    *,
    image_size: int | None,
    pretrained: bool,
    allow_partial: bool,
) -> Donor:
    side = entry.image_size or image_size
    if entry.weights is not None and not entry.weights.is_file():
        raise UsageError(f"no such weights file: {entry.weights}", entry.note)
    if entry.sha256 is not None and (pretrained or entry.weights is not None):
        _check_hash(entry, entry.sha256, warn)
    donor, _ = prepare_donor(
        entry.spec,
        name=name,
        image_size=None if side is None else (side, side),
        pretrained=pretrained,
        weights=entry.weights,
        allow_partial=allow_partial or entry.allow_partial,
        warn=warn,
    )
    known = {
        key: value
        for key in ("license", "task", "source")
        if (value := getattr(entry, key)) is not None
    }
    card = dataclasses.replace(donor.card, **known)
    kept = None
    if entry.weights is not None:
        kept = f"{WEIGHTS_FOLDER}/{donor.name}{_plain_suffix(entry.weights)}"
    return dataclasses.replace(donor, card=card, weights=kept)


def _plain_suffix(path: Path) -> str:
    """A file's suffix, where it may stand in a workspace's own file names."""
    return path.suffix if is_file_name(f"x{path.suffix}") else ""


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


def _keep_copy(source: Path | None, target: Path) -> None:
    """Copy a local checkpoint into the workspace: later stages do not depend on its place."""
    assert source is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(target.name + ".part")
    try:
        shutil.copyfile(source, half)
        half.replace(target)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise DeryError(f"cannot copy {source} to {target}: {error.strerror}") from error


def _row(donor: Donor) -> list[Any]:
    anatomy = donor.anatomy
    n = anatomy.num_units
    layouts = sorted({str(node.layout) for node in anatomy.nodes[1:-1]})
    return [
        donor.name,
        show_count(anatomy.params(0, n)),
        show_count(anatomy.flops(0, n)),
        n,
        "/".join(layouts) or "NC",
        "x".join(str(side) for side in donor.input.image_size),
        donor.card.task,
        donor.card.license,
    ]


def _table(terminal: Terminal, donors: list[Donor]) -> None:
    if donors:
        terminal.table(
            None,
            ["donor", "params", "multiply-adds", "units", "layout", "input", "task", "licence"],
            [_row(donor) for donor in donors],
        )


@zoo_app.command("list")
@command
def list_(terminal: Terminal, workspace: WorkspaceOption = None) -> Result:
    """List the donors of the zoo, without their classifiers' parameters."""
    zoo = read_zoo(open_workspace(workspace))
    if len(zoo) == 0:
        terminal.say("the zoo is empty; dery zoo add SPEC")
    _table(terminal, list(zoo.donors.values()))
    return {"donors": [donor.to_json() for donor in zoo.donors.values()]}


@zoo_app.command("show")
@command
def show(
    terminal: Terminal,
    name: Annotated[str, typer.Argument(metavar="DONOR")],
    workspace: WorkspaceOption = None,
) -> Result:
    """Show a donor's nodes, with layout, shape and the cost of the unit that ends there."""
    donor = read_zoo(open_workspace(workspace))[name]
    card = donor.card
    terminal.say(f"{donor.name}  ({donor.spec})", style="bold")
    terminal.say(f"task {card.task}; licence {card.license}; source {card.source}")
    terminal.say(f"weights sha256 {donor.weights_sha256}")
    terminal.table(
        None,
        ["node", "name", "layout", "shape", "prefix tokens", "params", "multiply-adds"],
        [
            [
                node.index,
                node.name,
                node.layout,
                "x".join(str(s) for s in node.shape),
                node.num_prefix_tokens,
                show_count(node.params),
                show_count(node.flops),
            ]
            for node in donor.anatomy.nodes
        ],
    )
    return {"donor": donor.to_json()}


@zoo_app.command("remove")
@command
def remove(
    terminal: Terminal,
    names: Annotated[list[str], typer.Argument(metavar="DONOR...")],
    workspace: WorkspaceOption = None,
) -> Result:
    """Drop donors and their embeddings; what was computed from them becomes stale."""
    space = open_workspace(workspace)
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
    terminal.say(f"removed {', '.join(donor.name for donor in gone)}; {len(zoo)} donors are left")
    return {"removed": [donor.name for donor in gone], "donors": zoo.names()}


@zoo_app.command("plugins")
@command
def plugins(
    terminal: Terminal,
    models: Annotated[
        str | None,
        typer.Option("--models", metavar="PLUGIN", help="List the models of this zoo plugin."),
    ] = None,
) -> Result:
    """List the plugins that give models and data, and what is wrong with the broken ones."""
    if models is not None:
        plugin = find_plugin(ZOO_GROUP, models, ZooPlugin, what="zoo plugin")
        names = list_models(models, plugin)
        for model in names:
            terminal.say(f"{models}/{model}")
        return {"plugin": models, "models": names}
    infos = describe_plugins()
    terminal.table(
        None,
        ["group", "name", "package", "version", "models", "state"],
        [
            [i.group, i.name, i.distribution, i.version, i.models, "broken" if i.error else "ok"]
            for i in infos
        ],
    )
    for info in infos:
        if info.error:
            terminal.warn(info.error)
    return {"plugins": [dataclasses.asdict(info) for info in infos]}
