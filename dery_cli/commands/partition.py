"""``dery partition``: K blocks a model and K equivalence sets (Eq. 2-5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dery_cli.commands import _completion
from dery_cli.commands._options import (
    Result,
    SeedOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.partition.config import PartitionConfig

if TYPE_CHECKING:
    from dery_cli.stages.partition.store import StoredPartition


@command
def partition(
    terminal: Terminal,
    blocks: Annotated[
        int, typer.Option("-K", "--blocks", help="Blocks a model, and equivalence sets.")
    ] = 4,
    eps: Annotated[
        float, typer.Option("--eps", help="How much larger than its share a block may be.")
    ] = 0.2,
    restarts: Annotated[
        int, typer.Option("--restarts", help="Seeds the search starts from.")
    ] = 200,
    size: Annotated[
        str, typer.Option("--size", help="What a block's size is counted in: nodes, macs, params.")
    ] = "nodes",
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            help="Which similarity to use; see dery sim.",
            autocompletion=_completion.metrics,
        ),
    ] = "cka",
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Stop improving after this time.")
    ] = None,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
) -> Result:
    """Cut every donor into K blocks and sort all blocks into K equivalence sets.

    Maximises the summed functional similarity of the blocks with the anchors of their sets, and
    states an upper bound for it over all possible partitions.

    For example: dery partition -K 4 --eps 0.2
    """
    config = PartitionConfig(
        blocks=blocks,
        eps=eps,
        restarts=restarts,
        size=size,
        metric=metric,
        max_seconds=max_seconds,
        seed=seed,
    )
    space = open_workspace(workspace)
    from dery_cli.stages.partition.run import partition_zoo

    stored = partition_zoo(terminal, space, config)
    _show(terminal, stored)
    return {**stored.record.data, "forced": stored.forced}


def _show(terminal: Terminal, stored: StoredPartition) -> None:
    found = stored.partition
    rows = []
    for index in range(found.num_blocks):
        members = found.members(index)
        mean = sum(found.similarity[donor][stage] for donor, stage in members) / len(members)
        blocks = ", ".join(str(stored.block(donor, stage)) for donor, stage in members)
        rows.append([index + 1, stored.anchor(index), f"{mean:.2f}", len(members), blocks])
    terminal.table(
        "equivalence sets (similarity of a block with its anchor is at most 2)",
        ["set", "anchor", "mean similarity", "blocks", "members: donor[first node:last node]"],
        rows,
    )
    proof = "proven best" if found.optimal else f"gap at most {found.gap:.2%}"
    terminal.say(f"objective {found.objective:.4f}, upper bound {found.upper_bound:.4f}: {proof}")
    if stored.forced:
        terminal.say(f"--eps leaves one way only to cut {', '.join(stored.forced)}")
    if not stored.record.data["admits_assembly"]:
        terminal.warn(
            "no assembly can take one block of every stage and every set; "
            "whole models are all that dery assemble can offer. Try another -K or --eps"
        )
