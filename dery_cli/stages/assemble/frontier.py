"""The frontier of a program over its costs, as ``dery assemble --pareto`` shows it."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from dery_cli.core.assembly.frontier import pareto
from dery_cli.io.artifacts import Workspace
from dery_cli.io.files import replace_text
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.prepare import prepare
from dery_cli.stages.assemble.scores import scored_space
from dery_cli.stages.assemble.setting import SearchSpace
from dery_cli.stages.assemble.store import FRONTIER_FILE

FRONTIER_POINTS = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """Assemblies that no other beats in score and every cost at once.

    Args:
        points: Of each the score, the costs and the network, best first.
        complete: Whether these are all.
        file: Where they are written, as CSV.
    """

    points: list[dict[str, Any]]
    complete: bool
    file: Path


def trace_frontier(terminal: Terminal, space: Workspace, config: AssembleConfig) -> Frontier:
    """The frontier of the program's score over params, multiply-adds and perhaps latency.

    Raises:
        StaleError: An earlier stage is missing or out of date.
        InfeasibleError: Nothing is within the budget.
    """
    with space.lock(terminal.note):
        job = prepare(terminal, space, config)
        searched = scored_space(job)
        points, complete = _points(searched, config)
        path = space.assembly(config.name).parent / FRONTIER_FILE
        timed = [] if job.setting.latency is None else ["latency_ns"]
        columns = ["score", "params", "flops", *timed, "network"]
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(columns)
        writer.writerows([p[column] for column in columns] for p in points)
        replace_text(path, table.getvalue())
    return Frontier(points=points, complete=complete, file=path)


def _points(space: SearchSpace, config: AssembleConfig) -> tuple[list[dict[str, Any]], bool]:
    """Assemblies that no other beats in score and every cost at once, best first.

    The costs are params, multiply-adds and, where its budget is given, latency.

    Returns:
        At most ``FRONTIER_POINTS`` of them, and whether these are all.
    """
    problem = space.problem
    traded = [r.name for r in problem.resources if r.name in ("params", "flops", "latency")]
    found = pareto(problem, traded, max_points=FRONTIER_POINTS, max_seconds=config.max_seconds)
    points = []
    for assembly in found.assemblies:
        candidate = space.candidate(assembly)
        points.append(
            {
                "score": candidate.program_score,
                "params": candidate.params,
                "flops": candidate.flops,
                "latency_ns": candidate.latency,
                "memory_bytes": candidate.memory,
                "network": str(candidate),
                "blocks": [[ref.donor, ref.start, ref.stop] for ref in candidate.refs],
            }
        )
    return points, found.complete
