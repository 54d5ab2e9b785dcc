"""``dery zoo``: register pretrained models, look at them, drop them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dery_cli.commands import _completion
from dery_cli.commands._options import Result, WorkspaceOption, command, open_workspace
from dery_cli.commands._tables import (
    COST_COLUMNS,
    NODE_COLUMNS,
    cost_cells,
    node_cells,
    whole_cost_cells,
)
from dery_cli.commands.check import check
from dery_cli.commands.rank import rank
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_shape
from dery_cli.stages.zoo.config import AddConfig
from dery_cli.stages.zoo.run import add_donors, remove_donors
from dery_cli.types import Donor
from dery_cli.zoo.plugin import ZOO_GROUP, ZooPlugin, describe_plugins, find_plugin, list_models
from dery_cli.zoo.registry import read_zoo

zoo_app = typer.Typer(help="Register pretrained models as donors, look at them, drop them.")
zoo_app.command("check")(check)
zoo_app.command("rank")(rank)


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
    weights_key: Annotated[
        str | None,
        typer.Option(
            "--weights-key",
            metavar="KEY",
            help="Which state dict of that file, as model or ema.module; by default EMA's.",
        ),
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", metavar="TEXT", help="Licence of the weights of a single SPEC."),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TEXT", help="What they were trained on.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", metavar="TEXT", help="Where they come from.")
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
    with a warning and serves as a whole. Of weights from --weights or --no-pretrained, licence,
    task and source are unknown unless they are told.

    For example: dery zoo add timm/resnet18.a1_in1k --image-size 160
    """
    config = AddConfig(
        specs=tuple(specs or ()),
        name=name,
        weights=weights,
        weights_key=weights_key,
        license=license_,
        task=task,
        source=source,
        manifest=manifest,
        image_size=image_size,
        pretrained=pretrained,
        allow_partial=allow_partial,
        offline=offline,
    )
    found = add_donors(terminal, open_workspace(workspace), config)
    _table(terminal, found.donors)
    for donor_name in found.unchanged:
        terminal.say(f"{donor_name} was there already")
    if (failure := found.failure()) is not None:
        raise failure
    return {
        "added": [donor.to_json() for donor in found.donors],
        "unchanged": found.unchanged,
        "donors": found.zoo,
    }


def _table(terminal: Terminal, donors: Sequence[Donor]) -> None:
    if donors:
        terminal.table(
            None,
            ["donor", *COST_COLUMNS, "units", "layout", "input", "task", "licence"],
            [_row(donor) for donor in donors],
        )


def _row(donor: Donor) -> list[object]:
    layouts = sorted({str(node.layout) for node in donor.anatomy.nodes[1:-1]})
    return [
        donor.name,
        *whole_cost_cells(donor.anatomy),
        donor.anatomy.num_units,
        "/".join(layouts) or "NC",
        show_shape(donor.input.image_size),
        donor.card.task,
        donor.card.license,
    ]


@zoo_app.command("list")
@command
def list_(terminal: Terminal, workspace: WorkspaceOption = None) -> Result:
    """List the donors of the zoo, without their classifiers' parameters.

    For example: dery zoo list --json
    """
    zoo = read_zoo(open_workspace(workspace))
    if len(zoo) == 0:
        terminal.say("the zoo is empty; dery zoo add SPEC")
    _table(terminal, list(zoo.donors.values()))
    return {"donors": [donor.to_json() for donor in zoo.donors.values()]}


@zoo_app.command("show")
@command
def show(
    terminal: Terminal,
    name: Annotated[str, typer.Argument(metavar="DONOR", autocompletion=_completion.donors)],
    workspace: WorkspaceOption = None,
) -> Result:
    """Show a donor's nodes, with layout, shape and the cost of the unit that ends there.

    For example: dery zoo show resnet18
    """
    donor = read_zoo(open_workspace(workspace))[name]
    card = donor.card
    terminal.say(f"{donor.name}  ({donor.spec})", style="bold")
    terminal.say(f"task {card.task}; licence {card.license}; source {card.source}")
    terminal.say(f"weights sha256 {donor.weights_sha256}")
    terminal.table(
        None,
        [*NODE_COLUMNS, "prefix tokens", *COST_COLUMNS],
        [
            [*node_cells(node), node.num_prefix_tokens, *cost_cells(node.params, node.flops)]
            for node in donor.anatomy.nodes
        ],
    )
    return {"donor": donor.to_json()}


@zoo_app.command("remove")
@command
def remove(
    terminal: Terminal,
    names: Annotated[
        list[str], typer.Argument(metavar="DONOR...", autocompletion=_completion.donors)
    ],
    workspace: WorkspaceOption = None,
) -> Result:
    """Drop donors and their embeddings; what was computed from them becomes stale.

    For example: dery zoo remove resnet18
    """
    gone, zoo = remove_donors(terminal, open_workspace(workspace), names)
    removed = [donor.name for donor in gone]
    terminal.say(f"removed {', '.join(removed)}; {len(zoo)} donors are left")
    return {"removed": removed, "donors": zoo.names()}


@zoo_app.command("plugins")
@command
def plugins(
    terminal: Terminal,
    models: Annotated[
        str | None,
        typer.Option(
            "--models",
            metavar="PLUGIN",
            help="List the models of this zoo plugin.",
            autocompletion=_completion.zoo_plugins,
        ),
    ] = None,
) -> Result:
    """List the plugins: models, data, metrics and proxies, and what is wrong with the broken.

    For example: dery zoo plugins --models lite
    """
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
