"""The assembly problem (Eq. 8-11 of Deep Model Reassembly) as integers, and its answers.

Legend: B candidate blocks, E edges between blocks of consecutive stages, K blocks of an assembly.

An assembly is a path: one block of every stage, all of different equivalence sets, consecutive ones
joined by an edge. Scores are integers in millionths, resources (params, multiply-adds, ...) are
integers in their own unit, so sums and comparisons are exact. There are no models here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dery_cli.errors import UsageError
from dery_cli.sizes import within

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MAX_SETS = 40
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
class BlockFilter:
    """A wish that leaves some blocks out, kept by name so that it can be explained.

    Args:
        name: As the user gave it, ``--license apache-2.0``.
        allowed_B: True for the blocks that may be used.
    """

    name: str
    allowed_B: BoolArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssemblyProblem:
    """Candidate blocks, the edges that join them, and what is asked of an assembly.

    Args:
        num_stages: K, the blocks of an assembly.
        num_sets: Equivalence sets; an assembly uses each at most once.
        stage_B: 0-based stage of each candidate block.
        set_B: 0-based equivalence set of each block.
        donor_B: Number of the donor of each block.
        score_B: Score of each block in millionths.
        src_E: First block of each edge.
        dst_E: Second block of each edge, one stage later.
        score_E: Score of each edge in millionths.
        resources: Params first, then FLOPs, then any other; ties in score go to the cheaper, in
            this order.
        filters: Only blocks that all of them allow are used.
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
    filters: tuple[BlockFilter, ...] = ()
    max_donors: int | None = None

    def __post_init__(self) -> None:
        for field in ("stage_B", "set_B", "donor_B", "score_B", "src_E", "dst_E", "score_E"):
            object.__setattr__(self, field, _int_array(getattr(self, field), field))
        for field in ("num_stages", "num_sets"):
            object.__setattr__(self, field, int(getattr(self, field)))
        object.__setattr__(self, "resources", tuple(self.resources))
        object.__setattr__(self, "filters", tuple(self.filters))
        if self.max_donors is not None and self.max_donors < 1:
            raise UsageError(
                f"--max-donors {self.max_donors} leaves no donor", "give --max-donors at least 1"
            )
        if not 1 <= self.num_sets <= MAX_SETS:
            raise UsageError(f"{self.num_sets} equivalence sets; 1 to {MAX_SETS} are supported")
        if self.num_stages < 1:
            raise UsageError(
                f"an assembly of {self.num_stages} blocks makes no sense", "use -K 1 or more"
            )
        num_blocks, num_edges = len(self.stage_B), len(self.src_E)
        by_block = [self.set_B, self.donor_B, self.score_B, *(r.cost_B for r in self.resources)]
        by_filter = [f.allowed_B for f in self.filters]
        by_edge = [self.dst_E, self.score_E, *(r.cost_E for r in self.resources)]
        if any(len(a) != num_blocks for a in by_block + by_filter) or any(
            len(a) != num_edges for a in by_edge
        ):
            raise ValueError("arrays over blocks (or over edges) differ in length")
        if len({r.name for r in self.resources}) != len(self.resources):
            raise ValueError("two resources have one name")
        _in_range(self.stage_B, self.num_stages, "stage_B")
        _in_range(self.set_B, self.num_sets, "set_B")
        _in_range(self.src_E, num_blocks, "src_E")
        _in_range(self.dst_E, num_blocks, "dst_E")
        if not np.array_equal(self.stage_B[self.dst_E], self.stage_B[self.src_E] + 1):
            raise ValueError("an edge does not join consecutive stages")
        for name, block, edge in self._summed():
            if self.num_stages * (_max_abs(block) + _max_abs(edge)) > _INT_LIMIT:
                raise UsageError(f"{name}: totals reach 2^53, beyond what is counted exactly")

    def _summed(self) -> list[tuple[str, IntArray, IntArray]]:
        resources = [(r.name, r.cost_B, r.cost_E) for r in self.resources]
        return [("score", self.score_B, self.score_E), *resources]

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
        for block_filter in self.filters:
            allowed_B = allowed_B & block_filter.allowed_B
        return allowed_B

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
    if not problem.allowed_B[list(assembly.blocks)].all():
        found.append("a filter leaves one of its blocks out")
    sets = [int(problem.set_B[b]) for b in assembly.blocks]
    if len(set(sets)) < len(sets):
        found.append(f"sets {sets} repeat")
    donors = {int(problem.donor_B[b]) for b in assembly.blocks}
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


def _in_range(array: IntArray, stop: int, what: str) -> None:
    if array.size and (array.min() < 0 or array.max() >= stop):
        raise ValueError(f"{what}: values must be in 0..{stop - 1}")


def _max_abs(array: IntArray) -> int:
    return int(np.abs(array).max()) if array.size else 0
