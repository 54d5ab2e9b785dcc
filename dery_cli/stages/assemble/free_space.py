"""The free space of a zoo: its nodes, segments, stitches and heads, with their exact costs.

Legend: V nodes of all donors, node 0 of each included; G segments; J stitches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dery_cli.core.assembly.notation import parse_network, parse_piece
from dery_cli.core.assembly.paths import (
    Limits,
    Parts,
    PathProblem,
    Peak,
    Pin,
    Space,
    path_problem,
)
from dery_cli.core.assembly.problem import Assembly, AssemblyProblem, IntArray
from dery_cli.core.cost.latency import shapes_of
from dery_cli.core.stitching.network import head_inputs
from dery_cli.core.stitching.stitch import stitch_cost
from dery_cli.errors import InfeasibleError, UsageError
from dery_cli.stages.assemble.candidates import Candidate, Proof
from dery_cli.stages.assemble.config import AssembleConfig, DonorFilter
from dery_cli.stages.assemble.explain import explain_infeasible
from dery_cli.stages.assemble.setting import MICRO, Setting, best_of
from dery_cli.types import Anatomy, Node, StitchKind
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.whole import head_cost, zoo_nodes

FloatArray = npt.NDArray[np.float64]

MOST_PAIRS = 4_000_000
"""Beyond so many pairs of nodes each node keeps its best partners only."""

POOL = 128
"""Best of each program that candidates are taken from."""

MANY_DONORS = 64
"""In a larger zoo the best that end in each donor are not asked for one donor at a time."""

PARTNERS = 16
"""Best-scored nodes that a stitch may lead to, from each node, in a zoo beyond ``MOST_PAIRS``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathScores:
    """What the parts of a path are thought to be worth; node 0 of every donor counts too.

    Args:
        head_V: Of a path that ends at a node.
        stitch_VV: Of a stitch from a node (row) to a node (column).
        unit_V: Of the unit that ends at a node; 0 at nodes 0.
        last_unit_V: The same, beside it, in a path's last segment.
    """

    head_V: FloatArray
    stitch_VV: FloatArray
    unit_V: FloatArray
    last_unit_V: FloatArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeSpace:
    """A zoo's paths, for ``core.assembly.paths``.

    Args:
        space: Donors, segments, stitches, heads.
        nodes: Of every donor, one after another.
        dropped: The best score of a stitch that was left out for its number; None where none was.
    """

    space: Space
    nodes: tuple[Node, ...]
    dropped: float | None


def build_space(
    zoo: Zoo,
    *,
    max_stitches: int,
    kind: StitchKind,
    num_classes: int | None,
    scores: PathScores | None = None,
) -> FreeSpace:
    """All that paths through a zoo are made of.

    Args:
        zoo: The donors.
        max_stitches: Of a path.
        kind: What stitches are made of.
        num_classes: Of the head; None without one.
        scores: Of the parts; zero everywhere by default.
    """
    anatomies = [zoo[name].anatomy for name in zoo.names()]
    nodes = tuple(zoo_nodes(zoo))
    counts = [len(anatomy.nodes) for anatomy in anatomies]
    first_D = np.concatenate([[0], np.cumsum(counts)])
    donor_V = np.repeat(np.arange(len(counts)), counts)
    index_V = np.arange(len(nodes)) - first_D[donor_V]
    if scores is None:
        none_V = np.zeros(len(nodes))
        scores = PathScores(
            head_V=none_V, stitch_VV=np.zeros((len(nodes),) * 2), unit_V=none_V, last_unit_V=none_V
        )
    src_J, dst_J = _pairs(donor_V, index_V, np.array(counts)[donor_V] - 1)
    src_J, dst_J, dropped = _best_partners(src_J, dst_J, scores.stitch_VV)
    segments = _segments(anatomies, first_D, scores.unit_V)
    space = Space(
        donors=tuple(zoo.names()),
        num_nodes=tuple(counts),
        segments=segments,
        stitches=_stitches(nodes, src_J, dst_J, kind, scores),
        heads=_heads(nodes, np.flatnonzero(index_V > 0), num_classes, scores.head_V),
        max_stitches=max_stitches,
        last_score_G=_along(scores.last_unit_V, segments.src, segments.dst),
    )
    return FreeSpace(space=space, nodes=nodes, dropped=dropped)


def _pairs(donor_V: IntArray, index_V: IntArray, last_V: IntArray) -> tuple[IntArray, IntArray]:
    """From any node but the image to any node that a segment can begin at, never backward."""
    src_J, dst_J = (
        axis.ravel() for axis in np.meshgrid(*[np.arange(len(donor_V))] * 2, indexing="ij")
    )
    usable = (index_V[src_J] > 0) & (index_V[dst_J] > 0) & (index_V[dst_J] < last_V[dst_J])
    usable &= (donor_V[src_J] != donor_V[dst_J]) | (dst_J >= src_J)
    return src_J[usable], dst_J[usable]


def _best_partners(
    src_J: IntArray, dst_J: IntArray, score_VV: FloatArray
) -> tuple[IntArray, IntArray, float | None]:
    """All pairs of a small zoo; of a large one the best of each source, and the best left out."""
    if len(src_J) <= MOST_PAIRS:
        return src_J, dst_J, None
    order = np.lexsort([dst_J, -score_VV[src_J, dst_J], src_J])
    src_J, dst_J = src_J[order], dst_J[order]
    begins = np.flatnonzero(np.diff(src_J, prepend=-1))
    rank = np.arange(len(src_J)) - np.repeat(begins, np.diff(np.append(begins, len(src_J))))
    kept = rank < PARTNERS
    dropped = float(score_VV[src_J[~kept], dst_J[~kept]].max())
    return src_J[kept], dst_J[kept], dropped


def _segments(anatomies: Sequence[Anatomy], first_D: IntArray, unit_V: FloatArray) -> Parts:
    src, dst, params, flops = [], [], [], []
    for anatomy, first in zip(anatomies, first_D.tolist(), strict=False):
        start, stop = np.triu_indices(len(anatomy.nodes), 1)
        src.append(first + start)
        dst.append(first + stop)
        of_units = np.cumsum([node.params for node in anatomy.nodes])
        work = np.cumsum([node.flops for node in anatomy.nodes])
        cost = of_units[stop] - of_units[start]
        if anatomy.shared:
            pairs = zip(start.tolist(), stop.tolist(), strict=True)
            cost = np.array([anatomy.params(i, j) for i, j in pairs])
        params.append(cost)
        flops.append(work[stop] - work[start])
    src_G, dst_G = np.concatenate(src), np.concatenate(dst)
    return Parts(
        src=src_G,
        dst=dst_G,
        score=_along(unit_V, src_G, dst_G),
        costs={
            "params": np.concatenate(params).astype(np.int64),
            "flops": np.concatenate(flops).astype(np.int64),
        },
    )


def _along(unit_V: FloatArray, src_G: IntArray, dst_G: IntArray) -> IntArray:
    """The sums over the units of segments, in millionths."""
    upto_V = np.cumsum(unit_V)
    return np.round(MICRO * (upto_V[dst_G] - upto_V[src_G])).astype(np.int64)


def _stitches(
    nodes: Sequence[Node], src_J: IntArray, dst_J: IntArray, kind: StitchKind, scores: PathScores
) -> Parts:
    shape_V, examples = shapes_of(nodes)
    table = [[stitch_cost(a, b, kind) for b in examples] for a in examples]
    params = np.array([[cost.params for cost in row] for row in table], dtype=np.int64)
    flops = np.array([[cost.flops for cost in row] for row in table], dtype=np.int64)
    cells = (shape_V[src_J], shape_V[dst_J])
    score_J = scores.stitch_VV[src_J, dst_J]
    return Parts(
        src=src_J,
        dst=dst_J,
        score=np.round(MICRO * score_J).astype(np.int64),
        costs={"params": params[cells], "flops": flops[cells]},
    )


def _heads(
    nodes: Sequence[Node], places: IntArray, num_classes: int | None, score_V: FloatArray
) -> Parts:
    costs = [head_cost(head_inputs(nodes[v]), num_classes) for v in places.tolist()]
    return Parts(
        src=places,
        dst=places,
        score=np.round(MICRO * score_V[places]).astype(np.int64),
        costs={
            "params": np.array([cost.params for cost in costs], dtype=np.int64),
            "flops": np.array([cost.flops for cost in costs], dtype=np.int64),
        },
    )


class PathSearch:
    """The program over a zoo's paths.

    Args:
        setting: Donors, target, options.
        advance: Called once a segment whose memory was computed.
    """

    def __init__(self, setting: Setting, advance: Callable[[], None] = lambda: None) -> None:
        self.setting, self._advance = setting, advance
        self._left_out = left_out(setting.zoo, setting.config.donors)
        self._pins = pins_of(setting.config, setting.zoo)
        self.free, self.stated = self._state(None)

    def _state(self, scores: PathScores | None) -> tuple[FreeSpace, PathProblem]:
        setting, config = self.setting, self.setting.config
        free = build_space(
            setting.costed,
            max_stitches=config.max_stitches,
            kind=setting.stitch,
            num_classes=setting.num_classes,
            scores=scores,
        )
        budget = config.budget
        limits = {
            "params": Limits(minimum=budget.min_params, maximum=budget.max_params),
            "flops": Limits(minimum=budget.min_flops, maximum=budget.max_flops),
        }
        space, peak = free.space, None
        if setting.latency is not None:
            space = with_costs(space, "latency", setting.latency.parts(space))
            limits["latency"] = Limits(maximum=budget.max_latency)
        if setting.memory is not None:
            assert budget.max_memory is not None
            weights, peak_G, last_G = setting.memory.parts(
                space, free.nodes, set().union(*self._left_out.values()), self._advance
            )
            space = with_costs(space, "memory", weights)
            peak = Peak(option="memory", peak_G=peak_G, last_G=last_G, maximum=budget.max_memory)
        stated = path_problem(
            space,
            limits,
            peak=peak,
            pins=self._pins,
            excluded=self._left_out,
            whole=config.whole,
            max_donors=config.max_donors,
        )
        return dataclasses.replace(free, space=space), stated

    def use_scores(self, scores: PathScores) -> None:
        """Let the program rank by these."""
        self.free, self.stated = self._state(scores)

    @property
    def problem(self) -> AssemblyProblem:
        return self.stated.problem

    def candidate(self, assembly: Assembly) -> Candidate:
        refs = self.stated.network(assembly)
        return Candidate(
            refs=refs,
            sets=None,
            params=assembly.costs[0],
            flops=assembly.costs[1],
            program_score=assembly.score / MICRO,
            latency=self.problem.total("latency", assembly.costs),
            memory=self.problem.total("memory", assembly.costs),
            whole=self.setting.is_whole(refs),
        )

    def proof(self, offset: float) -> Proof:
        """What is proven of the program as it stands; ``offset`` leads from sums to outcomes."""
        _, proof = self.setting.solved(self.problem, POOL)
        bound = proof["upper_bound"]
        return {**proof, "upper_bound": None if bound is None else bound + offset}

    def check_budget(self) -> None:
        if best_of(self.problem, 1, self.setting.config).best is None:
            raise explain_infeasible(self.problem, self.setting)

    def candidates(self) -> tuple[list[Candidate], Proof]:
        """The best of the program, spread over the sequences of donors.

        The best of all paths may be many versions of one; so the best that end in each donor, and
        of few stitches, are asked for too, and the sequences of donors then take turns.
        """
        ranked, proof = self.setting.solved(self.problem, POOL)
        if not ranked:
            raise explain_infeasible(self.problem, self.setting)
        others = [self.stated.with_stitches(most) for most in range(self._most_stitches)]
        if len(self.setting.zoo) <= MANY_DONORS:
            others += [self.stated.ending_in(name) for name in self.setting.zoo.names()]
        for problem in others:
            ranked += best_of(problem, POOL, self.setting.config).assemblies
        ranked = sorted(set(ranked), key=lambda assembly: assembly.order)
        return in_turns([self.candidate(assembly) for assembly in ranked]), proof

    @property
    def _most_stitches(self) -> int:
        return self.setting.config.max_stitches

    def best_slice(self) -> Candidate | None:
        """The best of the program that is of one donor and no whole donor."""
        found = best_of(self.stated.within_one_donor(), POOL, self.setting.config)
        slices = (self.candidate(assembly) for assembly in found.assemblies)
        return next((candidate for candidate in slices if not candidate.whole), None)


def in_turns(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates in another order: the best of each sequence of donors, then the second, ..."""
    turn_of: dict[tuple[str, ...], int] = {}
    turns: list[tuple[int, int]] = []
    for place, candidate in enumerate(candidates):
        turn = turn_of.get(candidate.sequence, 0)
        turn_of[candidate.sequence] = turn + 1
        turns.append((turn, place))
    return [candidates[place] for _, place in sorted(turns)]


def with_costs(space: Space, name: str, costs: tuple[IntArray, IntArray, IntArray]) -> Space:
    """A space whose segments, stitches and heads have one more cost."""
    parts = (space.segments, space.stitches, space.heads)
    segments, stitches, heads = (
        dataclasses.replace(part, costs={**part.costs, name: cost})
        for part, cost in zip(parts, costs, strict=True)
    )
    return dataclasses.replace(space, segments=segments, stitches=stitches, heads=heads)


def left_out(zoo: Zoo, donors: DonorFilter) -> dict[str, list[str]]:
    """The donors that each option leaves out, by the option."""
    found: dict[str, list[str]] = {}
    for name, donor in zoo.donors.items():
        for option in donors.reasons(donor):
            found.setdefault(option, []).append(name)
    return dict(sorted(found.items()))


def pins_of(config: AssembleConfig, zoo: Zoo) -> list[Pin]:
    """The pieces that options name.

    Raises:
        UsageError: A donor is not in the zoo, or has no such piece.
    """
    given = [
        *(("start", text) for text in (config.start,) if text),
        *(("end", text) for text in (config.end,) if text),
        *(("require", text) for text in config.require),
        *(("exclude", text) for text in config.exclude),
    ]
    anatomies = {name: zoo[name].anatomy for name in zoo.names()}
    pins = []
    for kind, text in given:
        piece = parse_piece(text, anatomies)
        if kind == "start" and piece.start:
            raise UsageError(
                f"--start {text}: a network begins at a donor's node 0",
                f"--start '{piece.donor}[0:{piece.stop}]'",
            )
        bare = "[" not in text
        pins.append(
            Pin(
                kind=kind,
                name=f"--{kind} '{text}'",
                donor=piece.donor,
                start=None if bare else piece.start,
                stop=None if bare else piece.stop,
            )
        )
    return pins


def named_network(setting: Setting) -> Candidate:
    """The network that ``--blocks`` spells out.

    Raises:
        UsageError: A piece of it is wrong.
        InfeasibleError: It is not within the budget.
    """
    assert setting.config.blocks is not None
    anatomies = {name: setting.zoo[name].anatomy for name in setting.zoo.names()}
    candidate = setting.priced(parse_network(setting.config.blocks, anatomies))
    if not setting.admits(candidate):
        raise InfeasibleError(
            f"{candidate} has {candidate.params:,} params and {candidate.flops:,} multiply-adds, "
            f"which is not within {setting.config.budget}",
            "change the limits, or leave them out",
        )
    return candidate
