"""The assembly problem (Eq. 8-11 of Deep Model Reassembly, and beyond) as integers, with answers.

Legend: B blocks, E edges between blocks of consecutive stages, K stages.

An assembly is a path: one block of every stage, consecutive ones joined by an edge. In the paper's
space blocks are the partition's, and no two of a path are of one equivalence set. In the free space
blocks are nodes of the donors, there are no sets, and edges are segments and stitches: ``paths``
lays it out so. Scores are integers in millionths, resources (params, multiply-adds, ...) integers
in their own unit, so sums and comparisons are exact. There are no models here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dery_cli.errors import UsageError
from dery_cli.sizes import within

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MAX_SETS = 40
"""More would not fit the bits of a state; the same for sets and requirements together."""
_INT_LIMIT = 2**53


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resource:
    """Something every block and stitch costs, and the inclusive limits on its sum.

    Args:
        name: Tells it from the others.
        cost_B: Cost of each block, at least 0; the last stage's blocks include the target head.
        cost_E: Cost of each edge's stitch, at least 0.
        minimum: Least total allowed.
        maximum: Greatest total allowed.
        option: As in the option, ``params`` for ``--max-params``; the name by default. Resources
            that share one are a limit on the largest of their totals, and have maxima only.

    Raises:
        UsageError: A limit is not positive, or the minimum is above the maximum.
    """

    name: str
    cost_B: IntArray
    cost_E: IntArray
    minimum: int | None = None
    maximum: int | None = None
    option: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "option", self.option or self.name)
        object.__setattr__(self, "cost_B", _int_array(self.cost_B, f"{self.name} of blocks"))
        object.__setattr__(self, "cost_E", _int_array(self.cost_E, f"{self.name} of edges"))
        for what, cost in (("block", self.cost_B), ("edge", self.cost_E)):
            if cost.size and cost.min() < 0:
                raise UsageError(
                    f"{self.name}: {what} {int(cost.argmin())} costs {int(cost.min()):,}, below 0"
                )
        check_limits(self.option, self.minimum, self.maximum)

    def allows(self, total: int) -> bool:
        """Whether ``total`` is within both limits, to the unit."""
        return within(total, self.minimum, self.maximum)


def peak_resources(
    option: str,
    weight_B: IntArray,
    weight_E: IntArray,
    peak_B: IntArray,
    stage_B: IntArray,
    maximum: int | None,
) -> tuple[Resource, ...]:
    """A limit on the sum of all weights plus the largest single block's peak, as K resources.

    An assembly has one block of each stage, so its largest peak fits beside the weights if and only
    if every stage's does, and each of these K statements is a sum over blocks and edges.

    Args:
        option: Name of the option they share.
        weight_B: What each block adds to the sum.
        weight_E: What each edge's stitch adds.
        peak_B: Each block's peak.
        stage_B: 0-based stage of each block.
        maximum: Of the sum plus the largest peak.
    """
    return tuple(
        Resource(
            name=f"{option} at stage {stage + 1}",
            cost_B=weight_B + np.where(stage_B == stage, peak_B, 0),
            cost_E=weight_E,
            maximum=maximum,
            option=option,
        )
        for stage in range(int(stage_B.max()) + 1)
    )


def check_limits(name: str, minimum: int | None, maximum: int | None) -> None:
    """Refuse limits that no network can satisfy, before anything is loaded.

    Args:
        name: The resource, as in ``--max-NAME``.
        minimum: Least total, or None.
        maximum: Greatest total, or None.

    Raises:
        UsageError: A limit is zero or negative, or the minimum is above the maximum.
    """
    for bound, limit in (("max", maximum), ("min", minimum)):
        if limit is not None and limit <= 0:
            raise UsageError(
                f"--{bound}-{name} {limit:,} is not positive",
                f"give --{bound}-{name} a size above zero, or leave it out",
            )
    if minimum is not None and maximum is not None and minimum > maximum:
        raise UsageError(
            f"--min-{name} {minimum:,} is above --max-{name} {maximum:,}",
            f"lower --min-{name} or raise --max-{name}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """A wish that leaves some blocks or edges out, kept by name so that it can be explained.

    Args:
        name: As the user gave it, ``--license apache-2.0``.
        allowed_B: True for the blocks that may be used; None for all.
        allowed_E: True for the edges that may be used; None for all.
    """

    name: str
    allowed_B: BoolArray | None = None
    allowed_E: BoolArray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirement:
    """A wish that an assembly fulfils if one of its edges does.

    Args:
        name: As the user gave it, ``--require resnext[3:5]``.
        gives_E: True for the edges that fulfil it.
    """

    name: str
    gives_E: BoolArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssemblyProblem:
    """Candidate blocks, the edges that join them, and what is asked of an assembly.

    Args:
        num_stages: K, the blocks of an assembly.
        num_sets: Equivalence sets; an assembly uses each at most once. 0 where there are none.
        stage_B: 0-based stage of each candidate block.
        set_B: 0-based equivalence set of each block, -1 for a block of none.
        donor_B: Number of the donor of each block, -1 for what is of none.
        score_B: Score of each block in millionths.
        src_E: First block of each edge.
        dst_E: Second block of each edge, one stage later.
        score_E: Score of each edge in millionths.
        resources: Params first, then FLOPs, then any other; ties in score go to the cheaper, in
            this order.
        filters: Only what all of them allow is used.
        requirements: All are fulfilled.
        max_donors: Greatest number of different donors, or None.

    Raises:
        UsageError: ``max_donors`` or a limit makes no sense.
        ValueError: The arrays do not fit together.
    """

    num_stages: int
    num_sets: int
    stage_B: IntArray
    set_B: IntArray
    donor_B: IntArray
    score_B: IntArray
    src_E: IntArray
    dst_E: IntArray
    score_E: IntArray
    resources: tuple[Resource, ...]
    filters: tuple[Filter, ...] = ()
    requirements: tuple[Requirement, ...] = ()
    max_donors: int | None = None

    def __post_init__(self) -> None:
        for field in ("stage_B", "set_B", "donor_B", "score_B", "src_E", "dst_E", "score_E"):
            object.__setattr__(self, field, _int_array(getattr(self, field), field))
        for field in ("num_stages", "num_sets"):
            object.__setattr__(self, field, int(getattr(self, field)))
        object.__setattr__(self, "resources", tuple(self.resources))
        object.__setattr__(self, "filters", tuple(self.filters))
        object.__setattr__(self, "requirements", tuple(self.requirements))
        if self.max_donors is not None and self.max_donors < 1:
            raise UsageError(
                f"--max-donors {self.max_donors} leaves no donor", "give --max-donors at least 1"
            )
        if not 0 <= self.num_sets <= MAX_SETS - len(self.requirements):
            raise UsageError(
                f"{self.num_sets} equivalence sets and {len(self.requirements)} requirements; "
                f"up to {MAX_SETS} together are supported"
            )
        if self.num_stages < 1:
            raise UsageError(
                f"an assembly of {self.num_stages} blocks makes no sense", "use -K 1 or more"
            )
        num_blocks, num_edges = len(self.stage_B), len(self.src_E)
        by_block: list[npt.NDArray[Any]] = [
            self.set_B,
            self.donor_B,
            self.score_B,
            *(r.cost_B for r in self.resources),
        ]
        by_block += [f.allowed_B for f in self.filters if f.allowed_B is not None]
        by_edge: list[npt.NDArray[Any]] = [
            self.dst_E,
            self.score_E,
            *(r.cost_E for r in self.resources),
        ]
        by_edge += [f.allowed_E for f in self.filters if f.allowed_E is not None]
        by_edge += [r.gives_E for r in self.requirements]
        if any(len(a) != num_blocks for a in by_block) or any(len(a) != num_edges for a in by_edge):
            raise ValueError("arrays over blocks (or over edges) differ in length")
        if len({r.name for r in self.resources}) != len(self.resources):
            raise ValueError("two resources have one name")
        _in_range(self.stage_B, self.num_stages, "stage_B")
        _in_range(self.set_B, self.num_sets, "set_B", least=-1)
        _in_range(self.src_E, num_blocks, "src_E")
        _in_range(self.dst_E, num_blocks, "dst_E")
        if not np.array_equal(self.stage_B[self.dst_E], self.stage_B[self.src_E] + 1):
            raise ValueError("an edge does not join consecutive stages")
        for name, block, edge in self._summed():
            if self.max_total(block, edge) > _INT_LIMIT:
                raise UsageError(f"{name}: totals reach 2^53, beyond what is counted exactly")

    def _summed(self) -> list[tuple[str, IntArray, IntArray]]:
        resources = [(r.name, r.cost_B, r.cost_E) for r in self.resources]
        return [("score", self.score_B, self.score_E), *resources]

    def max_total(self, per_B: IntArray, per_E: IntArray) -> int:
        """No assembly's total of a quantity is above this in absolute value."""
        most_K = np.zeros(self.num_stages, dtype=np.int64)
        np.maximum.at(most_K, self.stage_B, np.abs(per_B))
        joint_K = np.zeros(self.num_stages, dtype=np.int64)
        np.maximum.at(joint_K, self.stage_B[self.src_E], np.abs(per_E))
        return sum(most_K.tolist()) + sum(joint_K.tolist())

    @property
    def num_blocks(self) -> int:
        return len(self.stage_B)

    @property
    def num_edges(self) -> int:
        return len(self.src_E)

    @property
    def allowed_B(self) -> BoolArray:
        """The blocks that every filter allows."""
        allowed_B: BoolArray = np.ones(self.num_blocks, dtype=bool)
        for wish in self.filters:
            if wish.allowed_B is not None:
                allowed_B = allowed_B & wish.allowed_B
        return allowed_B

    @property
    def allowed_E(self) -> BoolArray:
        """The edges that every filter allows, their blocks included."""
        allowed_B = self.allowed_B
        allowed_E: BoolArray = allowed_B[self.src_E] & allowed_B[self.dst_E]
        for wish in self.filters:
            if wish.allowed_E is not None:
                allowed_E &= wish.allowed_E
        return allowed_E

    @property
    def num_bits(self) -> int:
        """Of a state: one a set, then one a requirement."""
        return self.num_sets + len(self.requirements)

    @property
    def set_bit_B(self) -> IntArray:
        """The bit of each block's set, 0 for a block of none."""
        bit_B = np.left_shift(np.int64(1), np.maximum(self.set_B, 0))
        return np.where(self.set_B < 0, 0, bit_B)

    @property
    def given_bits_E(self) -> IntArray:
        """The bits of the requirements that each edge fulfils."""
        bits_E = np.zeros(self.num_edges, dtype=np.int64)
        for number, requirement in enumerate(self.requirements, start=self.num_sets):
            bits_E |= np.where(requirement.gives_E, np.int64(1) << number, 0)
        return bits_E

    @property
    def required_bits(self) -> int:
        """The bits of all requirements."""
        return (1 << self.num_bits) - (1 << self.num_sets)

    def total(self, option: str, costs: Sequence[int]) -> int | None:
        """Of an assembly's costs what counts against an option; None where there is none."""
        found = [c for r, c in zip(self.resources, costs, strict=True) if r.option == option]
        return max(found, default=None)

    def with_limits(self, **limits: tuple[int | None, int | None]) -> AssemblyProblem:
        """The same problem with other (minimum, maximum) of the named resources."""
        unknown = limits.keys() - {r.name for r in self.resources}
        if unknown:
            raise ValueError(f"no resource {sorted(unknown)}")
        changed = tuple(
            dataclasses.replace(r, minimum=limits[r.name][0], maximum=limits[r.name][1])
            if r.name in limits
            else r
            for r in self.resources
        )
        return dataclasses.replace(self, resources=changed)

    def without_limits(self) -> AssemblyProblem:
        """The same problem with no budget at all."""
        return self.with_limits(**{r.name: (None, None) for r in self.resources})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembly:
    """One answer.

    Args:
        blocks: The K block numbers, in stage order.
        edges: The K - 1 edge numbers that join them.
        score: Total score in millionths.
        costs: Totals of the problem's resources, in their order.
    """

    blocks: tuple[int, ...]
    edges: tuple[int, ...]
    score: int
    costs: tuple[int, ...]

    @property
    def order(self) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Ascending key of the deterministic order: score down, costs up, block numbers up."""
        return (-self.score, self.costs, self.blocks, self.edges)


def recount(problem: AssemblyProblem, blocks: Sequence[int], edges: Sequence[int]) -> Assembly:
    """Add up an assembly in Python integers.

    Args:
        problem: Where the numbers come from.
        blocks: K block numbers in stage order.
        edges: K - 1 edge numbers.

    Raises:
        ValueError: The blocks are not one per stage, or an edge does not join its neighbours.
    """
    stages = [int(problem.stage_B[b]) for b in blocks]
    joined = [(int(problem.src_E[e]), int(problem.dst_E[e])) for e in edges]
    if stages != list(range(problem.num_stages)):
        raise ValueError(f"blocks {list(blocks)} are of stages {stages}")
    if joined != list(itertools.pairwise(blocks)):
        raise ValueError(f"edges {list(edges)} do not join blocks {list(blocks)}")
    return Assembly(
        blocks=tuple(int(b) for b in blocks),
        edges=tuple(int(e) for e in edges),
        score=sum(int(problem.score_B[b]) for b in blocks)
        + sum(int(problem.score_E[e]) for e in edges),
        costs=tuple(
            sum(int(r.cost_B[b]) for b in blocks) + sum(int(r.cost_E[e]) for e in edges)
            for r in problem.resources
        ),
    )


def violations(problem: AssemblyProblem, assembly: Assembly) -> list[str]:
    """What of the problem an assembly breaks, in words; empty if nothing."""
    found = []
    allowed = all(
        (f.allowed_B is None or f.allowed_B[list(assembly.blocks)].all())
        and (f.allowed_E is None or f.allowed_E[list(assembly.edges)].all())
        for f in problem.filters
    )
    if not allowed:
        found.append("a filter leaves one of its parts out")
    sets = [int(problem.set_B[b]) for b in assembly.blocks if problem.set_B[b] >= 0]
    if len(set(sets)) < len(sets):
        found.append(f"sets {sets} repeat")
    found += [
        f"{wish.name} is not fulfilled"
        for wish in problem.requirements
        if not wish.gives_E[list(assembly.edges)].any()
    ]
    donors = {int(problem.donor_B[b]) for b in assembly.blocks} - {-1}
    if problem.max_donors is not None and len(donors) > problem.max_donors:
        found.append(f"{len(donors)} donors, at most {problem.max_donors} allowed")
    for resource, total in zip(problem.resources, assembly.costs, strict=True):
        if not resource.allows(total):
            limits = f"[{resource.minimum}, {resource.maximum}]"
            found.append(f"{resource.name} {total} outside {limits}")
    return found


def _int_array(values: object, what: str) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{what}: expected one dimension, found {array.ndim}")
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{what}: expected integers, found {array.dtype}")
    return array.astype(np.int64, copy=False)


def _in_range(array: IntArray, stop: int, what: str, *, least: int = 0) -> None:
    if array.size and (array.min() < least or array.max() >= stop):
        raise ValueError(f"{what}: values must be in {least}..{stop - 1}")
