"""The frontier of a program over its costs, as ``dery assemble --pareto`` shows it."""

from __future__ import annotations

from typing import Any

from dery_cli.core.assembly.frontier import pareto
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.setting import SearchSpace

FRONTIER_POINTS = 24


def frontier_points(
    space: SearchSpace, config: AssembleConfig
) -> tuple[list[dict[str, Any]], bool]:
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
