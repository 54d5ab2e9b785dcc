"""``dery assemble``: the best network of the zoo's parts that fits a budget (Eq. 8-11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dery_cli.commands._options import (
    DataOption,
    DeviceOption,
    Result,
    SeedOption,
    SkipBadOption,
    WorkersOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.commands._tables import COST_COLUMNS, cost_cells
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import parse_size, parse_time, show_count, show_decimals, show_time
from dery_cli.stages.assemble.config import FINALISTS, AssembleConfig, Budget, DonorFilter

if TYPE_CHECKING:
    from dery_cli.stages.assemble.run import Assembled, Frontier

NETWORK_COLUMN = "network: donor[first node:last node]"


@command
def assemble(
    terminal: Terminal,
    max_params: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="At most so many parameters: 30M, 800k."),
    ] = None,
    min_params: Annotated[
        str | None, typer.Option(metavar="SIZE", help="At least so many parameters.")
    ] = None,
    max_flops: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="At most so many multiply-adds an image: 5G."),
    ] = None,
    min_flops: Annotated[
        str | None, typer.Option(metavar="SIZE", help="At least so many multiply-adds.")
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="At most so long a batch, on this device: 8ms, 800us, 0.5s. Blocks and stitches "
            "are timed once and the times kept.",
        ),
    ] = None,
    latency_batch: Annotated[
        int, typer.Option("--latency-batch", help="Images a batch that --max-latency is for.")
    ] = AssembleConfig.latency_batch,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="At most so many bytes for inference: 200M. Weights, plus the most activations "
            "that live at once within any one block.",
        ),
    ] = None,
    memory_batch: Annotated[
        int, typer.Option("--memory-batch", help="Images a batch that --max-memory is for.")
    ] = AssembleConfig.memory_batch,
    license_: Annotated[
        list[str] | None,
        typer.Option("--license", help="Use donors under this licence only; may be repeated."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Use these donors only; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Leave this donor out; may be repeated.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Use donors registered at this side only.")
    ] = None,
    max_donors: Annotated[
        int | None, typer.Option("--max-donors", help="Take blocks of at most so many donors.")
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto",
            help="Print the frontier over params and multiply-adds instead; over latency too "
            "where --max-latency is given.",
        ),
    ] = False,
    require_optimal: Annotated[
        bool, typer.Option("--require-optimal", help="Exit 1 unless the program's best is proven.")
    ] = False,
    data: DataOption = None,
    skip_bad: SkipBadOption = False,
    name: Annotated[str, typer.Option("--name", help="Name of the assembly.")] = "default",
    candidates: Annotated[
        int,
        typer.Option("--candidates", "-n", help="Best of the program that are built and scored."),
    ] = AssembleConfig.candidates,
    proxy: Annotated[
        str | None,
        typer.Option("--proxy", help="Score of those built: probe (needs labels), naswot, params."),
    ] = None,
    finalists: Annotated[
        int | None,
        typer.Option(
            "--finalists",
            help="Best by the proxy that are tried as they would be delivered, on labelled target "
            "images they were not made on, which decides; with 0 the proxy does. By default "
            f"{FINALISTS} with probe, 0 with another proxy.",
        ),
    ] = None,
    joint_weight: Annotated[
        float,
        typer.Option(
            "--joint-weight", help="Weight of the joints' log R2 beside the blocks' gains."
        ),
    ] = AssembleConfig.joint_weight,
    stitch: Annotated[
        str,
        typer.Option(
            "--stitch",
            help="Layer between blocks of different donors: linear (1x1 convolution), mlp (two of "
            "them), or paper (batch norm, convolution, LeakyReLU with random weights, to train).",
        ),
    ] = AssembleConfig.stitch,
    match: Annotated[
        bool,
        typer.Option(
            "--match",
            help="Train the stitches, without labels, to give the features of the last donor.",
        ),
    ] = False,
    whole: Annotated[
        bool, typer.Option("--whole/--no-whole", help="Let whole models of the zoo compete.")
    ] = True,
    fit_samples: Annotated[
        int, typer.Option("--fit-samples", help="Target images that stitches are fitted on.")
    ] = AssembleConfig.fit_samples,
    target_samples: Annotated[
        int, typer.Option("--target-samples", help="Target images for probes and the head.")
    ] = AssembleConfig.target_samples,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Stop the search after this time.")
    ] = None,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
) -> Result:
    """Choose one block per stage and set within the budget, join them, and fit what joins them.

    An integer program ranks the assemblies by what its blocks gain for the target and how well
    their joints fit; the best of them, and the whole models within the budget, are built and ranked
    by a training-free proxy; the first of these are made on a part of the target's training images
    and tried on the rest, which decides. The result works untrained.
    """
    config = AssembleConfig(
        budget=Budget(
            max_params=_size(max_params, "--max-params"),
            min_params=_size(min_params, "--min-params"),
            max_flops=_size(max_flops, "--max-flops"),
            min_flops=_size(min_flops, "--min-flops"),
            max_latency=None if max_latency is None else parse_time(max_latency, "--max-latency"),
            max_memory=_size(max_memory, "--max-memory"),
        ),
        donors=DonorFilter(
            licenses=tuple(license_ or ()),
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            image_size=image_size,
        ),
        max_donors=max_donors,
        latency_batch=latency_batch,
        memory_batch=memory_batch,
        data=data,
        skip_bad=skip_bad,
        name=name,
        candidates=candidates,
        finalists=finalists,
        proxy=proxy,
        joint_weight=joint_weight,
        stitch=stitch,
        match=match,
        whole=whole,
        fit_samples=fit_samples,
        target_samples=target_samples,
        max_seconds=max_seconds,
        seed=seed,
        require_optimal=require_optimal,
        device=device,
        workers=workers,
    )
    from dery_cli.stages.assemble.run import assemble_network, trace_frontier

    space = open_workspace(workspace)
    if pareto:
        frontier = trace_frontier(terminal, space, config)
        _show_frontier(terminal, frontier, config)
        return {
            "frontier": frontier.points,
            "complete": frontier.complete,
            "file": str(frontier.file),
        }
    found = assemble_network(terminal, space, config)
    _show_comparison(terminal, found.record.data)
    _show_remarks(terminal, found)
    terminal.say(f"assembly '{name}' is in {found.folder}")
    return {
        "assembly": name,
        "folder": str(found.folder),
        **found.record.data,
        "latency": found.latency,
    }


def _size(text: str | None, option: str) -> int | None:
    return None if text is None else parse_size(text, option)


def _show_frontier(terminal: Terminal, frontier: Frontier, config: AssembleConfig) -> None:
    timed = config.budget.max_latency is not None
    terminal.table(
        f"frontier within {config.budget}",
        ["score", *COST_COLUMNS, *(["latency"] if timed else []), NETWORK_COLUMN],
        [
            [
                show_decimals(p["score"]),
                *cost_cells(p["params"], p["flops"]),
                *([show_time(p["latency_ns"])] if timed else []),
                p["network"],
            ]
            for p in frontier.points
        ],
    )
    if not frontier.complete:
        terminal.say(
            f"the {len(frontier.points)} shown are spread over the budgets; there are more"
        )
    terminal.say(f"written to {frontier.file}")


def _show_comparison(terminal: Terminal, data: Mapping[str, Any]) -> None:
    timed = data["latency_ns"] is not None
    counted = data["memory_bytes"] is not None
    tried = data["held_out"] is not None
    terminal.table(
        f"within {data['budget']}",
        [
            "",
            NETWORK_COLUMN,
            *COST_COLUMNS,
            *(["latency"] if timed else []),
            *(["memory"] if counted else []),
            data["proxy"]["name"],
            *(["held out"] if tried else []),
            "joint R2",
            "test top-1 untrained",
        ],
        [
            [
                row["role"],
                row["network"],
                *cost_cells(row["params"], row["flops"]),
                *([show_time(row["latency_ns"])] if timed else []),
                *([show_count(row["memory_bytes"])] if counted else []),
                show_decimals(row["proxy"]),
                *([show_decimals(row["held_out"])] if tried else []),
                show_decimals(row["mean_r2"], 3),
                show_decimals(row["test_top1"]),
            ]
            for row in data["comparison"]
        ],
        highlight=0,
    )


def _show_remarks(terminal: Terminal, found: Assembled) -> None:
    data, timing = found.record.data, found.latency
    if data["program"]["optimal"]:
        tried = data["held_out"] is not None
        terminal.say(
            "the program's optimum is proven; "
            + ("held-out accuracy" if tried else "the proxy")
            + " chose among its best and the whole models"
        )
    else:
        terminal.warn("time ran out before the program's optimum was proven")
    if data["network"]["classes"] is None:
        terminal.say("the target has no labels: the network ends at its pre-logits, without a head")
    if data["match"] is not None:
        before, after = (f"{data['match'][when]:.3f}" for when in ("before", "after"))
        terminal.say(
            f"matching the last donor's features took their R2 on held-out images from {before} to "
            f"{after}{'' if data['match']['kept'] else ': the stitches were left as they were'}"
        )
    if timing is not None:
        terminal.say(
            f"a batch of {timing['batch_size']} takes the built network "
            f"{show_time(timing['built_network_ns'])}; its parts sum to "
            f"{show_time(timing['sum_of_parts_ns'])} ({timing['additive_error']:+.1%})"
        )
