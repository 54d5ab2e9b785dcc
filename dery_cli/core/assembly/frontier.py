"""More than one answer: the frontier over score and resources, and a random feasible assembly."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from dery_cli.core.assembly.graph import FloatArray, LayeredGraph, build, fix, limit_bounds
from dery_cli.core.assembly.problem import (
    Assembly,
    AssemblyProblem,
    IntArray,
    recount,
    violations,
)
from dery_cli.core.assembly.search import n_best

_DRAWS = 2048
_BATCHES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """Assemblies that no other one beats in score and in every resource at once.

    Args:
        assemblies: Best score first.
        complete: Whether these are all; otherwise they are spread over the budgets, each one is
            proven to be on the frontier, and more solves would find others.
        solves: Exact searches made.
    """

    assemblies: tuple[Assembly, ...]
    complete: bool
    solves: int


def pareto(
    problem: AssemblyProblem,
    names: Sequence[str] | None = None,
    *,
    max_points: int | None = None,
    max_seconds: float | None = None,
) -> Frontier:
    """The frontier over score and resources, one exact search after another.

    The best assembly within a box of maxima is on the frontier; what else is within the box uses
    less than it of some resource, which is one smaller box for each. The largest box goes first.

    Args:
        problem: Blocks, edges; its limits hold for every assembly of the frontier.
        names: Resources to trade against the score, all by default.
        max_points: Stop after this many.
        max_seconds: Stop then.
    """
    names = [r.name for r in problem.resources] if names is None else list(names)
    index = [[r.name for r in problem.resources].index(name) for name in names]
    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    found: dict[tuple[int, tuple[int, ...]], Assembly] = {}
    solved: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    boxes = {tuple(_largest(problem, i) for i in index)}
    solves = 0
    complete = True
    while boxes:
        left = None if deadline is None else deadline - time.monotonic()
        enough = max_points is not None and len(found) >= max_points
        if enough or (left is not None and left <= 0):
            complete = False
            break
        box = max(boxes, key=lambda b: (sum(np.log(np.maximum(b, 1))), b))
        boxes.remove(box)
        within = _within(problem, index, box)
        if within is None:
            continue
        costs = _known_answer(box, solved)
        if costs is None:
            solves += 1
            answer = n_best(within, 1, max_seconds=left)
            if not answer.proven:
                complete = False
            if answer.best is None or not answer.proven:
                continue
            costs = tuple(answer.best.costs[i] for i in index)
            found.setdefault((answer.best.score, costs), answer.best)
            solved.append((box, costs))
        for place, cost in enumerate(costs):
            if cost > 1:
                boxes.add((*box[:place], cost - 1, *box[place + 1 :]))
    return Frontier(
        assemblies=tuple(sorted(found.values(), key=lambda a: a.order)),
        complete=complete,
        solves=solves,
    )


def _largest(problem: AssemblyProblem, index: int) -> int:
    """The maximum of a resource, or what no assembly exceeds."""
    resource = problem.resources[index]
    most = max(1, problem.max_total(resource.cost_B, resource.cost_E))
    return most if resource.maximum is None else min(most, resource.maximum)


def _within(
    problem: AssemblyProblem, index: list[int], box: tuple[int, ...]
) -> AssemblyProblem | None:
    """The problem with the box's maxima; None where a minimum is above one."""
    resources = list(problem.resources)
    for i, maximum in zip(index, box, strict=True):
        if (resources[i].minimum or 0) > maximum:
            return None
        resources[i] = dataclasses.replace(resources[i], maximum=maximum)
    return dataclasses.replace(problem, resources=tuple(resources))


def _known_answer(
    box: tuple[int, ...], solved: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[int, ...] | None:
    """The answer of a larger box, if it lies in this one: then it is the answer here too."""
    for larger, costs in solved:
        if all(b <= a for a, b in zip(larger, box, strict=True)) and all(
            c <= b for b, c in zip(box, costs, strict=True)
        ):
            return costs
    return None


def random_feasible(
    problem: AssemblyProblem, rng: np.random.Generator, *, max_seconds: float | None = None
) -> Assembly | None:
    """A random assembly that fits, or None if none does.

    Drawn uniformly from all assemblies, until one fits. Where hardly any does, the best for random
    scores, which the exact search finds if there is one.

    Args:
        problem: Blocks, edges, limits.
        rng: Decides the draw.
        max_seconds: For the search; None is then also returned where time ran out.
    """
    limits = limit_bounds(problem)
    graph = fix(build(problem, tracked=False), limits, 0)
    if not graph.empty:
        kept_E = graph.edges(problem.num_edges)
        graph = fix(build(problem, tracked=True, keep_E=kept_E), limits, 0)
    if graph.empty:
        return None
    count_LS = _count_paths(graph)
    for _ in range(_BATCHES):
        for block_L, edge_L in zip(*_draw(graph, count_LS, rng), strict=True):
            assembly = recount(problem, block_L.tolist(), edge_L.tolist())
            if not violations(problem, assembly):
                return assembly
    scrambled = dataclasses.replace(
        problem,
        score_B=rng.integers(0, 10**6, problem.num_blocks),
        score_E=rng.integers(0, 10**6, problem.num_edges),
    )
    best = n_best(scrambled, 1, max_seconds=max_seconds).best
    return None if best is None else recount(problem, best.blocks, best.edges)


def count_assemblies(problem: AssemblyProblem) -> int:
    """How many assemblies there are that satisfy filters, sets and requirements; exact.

    Budgets and ``max_donors`` do not count.
    """
    graph = build(problem, tracked=bool(problem.num_bits))
    count_S = np.ones(len(graph.block_LS[-1]), dtype=object)  # Python integers: they are many
    for t in reversed(graph.transitions):
        count_S = np.add.reduceat(count_S[t.dst_T][t.by_src_T], t.src_start_S)
    return int(count_S.sum()) if len(graph.block_LS[0]) else 0


def share_that_fits(problem: AssemblyProblem, rng: np.random.Generator, draws: int) -> float:
    """The share of all assemblies that is within the budgets, estimated by uniform draws."""
    graph = build(problem, tracked=bool(problem.num_bits))
    if graph.empty:
        return 0.0
    count_LS = _count_paths(graph)
    fitting = drawn = 0
    while drawn < draws:
        for block_L, edge_L in zip(*_draw(graph, count_LS, rng), strict=True):
            assembly = recount(problem, block_L.tolist(), edge_L.tolist())
            fitting += not violations(problem, assembly)
            drawn += 1
    return fitting / drawn


def _count_paths(graph: LayeredGraph) -> list[FloatArray]:
    """How many paths lead from each state to the end."""
    count_LS: list[FloatArray] = [np.ones(len(graph.block_LS[-1]))]
    for t in reversed(graph.transitions):
        ahead_T = count_LS[0][t.dst_T][t.by_src_T]
        count_LS.insert(0, np.add.reduceat(ahead_T, t.src_start_S))
    return count_LS


def _draw(
    graph: LayeredGraph, count_LS: list[FloatArray], rng: np.random.Generator
) -> tuple[IntArray, IntArray]:
    """Blocks (draws, K) and edges (draws, K - 1) of paths drawn uniformly."""
    share_S = count_LS[0] / count_LS[0].sum()
    state_R = rng.choice(len(share_S), size=_DRAWS, p=share_S)
    blocks, edges = [graph.block_LS[0][state_R]], []
    for layer, t in enumerate(graph.transitions):
        total_T = np.cumsum(count_LS[layer + 1][t.dst_T][t.by_src_T])
        stop_S = np.append(t.src_start_S[1:], len(t.edge_T)) - 1
        before_S = np.append(0.0, total_T)[t.src_start_S]
        aim_R = before_S[state_R] + rng.random(_DRAWS) * (total_T[stop_S] - before_S)[state_R]
        pick_R = np.searchsorted(total_T, aim_R, side="right")
        pick_R = t.by_src_T[np.clip(pick_R, t.src_start_S[state_R], stop_S[state_R])]
        state_R = t.dst_T[pick_R]
        blocks.append(graph.block_LS[layer + 1][state_R])
        edges.append(t.edge_T[pick_R])
    edge_RL = np.stack(edges, axis=1) if edges else np.zeros((_DRAWS, 0), dtype=np.int64)
    return np.stack(blocks, axis=1), edge_RL
