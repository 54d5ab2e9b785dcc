"""``dery partition``: K blocks a model and K equivalence sets (Eq. 2-5)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dery_cli.commands._options import (
    Result,
    SeedOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.io.artifacts import Artifact, unchanged, write_log, write_record
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.partition.config import PartitionConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dery_cli.core.partition.solve import Partition
    from dery_cli.stages.sim.store import StoredSimilarity
    from dery_cli.types import Donor
    from dery_cli.zoo.registry import Zoo


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
        str, typer.Option("--metric", help="Which similarity to use; see dery sim.")
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
    from dery_cli.stages.embed.store import read_embeddings
    from dery_cli.stages.sim.store import require_similarity
    from dery_cli.zoo.registry import require_zoo

    space = open_workspace(workspace)
    zoo = require_zoo(space)
    embeddings = read_embeddings(space, zoo)
    zoo = embeddings.zoo
    for warning in embeddings.warnings:
        terminal.warn(warning)
    stored = require_similarity(space, embeddings, metric)
    record = Artifact(
        kind="partition",
        parents={"similarity": stored.record.sha256},
        options=config.options(),
        seed=seed,
    )
    with space.lock(terminal.note):
        found = unchanged(space.partition, record)
        if found is not None:
            terminal.say("the partition is up to date")
        else:
            started = time.monotonic()
            answer = _solve(terminal, zoo, stored, config)
            names = [donor.name for donor in cuttable(zoo, config.blocks)]
            data = _to_json(names, answer)
            found = write_record(
                space.partition,
                Artifact(
                    kind="partition",
                    parents=record.parents,
                    options=record.options,
                    seed=seed,
                    data=data,
                ),
            )
            write_log(space.root / "partition.log.json", {"seconds": time.monotonic() - started})
    return _show(terminal, dict(found.data))


def cuttable(zoo: Zoo, blocks: int) -> list[Donor]:
    """The donors that take part: all but those with no place to cut, unless none is to be cut."""
    donors = list(zoo.donors.values())
    return [d for d in donors if blocks == 1 or d.anatomy.num_units > 1] or donors


def _solve(
    terminal: Terminal, zoo: Zoo, stored: StoredSimilarity, config: PartitionConfig
) -> Partition:
    import numpy as np

    from dery_cli.core.partition.solve import PartitionProblem
    from dery_cli.core.partition.solve import partition as solve

    donors = cuttable(zoo, config.blocks)
    left_out = [name for name in zoo.names() if all(name != donor.name for donor in donors)]
    if left_out:
        terminal.warn(f"{', '.join(left_out)} cannot be cut and will only compete whole")
    units = tuple(donor.anatomy.num_units for donor in donors)
    place = {entry: row for row, entry in enumerate(stored.index)}
    compared = [
        place[donor.name, n + 1] for donor in donors for n in range(donor.anatomy.num_units)
    ]
    sim = stored.result.clamp().double().numpy()[np.ix_(compared, compared)]
    if stored.directional:  # both ways count alike
        sim = (sim + sim.T) / 2
    # the program's matrix has a row for every node 0 too; it sets those entries itself
    rows = np.concatenate([np.arange(n) + 1 + sum(units[:m]) + m for m, n in enumerate(units)])
    sim_PP = np.zeros((sum(units) + len(units),) * 2)
    sim_PP[np.ix_(rows, rows)] = sim
    sizes = None
    if config.size != "nodes":
        attribute = {"macs": "flops", "params": "params"}[config.size]
        sizes = tuple(
            np.array([getattr(node, attribute) for node in donor.anatomy.nodes[1:]])
            for donor in donors
        )
    problem = PartitionProblem(
        sim_PP=sim_PP,
        units=units,
        names=tuple(donor.name for donor in donors),
        num_blocks=config.blocks,
        eps=config.eps,
        size=config.size,  # type: ignore[arg-type] # checked by the config
        sizes=sizes,
    )
    with terminal.progress("partition", 100) as bar:
        answer = solve(
            problem,
            restarts=config.restarts,
            seed=config.seed,
            max_seconds=config.max_seconds,
            progress=lambda phase, gap: bar.update(
                bar.done, f"{phase}" + (f", gap {gap:.2%}" if gap < 1e3 else "")
            ),
        )
        bar.update(100, "done")
    return answer


def _to_json(names: Sequence[str], answer: Partition) -> dict[str, Any]:
    return {
        "donors": [
            {
                "donor": names[m],
                "cuts": list(answer.cuts[m]),
                "sets": list(answer.sets[m]),
                "similarity": list(answer.similarity[m]),
                "forced": bool(answer.forced[m]),
            }
            for m in range(len(names))
        ],
        "anchors": [
            {"set": index, "donor": names[m], "start": start, "stop": stop}
            for index, (m, start, stop) in enumerate(answer.anchors)
        ],
        "objective": answer.objective,
        "upper_bound": answer.upper_bound,
        "gap": answer.gap,
        "optimal": answer.optimal,
        "admits_assembly": answer.admits_assembly,
    }


def _show(terminal: Terminal, data: dict[str, Any]) -> Result:
    rows = []
    for anchor in data["anchors"]:
        members = [
            (donor["donor"], donor["cuts"][k], donor["cuts"][k + 1], donor["similarity"][k])
            for donor in data["donors"]
            for k, index in enumerate(donor["sets"])
            if index == anchor["set"]
        ]
        mean = sum(member[3] for member in members) / len(members)
        rows.append(
            [
                anchor["set"] + 1,
                f"{anchor['donor']}[{anchor['start']}:{anchor['stop']}]",
                f"{mean:.2f}",
                len(members),
                ", ".join(f"{name}[{start}:{stop}]" for name, start, stop, _ in members),
            ]
        )
    terminal.table(
        "equivalence sets (similarity of a block with its anchor is at most 2)",
        ["set", "anchor", "mean similarity", "blocks", "members: donor[first node:last node]"],
        rows,
    )
    proof = "proven best" if data["optimal"] else f"gap at most {data['gap']:.2%}"
    terminal.say(
        f"objective {data['objective']:.4f}, upper bound {data['upper_bound']:.4f}: {proof}"
    )
    forced = [donor["donor"] for donor in data["donors"] if donor["forced"]]
    if forced:
        terminal.say(f"--eps leaves one way only to cut {', '.join(forced)}")
    if not data["admits_assembly"]:
        terminal.warn(
            "no assembly can take one block of every stage and every set; "
            "whole models are all that dery assemble can offer. Try another -K or --eps"
        )
    return {**data, "forced": forced}
