"""``dery assemble``: the best network of the zoo's parts that fits a budget (Eq. 8-11)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dery_cli.commands import _completion
from dery_cli.commands._explanation import show_explanation
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
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import (
    FEW_SAMPLES,
    MOST_SAMPLES,
    budget_name,
    show_count,
    show_decimals,
    show_time,
)
from dery_cli.stages.assemble.config import (
    DRAWS,
    GONE,
    SPACES,
    AssembleConfig,
    DonorFilter,
    check_explain,
    parse_budgets,
    preset_options,
    refuse_gone,
)

if TYPE_CHECKING:
    from dery_cli.stages.assemble.frontier import Frontier
    from dery_cli.stages.assemble.run import Assembled

NETWORK_COLUMN = "network: donor[first node:last node]"


@command
def assemble(
    terminal: Terminal,
    max_params: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="At most so many parameters: 30M, 800k. 10M,30M,50M assembles one network for "
            "each, NAME-10m and so on, which share what was built; so does every limit.",
        ),
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
    latency_from: Annotated[
        Path | None,
        typer.Option(
            "--latency-from",
            metavar="FILE",
            help="Times that another machine measured, for --max-latency: the latency.json of dery "
            "latency pack.",
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
        list[str] | None,
        typer.Option(
            "--include",
            help="Use these donors only; may be repeated.",
            autocompletion=_completion.donors,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="DONOR|PIECE",
            help="Leave this donor out, or this piece of one: a[0:4]; may be repeated.",
            autocompletion=_completion.donors,
        ),
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
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be searched and built, and what it takes; only that.",
        ),
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say why this network: what each part adds to what was foreseen of it, the best "
            "foreseen within a budget 10 % larger or smaller, and the donor that would be missed "
            "most. Of an assembly that is up to date too.",
        ),
    ] = False,
    require_optimal: Annotated[
        bool, typer.Option("--require-optimal", help="Exit 1 unless the program's best is proven.")
    ] = False,
    data: DataOption = None,
    skip_bad: SkipBadOption = False,
    name: Annotated[
        str,
        typer.Option("--name", help="Name of the assembly.", autocompletion=_completion.assemblies),
    ] = "default",
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="paper: the paper's own procedure to compare with, --stem paper --stitch paper "
            "--space paper --proxy naswot --draw random; what else is given stands.",
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            "--space",
            show_default=AssembleConfig.space,
            help=f"Networks to choose from, {' or '.join(SPACES)}: every path through the donors, "
            "or one block a stage and an equivalence set of the partition.",
        ),
    ] = None,
    draw: Annotated[
        str | None,
        typer.Option(
            "--draw",
            show_default=AssembleConfig.draw,
            help=f"Candidates of --space paper, {' or '.join(DRAWS)}: the best of its program, or "
            "drawn at random within the budget, as many as --effort pays for.",
        ),
    ] = None,
    max_stitches: Annotated[
        int, typer.Option("--max-stitches", help="Stitches of a path, at most.")
    ] = AssembleConfig.max_stitches,
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            metavar="NETWORK",
            help="Build this network, as tables print them: 'a[0:4] + b[7:9]'; ~ for + puts an "
            "adapter where pieces are neighbours.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="PIECE",
            help="Begin with this piece: a[0:4], or a.",
            autocompletion=_completion.donors,
        ),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option(
            "--end",
            metavar="PIECE",
            help="End with this piece: b[7:9], or b.",
            autocompletion=_completion.donors,
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="PIECE",
            help="Have this piece in; may be repeated.",
            autocompletion=_completion.donors,
        ),
    ] = None,
    purpose: Annotated[
        str,
        typer.Option(
            "--for",
            help="What the network is for: finetuned (what a short fine-tuning makes of the best "
            "decides, where --effort pays for it; where there are images enough, a part of them is "
            "kept apart for finetune to choose on) or untrained (what is delivered is fitted on "
            "all training images).",
        ),
    ] = AssembleConfig.purpose,
    effort: Annotated[
        float,
        typer.Option(
            "--effort",
            help="Work of building and trying candidates, in passes of all donors over the "
            "target's images, and as much again of short fine-tunings for --for finetuned; "
            "counted, not timed.",
        ),
    ] = AssembleConfig.effort,
    proxy: Annotated[
        str | None,
        typer.Option(
            "--proxy",
            help="Ranks built networks: probe (needs labels; the best are then tried on held-out "
            "images, which decides), or alone: naswot, jacov, synflow, params, flops, and with "
            "labels grad_norm, snip, fisher, zico.",
            autocompletion=_completion.proxies,
        ),
    ] = None,
    proxy_batches: Annotated[
        int,
        typer.Option(
            "--proxy-batches", help="Batches of target images that a proxy looks at (not probe)."
        ),
    ] = AssembleConfig.proxy_batches,
    proxy_batch_size: Annotated[
        int, typer.Option("--proxy-batch-size", help="Images of each of these batches.")
    ] = AssembleConfig.proxy_batch_size,
    candidates: Annotated[
        str | None, typer.Option("--candidates", "-n", hidden=True, help=GONE["candidates"])
    ] = None,
    finalists: Annotated[
        str | None, typer.Option("--finalists", hidden=True, help=GONE["finalists"])
    ] = None,
    joint_weight: Annotated[
        str | None, typer.Option("--joint-weight", hidden=True, help=GONE["joint-weight"])
    ] = None,
    stem: Annotated[
        str | None,
        typer.Option(
            "--stem",
            show_default=AssembleConfig.stem,
            help="What networks begin with: the first donor's own layers (donor), or the paper's "
            "fresh 7x7 convolution, to train, in place of the first donor's first unit, which "
            "holds its pretrained stem (paper; no whole donors then).",
        ),
    ] = None,
    stitch: Annotated[
        str | None,
        typer.Option(
            "--stitch",
            show_default=AssembleConfig.stitch,
            help="Layer between blocks of different donors: linear (1x1 convolution), mlp (two of "
            "them), or paper (batch norm, convolution, LeakyReLU with random weights, to train).",
        ),
    ] = None,
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
        int | None,
        typer.Option(
            "--target-samples",
            help="Target images for probes and the head.",
            show_default=f"as many as embed took, {FEW_SAMPLES} to {MOST_SAMPLES}",
        ),
    ] = AssembleConfig.target_samples,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Stop the search after this time.")
    ] = None,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
) -> Result:
    """Find the best path through the donors within the budget, build it, and fit what joins it.

    A network is a path: pieces of donors with stitches between, slices and whole donors too. An
    exact search ranks the paths by what the target's images say of their ends and joints; the best
    of them are built and ranked by a training-free proxy; the first of these are made on a part of
    the target's training images and tried on the rest, beside fair controls, which decides. The
    result works untrained.

    For example: dery assemble --max-params 30M --max-flops 5G --explain
    """
    gone = {"candidates": candidates, "finalists": finalists, "joint-weight": joint_weight}
    for option in [option for option, value in gone.items() if value is not None]:
        refuse_gone(option)
    left_out = exclude or []
    budgets = parse_budgets(
        max_params=max_params,
        min_params=min_params,
        max_flops=max_flops,
        min_flops=min_flops,
        max_latency=max_latency,
        max_memory=max_memory,
    )
    config = AssembleConfig(
        budget=next(iter(budgets.values())),
        donors=DonorFilter(
            licenses=tuple(license_ or ()),
            include=tuple(include or ()),
            exclude=tuple(name for name in left_out if "[" not in name),
            image_size=image_size,
        ),
        max_donors=max_donors,
        latency_batch=latency_batch,
        latency_from=latency_from,
        memory_batch=memory_batch,
        data=data,
        skip_bad=skip_bad,
        name=name,
        max_stitches=max_stitches,
        blocks=blocks,
        start=start,
        end=end,
        require=tuple(require or ()),
        exclude=tuple(piece for piece in left_out if "[" in piece),
        purpose=purpose,
        effort=effort,
        proxy_batches=proxy_batches,
        proxy_batch_size=proxy_batch_size,
        match=match,
        whole=whole,
        fit_samples=fit_samples,
        target_samples=target_samples,
        max_seconds=max_seconds,
        seed=seed,
        require_optimal=require_optimal,
        explain=explain,
        device=device,
        workers=workers,
        **preset_options(preset, space=space, stem=stem, stitch=stitch, proxy=proxy, draw=draw),
    )
    check_explain(explain, **{"--pareto": pareto, "--dry-run": dry_run})
    folder = open_workspace(workspace)
    does = _tell if dry_run else _trace if pareto else _build
    results: dict[str, Result] = {}
    for key, budget in budgets.items():
        called = budget_name(name, key)
        one = dataclasses.replace(config, budget=budget, name=called)
        results[called] = does(terminal, folder, one)
    return {"assemblies": results} if len(results) > 1 else results[called]


def _build(terminal: Terminal, folder: Workspace, config: AssembleConfig) -> Result:
    from dery_cli.stages.assemble.run import assemble_network

    found = assemble_network(terminal, folder, config)
    _show_comparison(terminal, found.record.data)
    _show_remarks(terminal, found)
    why = found.explanation
    if why is not None:
        show_explanation(terminal, why)
    terminal.say(f"assembly '{config.name}' is in {found.folder}")
    return {
        "assembly": config.name,
        "folder": str(found.folder),
        **found.record.data,
        "latency": found.latency,
        **({} if why is None else {"explanation": dataclasses.asdict(why)}),
    }


def _trace(terminal: Terminal, folder: Workspace, config: AssembleConfig) -> Result:
    from dery_cli.stages.assemble.frontier import trace_frontier

    frontier = trace_frontier(terminal, folder, config)
    _show_frontier(terminal, frontier, config)
    return {
        "frontier": frontier.points,
        "complete": frontier.complete,
        "file": str(frontier.file),
    }


def _tell(terminal: Terminal, folder: Workspace, config: AssembleConfig) -> Result:
    from dery_cli.stages.assemble.dry_run import dry_run

    found = dry_run(terminal, folder, config)
    terminal.table(
        f"would assemble '{config.name}' within {config.budget}",
        ["", ""],
        [
            ["networks in the space", f"{found.networks:,}"],
            ["within the budget", f"about {found.within_budget:,}"],
            ["to build and score", f"{found.builds:,}"],
            ["to try", f"{found.finalists:,}, and controls"],
            ["to fine-tune shortly", f"{found.tuned:,}"],
            ["multiply-adds", f"about {show_count(found.multiply_adds)}"],
            ["time on this machine", f"roughly {found.seconds / 60:,.1f} min"],
            ["disk", f"about {show_count(found.bytes)} bytes"],
        ],
    )
    return dataclasses.asdict(found)


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
    tuned = any(row.get("tuned") is not None for row in data["comparison"])
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
            "tuned" if tuned else "joint R2",  # 80 columns have no room for both
            "test as built",
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
                show_decimals(row.get("tuned")) if tuned else show_decimals(row["mean_r2"], 3),
                show_decimals(row["test_top1"]),
            ]
            for row in data["comparison"]
        ],
        highlight=0,
    )


TERMS_SHOWN = 5


def _show_learning(terminal: Terminal, learning: Mapping[str, Any]) -> None:
    """How well built networks were foreseen, and what the objective came to weigh."""
    said = f"{learning['builds']} networks were built in {learning['rounds']} rounds"
    if learning["tau"] is not None:
        low, high = learning["tau_interval"]
        said += (
            f"; what was foreseen of {learning['foreseen']} agrees with what came out: Kendall's "
            f"tau {learning['tau']:.2f} ({low:.2f} to {high:.2f})"
        )
    terminal.say(said)
    words = ", ".join(f"{name} {points:+.1f}" for name, points in learning["terms"][:TERMS_SHOWN])
    if words:
        terminal.say(f"what counts, in points for each usual deviation of it: {words}")


def _show_remarks(terminal: Terminal, found: Assembled) -> None:
    data, timing = found.record.data, found.latency
    if data["program"]["solver"] == "not asked":
        terminal.say(f"nothing was searched: {data['program']['agreement']}")
    elif data["program"]["optimal"]:
        decided = "the proxy" if data["held_out"] is None else "held-out images"
        if data["builds"].get("tuned"):
            decided += f", after a short fine-tuning of {data['builds']['tuned']} networks,"
        terminal.say(
            f"the program's optimum is proven; {decided} chose among its best and the whole models"
        )
    else:
        terminal.warn("time ran out before the program's optimum was proven")
    if data["builds"].get("without_score"):
        terminal.warn(
            f"{data['builds']['without_score']} of {data['builds']['scored']} networks have no "
            f"score by {data['proxy']['name']} and rank last"
        )
    if data["builds"].get("too_slow"):
        terminal.say(
            f"{data['builds']['too_slow']} networks whose parts sum to the budget took longer as a "
            "whole and were left out"
        )
    if data["learning"] is not None:
        _show_learning(terminal, data["learning"])
    if data["network"]["classes"] is None:
        terminal.say("the target has no labels: the network ends at its pre-logits, without a head")
    if data["match"] is not None:
        before, after = (f"{data['match'][when]:.3f}" for when in ("before", "after"))
        terminal.say(
            f"matching the last donor's features took their R2 on held-out images from {before} to "
            f"{after}{'' if data['match']['kept'] else ': the stitches were left as they were'}"
        )
    if timing is None and data["latency_ns"] is not None:
        terminal.say(
            f"its parts sum to {show_time(data['latency_ns'])} where they were measured; to "
            "measure it whole there: dery latency pack DIR --network NAME"
        )
    if timing is not None:
        terminal.say(
            f"a batch of {timing['batch_size']} takes the built network "
            f"{show_time(timing['built_network_ns'])}; its parts sum to "
            f"{show_time(timing['sum_of_parts_ns'])} ({timing['additive_error']:+.1%})"
        )
