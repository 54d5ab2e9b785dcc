"""The layered graph of an assembly problem, and linear bounds on its paths.

A state is a block together with the equivalence sets used and the requirements fulfilled so far, so
a path through the states keeps these; only budgets and the number of donors remain. All that a
search needs to know about the rest of a path is then a longest path, one vectorised pass.

Legend: Q quantities (0 is the value, then the resources), T transitions between the states of two
layers, S states of a layer, E edges of the problem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dery_cli.core.assembly.problem import AssemblyProblem, BoolArray, IntArray

FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int32]

# every integer bound stays below this, so that adding three of them cannot overflow int64
SAFE = 2**60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transition:
    """The state transitions from one layer to the next, sorted by destination.

    Args:
        src_T: State in the layer before.
        dst_T: State in the layer after.
        edge_T: Edge of the problem.
        amount_QT: What the edge and the block it leads to add to each quantity.
        dst_start_S: Where each destination state's transitions begin.
        by_src_T: Permutation that sorts by source.
        src_start_S: Where each source state's transitions begin, in that permutation.
    """

    src_T: IndexArray
    dst_T: IndexArray
    edge_T: IndexArray
    amount_QT: IntArray
    dst_start_S: IntArray
    by_src_T: IntArray
    src_start_S: IntArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayeredGraph:
    """States of every layer and the transitions between them; every state lies on a whole path.

    Args:
        block_LS: For each layer, the block of each state.
        mask_LS: For each layer, the bit of the state's own set (``tracked`` False), or the bits of
            all sets used and all requirements fulfilled up to there (True).
        transitions: K - 1 of them.
        start_QS: Quantities of the first layer's blocks.
        tracked: Whether states remember the used sets and the fulfilled requirements.
    """

    block_LS: tuple[IntArray, ...]
    mask_LS: tuple[IntArray, ...]
    transitions: tuple[Transition, ...]
    start_QS: IntArray
    tracked: bool

    @property
    def empty(self) -> bool:
        return len(self.block_LS[0]) == 0

    @property
    def num_transitions(self) -> int:
        return sum(len(t.edge_T) for t in self.transitions)

    def edges(self, num_edges: int) -> BoolArray:
        """Which edges of the problem are left."""
        used_E: BoolArray = np.zeros(num_edges, dtype=bool)
        for transition in self.transitions:
            used_E[transition.edge_T] = True
        return used_E


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """Every path worth having satisfies ``coefs . quantities + const >= coefs[0] * target``.

    With coefs[0] = 0 it is a limit of the problem; otherwise a (Lagrangian) bound on the value, and
    the target the least value that is still of interest.
    """

    coefs: tuple[int, ...]
    const: int

    def threshold(self, target: int) -> int:
        """Least ``coefs . quantities`` allowed, clipped to what int64 sums can reach."""
        return max(-2 * SAFE, min(2 * SAFE, self.coefs[0] * target - self.const))


def value_scale(problem: AssemblyProblem) -> int:
    """M such that value = M * score - first resource orders assemblies by score, then by cost.

    1 (and the value is the score alone) where the product would not fit 64 bits.
    """
    if not problem.resources:
        return 1
    score = problem.max_total(problem.score_B, problem.score_E)
    cost = problem.max_total(problem.resources[0].cost_B, problem.resources[0].cost_E)
    return cost + 1 if (score + 1) * (cost + 1) < 2**54 else 1


def quantities(problem: AssemblyProblem) -> tuple[IntArray, IntArray]:
    """``amount_QB`` and ``amount_QE``: the value of ``value_scale``, then every resource."""
    scale = value_scale(problem)
    amount_QB = np.stack([problem.score_B * scale, *(r.cost_B for r in problem.resources)])
    amount_QE = np.stack([problem.score_E * scale, *(r.cost_E for r in problem.resources)])
    if scale > 1:
        amount_QB[0] -= problem.resources[0].cost_B
        amount_QE[0] -= problem.resources[0].cost_E
    return amount_QB, amount_QE


def build(
    problem: AssemblyProblem, *, tracked: bool, keep_E: BoolArray | None = None
) -> LayeredGraph:
    """Lay the problem out as states and transitions.

    Args:
        problem: Blocks and edges.
        tracked: Whether states remember the used sets and what is fulfilled of the requirements;
            without, set repeats are not excluded and nothing is required.
        keep_E: Edges to use, all if None.
    """
    amount_QB, amount_QE = quantities(problem)
    allowed_B = problem.allowed_B
    bit_B, given_E = problem.set_bit_B, problem.given_bits_E
    num_bits, required = problem.num_bits, problem.required_bits
    usable_E = problem.allowed_E
    if keep_E is not None:
        usable_E &= keep_E
    stage_E = np.where(usable_E, problem.stage_B[problem.src_E], -1)
    block_S = np.flatnonzero((problem.stage_B == 0) & allowed_B)
    mask_S = bit_B[block_S]
    layers = [(block_S, mask_S)]
    raw: list[tuple[IntArray, IntArray, IntArray]] = []
    for stage in range(problem.num_stages - 1):
        edge_E = np.flatnonzero(stage_E == stage)
        edge_E = edge_E[np.argsort(problem.src_E[edge_E], kind="stable")]
        first_B = np.searchsorted(problem.src_E[edge_E], np.arange(problem.num_blocks + 1))
        degree_S = first_B[block_S + 1] - first_B[block_S]
        src_T = np.repeat(np.arange(len(block_S)), degree_S)
        edge_T = edge_E[first_B[block_S][src_T] + _ramp(degree_S)]
        dst_block_T = problem.dst_E[edge_T]
        if tracked:
            fits_T = (mask_S[src_T] & bit_B[dst_block_T]) == 0
            src_T, edge_T, dst_block_T = src_T[fits_T], edge_T[fits_T], dst_block_T[fits_T]
            mask_T = mask_S[src_T] | bit_B[dst_block_T] | given_E[edge_T]
            if stage == problem.num_stages - 2:
                done_T = (mask_T & required) == required
                src_T, edge_T = src_T[done_T], edge_T[done_T]
                dst_block_T, mask_T = dst_block_T[done_T], mask_T[done_T]
            key_S, dst_T = np.unique((dst_block_T << num_bits) | mask_T, return_inverse=True)
            block_S, mask_S = key_S >> num_bits, key_S & ((1 << num_bits) - 1)
        else:
            block_S, dst_T = np.unique(dst_block_T, return_inverse=True)
            mask_S = bit_B[block_S]
        layers.append((block_S, mask_S))
        raw.append((src_T, dst_T, edge_T))
    return _graph(
        [block for block, _ in layers],
        [mask for _, mask in layers],
        [
            _Link(src_T, dst_T, edge_T, amount_QE[:, edge_T] + amount_QB[:, problem.dst_E[edge_T]])
            for src_T, dst_T, edge_T in raw
        ],
        amount_QB[:, layers[0][0]],
        tracked,
    )


def restrict(graph: LayeredGraph, keep_LT: Sequence[BoolArray]) -> LayeredGraph:
    """The graph with the kept transitions only, and without the states that lie on no path now."""
    links = [
        _Link(t.src_T, t.dst_T, t.edge_T, t.amount_QT).where(keep_T)
        for t, keep_T in zip(graph.transitions, keep_LT, strict=True)
    ]
    return _graph(graph.block_LS, graph.mask_LS, links, graph.start_QS, graph.tracked)


@dataclasses.dataclass(frozen=True)
class _Link:
    """Transitions in any order, as in ``Transition``."""

    src_T: npt.NDArray[Any]
    dst_T: npt.NDArray[Any]
    edge_T: npt.NDArray[Any]
    amount_QT: IntArray

    def where(self, keep_T: BoolArray) -> _Link:
        return _Link(
            self.src_T[keep_T], self.dst_T[keep_T], self.edge_T[keep_T], self.amount_QT[:, keep_T]
        )


def _graph(
    block_LS: Sequence[IntArray],
    mask_LS: Sequence[IntArray],
    links: list[_Link],
    start_QS: IntArray,
    tracked: bool,
) -> LayeredGraph:
    """Drop what lies on no whole path, renumber the states and sort the transitions."""
    alive_LS = [np.ones(len(block_LS[0]), dtype=bool)]
    for layer, link in enumerate(links):
        links[layer] = link = link.where(alive_LS[layer][link.src_T])
        alive_S = np.zeros(len(block_LS[layer + 1]), dtype=bool)
        alive_S[link.dst_T] = True
        alive_LS.append(alive_S)
    for layer in reversed(range(len(links))):
        links[layer] = link = links[layer].where(alive_LS[layer + 1][links[layer].dst_T])
        alive_LS[layer] = np.zeros(len(block_LS[layer]), dtype=bool)
        alive_LS[layer][link.src_T] = True
    number_LS = [np.cumsum(alive_S, dtype=np.int32) - 1 for alive_S in alive_LS]
    transitions = [
        _sorted(link, number_LS[layer][link.src_T], number_LS[layer + 1][link.dst_T])
        for layer, link in enumerate(links)
    ]
    return LayeredGraph(
        block_LS=tuple(b[alive] for b, alive in zip(block_LS, alive_LS, strict=True)),
        mask_LS=tuple(m[alive] for m, alive in zip(mask_LS, alive_LS, strict=True)),
        transitions=tuple(transitions),
        start_QS=start_QS[:, alive_LS[0]],
        tracked=tracked,
    )


def _sorted(link: _Link, src_T: IndexArray, dst_T: IndexArray) -> Transition:
    order_T = np.argsort(dst_T, kind="stable")
    src_T, dst_T = src_T[order_T], dst_T[order_T]
    by_src_T = np.argsort(src_T, kind="stable")
    return Transition(
        src_T=src_T,
        dst_T=dst_T,
        edge_T=link.edge_T[order_T].astype(np.int32),
        amount_QT=link.amount_QT[:, order_T],
        dst_start_S=_starts(dst_T),
        by_src_T=by_src_T,
        src_start_S=_starts(src_T[by_src_T]),
    )


def _starts(sorted_T: IndexArray) -> IntArray:
    """First position of each value 0, 1, ... of a sorted array that holds them all."""
    return np.flatnonzero(np.diff(sorted_T, prepend=np.int32(-1)))


def weights(coefs: Sequence[float], amount_QX: IntArray) -> Any:
    """``coefs . amounts`` for every X: integers if the coefficients are."""
    total: Any = np.zeros(amount_QX.shape[1], dtype=np.int64)
    for coef, amount_X in zip(coefs, amount_QX, strict=True):
        if coef:
            total = total + coef * amount_X
    return total


def forward(graph: LayeredGraph, coefs: Sequence[float]) -> list[Any]:
    """Largest weight of a path from the start to each state, the state's own block included."""
    best_LS = [weights(coefs, graph.start_QS)]
    for transition in graph.transitions:
        best_T = best_LS[-1][transition.src_T] + weights(coefs, transition.amount_QT)
        best_LS.append(np.maximum.reduceat(best_T, transition.dst_start_S))
    return best_LS


def backward(graph: LayeredGraph, coefs: Sequence[float]) -> list[Any]:
    """Largest weight of a path from each state to the end, the state's own block excluded."""
    best_LS = [np.zeros(len(graph.block_LS[-1]), dtype=np.int64)]
    for transition in reversed(graph.transitions):
        best_T = best_LS[0][transition.dst_T] + weights(coefs, transition.amount_QT)
        best_LS.insert(0, np.maximum.reduceat(best_T[transition.by_src_T], transition.src_start_S))
    return best_LS


def best_path(graph: LayeredGraph, coefs: Sequence[float]) -> tuple[float, list[int]]:
    """Weight and quantities of a heaviest path of a graph that is not empty."""
    best_LS = forward(graph, coefs)
    state = int(np.argmax(best_LS[-1]))
    weight = best_LS[-1][state]
    total_Q = np.zeros(len(graph.start_QS), dtype=np.int64)
    for layer in reversed(range(len(graph.transitions))):
        transition = graph.transitions[layer]
        start_S = transition.dst_start_S
        stop = start_S[state + 1] if state + 1 < len(start_S) else len(transition.edge_T)
        part = slice(start_S[state], stop)
        src_T = transition.src_T[part]
        amount_QT = transition.amount_QT[:, part]
        pick = int(np.argmax(best_LS[layer][src_T] + weights(coefs, amount_QT)))
        total_Q += amount_QT[:, pick]
        state = int(src_T[pick])
    return weight, [int(x) for x in total_Q + graph.start_QS[:, state]]


def limit_bounds(problem: AssemblyProblem) -> list[Bound]:
    """The budgets as bounds: exact on whole paths, and pruned by the least (most) still to come."""
    bounds = []
    for index, resource in enumerate(problem.resources, start=1):
        unit = [0] * (len(problem.resources) + 1)
        if resource.maximum is not None:
            unit[index] = -1
            bounds.append(Bound(coefs=tuple(unit), const=resource.maximum))
        if resource.minimum is not None:
            unit[index] = 1
            bounds.append(Bound(coefs=tuple(unit), const=-resource.minimum))
    return bounds


def fix(graph: LayeredGraph, bounds: Sequence[Bound], target: int) -> LayeredGraph:
    """Leave out every transition through which no path satisfies all bounds.

    Reduced-cost fixing: the best path through a transition is best-to-there + it + best-from-there.
    Repeated while it removes much, since every removal tightens the bounds of the others.
    """
    while not graph.empty:
        keep_LT = [np.ones(len(t.edge_T), dtype=bool) for t in graph.transitions]
        for bound in bounds:
            there_LS, rest_LS = forward(graph, bound.coefs), backward(graph, bound.coefs)
            threshold = bound.threshold(target)
            for layer, t in enumerate(graph.transitions):
                total_T = weights(bound.coefs, t.amount_QT)
                total_T += there_LS[layer][t.src_T]
                total_T += rest_LS[layer + 1][t.dst_T]
                keep_LT[layer] &= total_T >= threshold
        before = graph.num_transitions
        graph = restrict(graph, keep_LT)
        if graph.num_transitions >= 0.9 * before:
            break
    return graph


def _ramp(count_S: IntArray) -> IntArray:
    """0..count-1 for each entry in turn."""
    end_S = np.cumsum(count_S)
    total = int(end_S[-1]) if len(end_S) else 0
    return np.arange(total) - np.repeat(end_S - count_S, count_S)
