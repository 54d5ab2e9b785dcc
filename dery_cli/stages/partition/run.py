"""The partition stage: K blocks a model and K equivalence sets (Eq. 2-5)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dery_cli.core.partition.solve import Partition, PartitionProblem, partition
from dery_cli.io.artifacts import Workspace, unchanged, write_log, write_record
from dery_cli.io.records import Artifact
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.embed.store import read_embeddings
from dery_cli.stages.partition.config import PartitionConfig
from dery_cli.stages.partition.store import (
    PARTITION,
    StoredPartition,
    partition_to_json,
    stored_partition,
)
from dery_cli.stages.sim.store import StoredSimilarity, require_similarity
from dery_cli.types import Donor
from dery_cli.zoo.registry import Zoo, require_zoo


def partition_zoo(terminal: Terminal, space: Workspace, config: PartitionConfig) -> StoredPartition:
    """Cut the zoo, or say that its partition is up to date.

    Raises:
        StaleError: The zoo is empty, or its embeddings or similarity are missing or out of date.
        UsageError: A model cannot be cut so.
    """
    embeddings = read_embeddings(space, require_zoo(space))
    for warning in embeddings.warnings:
        terminal.warn(warning)
    similarity = require_similarity(space, embeddings, config.metric)
    wanted = Artifact(
        kind=PARTITION,
        parents={"similarity": similarity.record.sha256},
        options=config.options(),
        seed=config.seed,
    )
    with space.lock(terminal.note):
        record = unchanged(space.partition, wanted)
        if record is not None:
            terminal.say("the partition is up to date")
        else:
            started = time.monotonic()
            donors = _cuttable(terminal, embeddings.zoo, config.blocks)
            answer = _solve(terminal, donors, similarity, config)
            data = partition_to_json([donor.name for donor in donors], answer)
            record = write_record(space.partition, dataclasses.replace(wanted, data=data))
            write_log(space.root / "partition.log.json", {"seconds": time.monotonic() - started})
    return stored_partition(record)


def _cuttable(terminal: Terminal, zoo: Zoo, blocks: int) -> list[Donor]:
    """The donors that take part: all but those with no place to cut, unless none is to be cut."""
    every = list(zoo.donors.values())
    donors = [d for d in every if blocks == 1 or d.anatomy.num_units > 1] or every
    left_out = [donor.name for donor in every if donor not in donors]
    if left_out:
        terminal.warn(f"{', '.join(left_out)} cannot be cut and will only compete whole")
    return donors


def _solve(
    terminal: Terminal,
    donors: Sequence[Donor],
    similarity: StoredSimilarity,
    config: PartitionConfig,
) -> Partition:
    problem = PartitionProblem(
        sim_PP=_program_matrix(donors, similarity),
        units=tuple(donor.anatomy.num_units for donor in donors),
        names=tuple(donor.name for donor in donors),
        num_blocks=config.blocks,
        eps=config.eps,
        size=config.size,  # type: ignore[arg-type] # checked by the config
        sizes=_unit_sizes(donors, config.size),
    )
    with terminal.progress("partition", 100) as bar:
        answer = partition(
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


def _program_matrix(
    donors: Sequence[Donor], similarity: StoredSimilarity
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The similarity of all nodes, with a row for every node 0, which the program sets itself."""
    units = [donor.anatomy.num_units for donor in donors]
    place = {entry: row for row, entry in enumerate(similarity.index)}
    compared = [place[donor.name, node] for donor in donors for node in _later_nodes(donor)]
    sim = similarity.clamped[np.ix_(compared, compared)]
    if similarity.directional:  # both ways count alike
        sim = (sim + sim.T) / 2
    rows = np.concatenate([np.arange(n) + 1 + sum(units[:m]) + m for m, n in enumerate(units)])
    sim_PP = np.zeros((sum(units) + len(units),) * 2)
    sim_PP[np.ix_(rows, rows)] = sim
    return sim_PP


def _later_nodes(donor: Donor) -> range:
    return range(1, donor.anatomy.num_units + 1)


def _unit_sizes(
    donors: Sequence[Donor], size: str
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], ...] | None:
    """Multiply-adds or params of each unit of each donor; None where units are counted."""
    if size == "nodes":
        return None
    attribute = {"macs": "flops", "params": "params"}[size]
    return tuple(
        np.array([getattr(node, attribute) for node in donor.anatomy.nodes[1:]]) for donor in donors
    )
