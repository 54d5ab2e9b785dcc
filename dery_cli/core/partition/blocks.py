"""Candidate blocks of a zoo and the exact path programs over them (Eq. 2-5).

Legend: P nodes of the whole zoo (donors one after another, node 0 included), C candidate blocks,
M donors, K blocks a donor (and equivalence sets), R restarts solved side by side.

A candidate is a block that the size limit allows and that lies on at least one way to cut its donor
into exactly K blocks. Its index is its place in one fixed order (by length, then by last node), so
every tie below is broken the same way on every machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from dery_cli.errors import InfeasibleError, UsageError

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
SizeMeasure: TypeAlias = Literal["nodes", "macs", "params"]

SLACK = 1e-9
"""Relative slack of the size limit, so that (1 + 0.2) * 10 / 4 is 3 and not 2.999."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartitionProblem:
    """What Eq. 2-5 are stated over.

    Args:
        sim_PP: Representation similarity between all nodes of the zoo, donors one after another,
            node 0 of each included. Only entries between nodes that are not node 0 are read: they
            are clamped to [0, 1]; s(node 0, node 0) = 1 and s(node 0, any other) = 0 are set here.
        units: Units n of each donor (M numbers); donor m has nodes 0..n.
        sizes: Multiply-adds or parameters of each unit of each donor (``macs``, ``params``).
        names: Donors' names, for messages.
        num_blocks: K, blocks a donor and equivalence sets.
        eps: Slack of the size limit.
        size: What the limit measures. ``nodes``: a block has at most
            max(floor((1 + eps) n / K), ceil(n / K)) units. ``macs``, ``params``: its share of its
            donor is at most (1 + eps) / K.

    Raises:
        UsageError: No donors, K below 1 or above a donor's units, negative eps, sizes missing, a
            matrix of another shape or with entries that are not finite.
    """

    sim_PP: FloatArray
    units: tuple[int, ...]
    names: tuple[str, ...]
    num_blocks: int
    eps: float = 0.2
    size: SizeMeasure = "nodes"
    sizes: tuple[npt.NDArray[Any], ...] | None = None

    def __post_init__(self) -> None:
        if not self.units:
            raise UsageError("the zoo has no models to partition", "dery zoo add SPEC")
        if self.num_blocks < 1:
            raise UsageError(
                f"cannot cut models into {self.num_blocks} blocks", "-K must be 1 or more"
            )
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise UsageError(f"--eps {self.eps:g} is not a number of 0 or more", "e.g. --eps 0.2")
        smallest = min(self.units)
        if self.num_blocks > smallest:
            name = self.names[self.units.index(smallest)]
            raise UsageError(
                f"-K {self.num_blocks} is too large: {name} has only {smallest} units",
                f"use -K {smallest} or less, or dery zoo remove {name}"
                if smallest
                else f"dery zoo remove {name}",
                details={"model": name, "units": smallest, "num_blocks": self.num_blocks},
            )
        if self.size != "nodes" and (
            self.sizes is None or tuple(len(s) for s in self.sizes) != self.units
        ):
            raise UsageError(f"--size {self.size} needs one size a unit for every donor")
        num_nodes = sum(n + 1 for n in self.units)
        if self.sim_PP.shape != (num_nodes, num_nodes):
            raise UsageError(
                f"similarity matrix is {self.sim_PP.shape}, but the zoo has {num_nodes} nodes",
                "dery sim",
            )
        if not np.isfinite(self.sim_PP).all():
            raise UsageError("similarity matrix has entries that are not finite", "dery sim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTable:
    """All candidate blocks, and the similarity they are compared by.

    Args:
        sim_PP: Similarity in [0, 1], node 0 set by Definition 3.
        units: Units of each donor.
        num_blocks: K.
        donor_C: Donor of each block.
        start_C: Its first node, counted in its donor.
        stop_C: Its last node, counted in its donor.
        in_C: Its first node, counted in the zoo.
        out_C: Its last node, counted in the zoo.
        runs: (length, first, last + 1): the blocks of one length are one stretch of indices.
        at_PL: Block index by last node and length; C where there is none.
    """

    sim_PP: FloatArray
    units: tuple[int, ...]
    num_blocks: int
    donor_C: IntArray
    start_C: IntArray
    stop_C: IntArray
    in_C: IntArray
    out_C: IntArray
    runs: tuple[tuple[int, int, int], ...]
    at_PL: IntArray

    def __len__(self) -> int:
        return len(self.donor_C)

    @functools.cached_property
    def first_M(self) -> IntArray:
        """Node 0 of each donor, counted in the zoo."""
        first: IntArray = self.last_M - np.asarray(self.units, np.int64)
        return first

    @functools.cached_property
    def last_M(self) -> IntArray:
        """Node n of each donor, counted in the zoo."""
        last: IntArray = np.cumsum(np.asarray(self.units, np.int64) + 1) - 1
        return last

    def similarity(self, blocks: IntArray, anchors: IntArray) -> FloatArray:
        """S(block, anchor) of Definition 3 for index arrays that broadcast."""
        sim = self.sim_PP
        ins = sim[self.in_C[blocks], self.in_C[anchors]]
        result: FloatArray = ins + sim[self.out_C[blocks], self.out_C[anchors]]
        return result

    def columns(self, anchors: IntArray) -> FloatArray:
        """S of all C blocks to A anchors, as (C, A)."""
        result: FloatArray = self.sim_PP[:, self.in_C[anchors]][self.in_C]
        result += self.sim_PP[:, self.out_C[anchors]][self.out_C]
        return result

    def overlaps(self, anchors: IntArray) -> tuple[IntArray, IntArray]:
        """Pairs (block, place in ``anchors``) that no cut of a donor can hold together."""
        same = self.donor_C[:, None] == self.donor_C[anchors]
        same &= self.start_C[:, None] < self.stop_C[anchors]
        same &= self.stop_C[:, None] > self.start_C[anchors]
        same[anchors, np.arange(len(anchors))] = False
        blocks, places = np.nonzero(same)
        return blocks, places


def max_share(sizes: FloatArray, num_blocks: int) -> float:
    """The smallest possible share of a donor's largest block, over all cuts into K blocks."""
    total = float(sizes.sum())
    if total == 0:
        return 0.0
    ends = np.concatenate([[0.0], np.cumsum(sizes)])
    best = ends.copy()  # best[j]: smallest largest block over nodes 0..j with k blocks
    best[0] = np.inf
    for _ in range(num_blocks - 1):
        best = np.array(
            [
                min(
                    (max(best[i], ends[j] - ends[i]) for i in range(1, j)),
                    default=np.inf,
                )
                for j in range(len(ends))
            ]
        )
    return float(best[-1]) / total


def smallest_eps(problem: PartitionProblem) -> float:
    """The smallest eps, rounded up to three decimals, that leaves every donor a partition."""
    if problem.size == "nodes":
        return 0.0
    assert problem.sizes is not None
    shares = [max_share(np.asarray(s, np.float64), problem.num_blocks) for s in problem.sizes]
    return max(0.0, math.ceil((max(shares) * problem.num_blocks - 1) * 1000 - 1e-6) / 1000)


def _allowed(problem: PartitionProblem, donor: int) -> BoolArray:
    """Blocks (start, stop) of one donor that the size limit allows, as (n + 1, n + 1)."""
    n, num_blocks = problem.units[donor], problem.num_blocks
    nodes = np.arange(n + 1)
    length = nodes[None, :] - nodes[:, None]
    if problem.size == "nodes":
        cap = max(
            math.floor((1 + problem.eps) * n / num_blocks * (1 + SLACK)), math.ceil(n / num_blocks)
        )
        return (length >= 1) & (length <= cap)
    assert problem.sizes is not None
    ends = np.concatenate([[0.0], np.cumsum(np.asarray(problem.sizes[donor], np.float64))])
    limit = (1 + problem.eps) * float(ends[-1]) * (1 + SLACK)
    within: BoolArray = (ends[None, :] - ends[:, None]) * num_blocks <= limit
    return (length >= 1) & within


def _on_a_path(allowed: BoolArray, num_blocks: int) -> BoolArray:
    """Blocks of ``allowed`` that lie on a way from node 0 to node n in exactly K blocks."""
    n = len(allowed) - 1
    ahead = np.zeros((num_blocks + 1, n + 1), bool)
    behind = np.zeros((num_blocks + 1, n + 1), bool)
    ahead[0, 0] = behind[0, n] = True
    for k in range(num_blocks):
        ahead[k + 1] = (ahead[k][:, None] & allowed).any(axis=0)
        behind[k + 1] = (behind[k][None, :] & allowed).any(axis=1)
    used = np.zeros_like(allowed)
    for k in range(num_blocks):
        used |= ahead[k][:, None] & allowed & behind[num_blocks - 1 - k][None, :]
    return used


def block_table(problem: PartitionProblem) -> BlockTable:
    """The candidate blocks of ``problem``.

    Raises:
        InfeasibleError: The size limit leaves a donor no partition; names it and the smallest eps
            that works for the whole zoo.
    """
    donors, starts, stops = [], [], []
    for m, name in enumerate(problem.names):
        used = _on_a_path(_allowed(problem, m), problem.num_blocks)
        if not used.any():
            eps = smallest_eps(problem)
            raise InfeasibleError(
                f"no partition of {name} into {problem.num_blocks} blocks keeps every block's "
                f"share of its {problem.size} within (1 + {problem.eps:g}) / {problem.num_blocks}",
                f"the smallest eps that works is {eps:g}: dery partition --size {problem.size} "
                f"-K {problem.num_blocks} --eps {eps:g}",
                details={"model": name, "smallest_eps": eps, "size": problem.size},
            )
        start, stop = np.nonzero(used)
        donors.append(np.full(len(start), m, np.int64))
        starts.append(start)
        stops.append(stop)
    return _table(problem, np.concatenate(donors), np.concatenate(starts), np.concatenate(stops))


def _table(
    problem: PartitionProblem, donor_C: IntArray, start_C: IntArray, stop_C: IntArray
) -> BlockTable:
    first = np.concatenate([[0], np.cumsum(np.asarray(problem.units) + 1)[:-1]])
    order = np.lexsort((stop_C, donor_C, stop_C - start_C))
    donor_C, start_C, stop_C = donor_C[order], start_C[order], stop_C[order]
    length_C = stop_C - start_C
    runs = []
    for length in sorted(set(length_C.tolist())):
        where = np.nonzero(length_C == length)[0]
        runs.append((length, int(where[0]), int(where[-1]) + 1))
    out_C = first[donor_C] + stop_C
    at_PL = np.full((len(problem.sim_PP), int(length_C.max()) + 1), len(order), np.int64)
    at_PL[out_C, length_C] = np.arange(len(order))
    sim_PP = np.clip(np.asarray(problem.sim_PP, np.float64), 0.0, 1.0)
    sim_PP[first, :] = 0.0
    sim_PP[:, first] = 0.0
    sim_PP[np.ix_(first, first)] = 1.0
    return BlockTable(
        sim_PP=sim_PP,
        units=problem.units,
        num_blocks=problem.num_blocks,
        donor_C=donor_C,
        start_C=start_C,
        stop_C=stop_C,
        in_C=first[donor_C] + start_C,
        out_C=out_C,
        runs=tuple(runs),
        at_PL=at_PL,
    )


def keep_blocks(table: BlockTable, kept_C: BoolArray) -> BlockTable:
    """The table of the blocks marked in ``kept_C``, in the same order."""
    runs = []
    places = np.concatenate([[0], np.cumsum(kept_C)])
    for length, first, last in table.runs:
        if places[last] > places[first]:
            runs.append((length, int(places[first]), int(places[last])))
    at_PL = np.concatenate([np.where(kept_C, places[:-1], places[-1]), [places[-1]]])[table.at_PL]
    return dataclasses.replace(
        table,
        donor_C=table.donor_C[kept_C],
        start_C=table.start_C[kept_C],
        stop_C=table.stop_C[kept_C],
        in_C=table.in_C[kept_C],
        out_C=table.out_C[kept_C],
        runs=tuple(runs),
        at_PL=at_PL,
    )


def forward(table: BlockTable, gain_CR: FloatArray) -> FloatArray:
    """Best summed gain from node 0 of its donor to every node in exactly k blocks: (K+1, P, R)."""
    best = np.full((table.num_blocks + 1, len(table.sim_PP), gain_CR.shape[1]), -np.inf)
    best[0, table.first_M] = 0.0
    for k in range(table.num_blocks):
        for length, first, last in table.runs:
            out = table.out_C[first:last]
            via = best[k, out - length]
            via += gain_CR[first:last]
            best[k + 1, out] = np.maximum(best[k + 1, out], via)
    return best


def backward(table: BlockTable, gain_CR: FloatArray) -> FloatArray:
    """Best summed gain from every node to its donor's last in exactly k blocks: (K+1, P, R)."""
    best = np.full((table.num_blocks + 1, len(table.sim_PP), gain_CR.shape[1]), -np.inf)
    best[0, table.last_M] = 0.0
    for k in range(table.num_blocks):
        for length, first, last in table.runs:
            into = table.out_C[first:last] - length
            via = best[k, into + length]
            via += gain_CR[first:last]
            best[k + 1, into] = np.maximum(best[k + 1, into], via)
    return best


def trace(table: BlockTable, gain_CR: FloatArray, best: FloatArray) -> IntArray:
    """The blocks of the best cut of every donor, as (M, K, R) block indices.

    Args:
        table: The candidate blocks.
        gain_CR: What ``forward`` was given.
        best: What ``forward`` returned; every donor must have a finite value.
    """
    restarts = np.arange(gain_CR.shape[1])
    padded = np.concatenate([gain_CR, np.full((1, len(restarts)), -np.inf)])
    node = np.repeat(table.last_M[:, None], len(restarts), axis=1)
    path = np.empty((len(table.units), table.num_blocks, len(restarts)), np.int64)
    for k in range(table.num_blocks, 0, -1):
        top = np.full(node.shape, -np.inf)
        for length, _, _ in table.runs:
            block = table.at_PL[node, length]
            value = best[k - 1, np.maximum(node - length, 0), restarts] + padded[block, restarts]
            better = value > top
            path[:, k - 1][better] = block[better]
            top[better] = value[better]
        node = table.in_C[path[:, k - 1]]
    return path


def anchor_gains(table: BlockTable, anchors_KR: IntArray) -> tuple[FloatArray, IntArray]:
    """Best gain of every block under fixed anchors, and the set it comes from: (C, R) both.

    A block that cannot stand beside an anchor of its own donor has gain -inf, so that the path
    program can only pass through the anchors themselves; an anchor belongs to its own set.
    """
    num_sets, num_restarts = anchors_KR.shape
    gain_CR = table.columns(anchors_KR[0])
    set_CR = np.zeros(gain_CR.shape, np.int64)
    for k in range(1, num_sets):
        other = table.columns(anchors_KR[k])
        better = other > gain_CR
        gain_CR[better] = other[better]
        set_CR[better] = k
    restarts = np.arange(num_restarts)
    for k in range(num_sets):
        anchors = anchors_KR[k]
        gain_CR[anchors, restarts] = table.similarity(anchors, anchors)
        set_CR[anchors, restarts] = k
    for k in range(num_sets):
        gain_CR[table.overlaps(anchors_KR[k])] = -np.inf
    return gain_CR, set_CR
