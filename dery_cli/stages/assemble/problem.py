"""From the artifacts of embed, sim and partition to the numbers of the assembly program.

Blocks get their gains (probe accuracy at the end less that at the beginning), edges the R2 of the
linear stitch between their nodes, both their exact costs; ``core.assemble`` does the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dery_cli.core.assembly.solve import AssemblyProblem, Filter, Resource
from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.similarity.features import probe_features
from dery_cli.core.stitching.joint_r2 import joint_r2, joint_score
from dery_cli.core.stitching.network import needs_stitch
from dery_cli.core.stitching.probe import probe_accuracy
from dery_cli.core.stitching.stitch import StitchCost, stitch_cost
from dery_cli.stages.assemble.config import AssembleConfig, DonorFilter
from dery_cli.stages.embed.store import Embeddings
from dery_cli.types import BlockRef, Node, StitchKind
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.whole import head_cost

MICRO = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedBlock:
    """A block of the partition with its stage index and equivalence set (both from 0)."""

    ref: BlockRef
    stage: int
    set_index: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint:
    """A joint the program may use.

    Args:
        cost: Of the stitch; nothing where the blocks are neighbours in one donor.
        r2: Cross-validated R2 of the linear stitch; 1 without a stitch.
    """

    cost: StitchCost
    r2: float


def boundary_nodes(blocks: Sequence[PlacedBlock]) -> dict[str, list[int]]:
    """The nodes at which each donor's blocks begin and end, node 0 left out."""
    nodes: dict[str, set[int]] = {}
    for block in blocks:
        nodes.setdefault(block.ref.donor, set()).update((block.ref.start, block.ref.stop))
    return {donor: sorted(found - {0}) for donor, found in nodes.items()}


def node_of(zoo: Zoo, donor: str, index: int) -> Node:
    """A registered node."""
    return zoo[donor].anatomy.nodes[index]


def probe_nodes(
    dissection: Dissection,
    nodes: Sequence[int],
    batches: Iterator[Tensor],
    labels: Sequence[int],
    num_classes: int,
) -> dict[int, float]:
    """Cross-validated probe accuracy q at some nodes of a donor, in one pass over the images."""
    wanted = set(nodes)
    kept: dict[int, list[Tensor]] = {index: [] for index in nodes}
    with torch.inference_mode():
        for x in batches:
            for index, raw in enumerate(dissection.features(x)):
                if index not in wanted:
                    continue
                node = dissection.anatomy.nodes[index]
                kept[index].append(probe_features(raw, node))
    label_N = torch.tensor(list(labels))
    return {
        index: probe_accuracy(torch.cat(parts), label_N, num_classes)
        for index, parts in kept.items()
    }


def joint_costs(
    blocks: Sequence[PlacedBlock], zoo: Zoo, kind: StitchKind
) -> dict[tuple[int, int], Joint]:
    """The joints between blocks of consecutive stages, by block numbers, with R2 taken as 1."""
    joints: dict[tuple[int, int], Joint] = {}
    for number, block in enumerate(blocks):
        for follower, after in enumerate(blocks):
            if after.stage != block.stage + 1:
                continue
            cost = StitchCost(0, 0)
            if needs_stitch(block.ref, after.ref):
                source = node_of(zoo, block.ref.donor, block.ref.stop)
                cost = stitch_cost(source, node_of(zoo, after.ref.donor, after.ref.start), kind)
            joints[number, follower] = Joint(cost=cost, r2=1.0)
    return joints


def score_joints(
    blocks: Sequence[PlacedBlock],
    embeddings: Embeddings,
    advance: Callable[[], None],
) -> dict[tuple[int, int], float]:
    """R2 of the linear stitch of every joint between blocks of consecutive stages.

    It is 1 where none is needed.

    Args:
        blocks: Candidate blocks; their positions are the numbers.
        embeddings: Grid features of the donors.
        advance: Called once a source block.
    """
    zoo = embeddings.zoo
    features = _GridFeatures(embeddings)
    found: dict[tuple[int, int], float] = {}
    for number, block in enumerate(blocks):
        stitched: dict[int, tuple[Node, Tensor]] = {}
        for follower, after in enumerate(blocks):
            if after.stage != block.stage + 1:
                continue
            if needs_stitch(block.ref, after.ref):
                place = (after.ref.donor, after.ref.start)
                stitched[follower] = (node_of(zoo, *place), features(*place))
            else:
                found[number, follower] = 1.0
        if stitched:
            place = (block.ref.donor, block.ref.stop)
            scores = joint_r2(node_of(zoo, *place), features(*place), stitched)
            found.update({(number, follower): r2 for follower, r2 in scores.items()})
        advance()
    return found


class _GridFeatures:
    """Grid features by donor and node, read once."""

    def __init__(self, embeddings: Embeddings) -> None:
        self._embeddings = embeddings
        self._kept: dict[tuple[str, int], Tensor] = {}

    def __call__(self, donor: str, node: int) -> Tensor:
        key = (donor, node)
        if key not in self._kept:
            self._kept[key] = self._embeddings.whole(donor, node, "feat_NGC")
        return self._kept[key]


def build_problem(
    blocks: Sequence[PlacedBlock],
    zoo: Zoo,
    joints: Mapping[tuple[int, int], Joint],
    gains: Mapping[BlockRef, float] | None,
    *,
    num_classes: int | None,
    config: AssembleConfig,
    more: Sequence[Resource] = (),
) -> AssemblyProblem:
    """The program of Eq. 8-11 in integers.

    Score: the summed gains of the blocks (where there are labels) plus ``config.joint_weight``
    times the summed log max(R2, 0.01) of the joints, rounded to millionths.

    Args:
        blocks: Candidate blocks.
        zoo: Their donors.
        joints: Between blocks of consecutive stages, by block numbers.
        gains: Of the blocks; None without labels.
        num_classes: Of the head; None without one.
        config: Budget, filters and weights.
        more: Resources beside params and flops, edges in the order of ``sorted(joints)``.
    """
    last_stage = max(block.stage for block in blocks)
    donors = {name: number for number, name in enumerate(zoo.names())}
    params_B, flops_B = [], []
    for block in blocks:
        anatomy = zoo[block.ref.donor].anatomy
        extra = StitchCost(0, 0)
        if block.stage == last_stage:
            extra = head_cost(anatomy.nodes[-1].num_chs, num_classes)
        params_B.append(anatomy.params(block.ref.start, block.ref.stop) + extra.params)
        flops_B.append(anatomy.flops(block.ref.start, block.ref.stop) + extra.flops)
    pairs = sorted(joints)
    costs = [joints[pair].cost for pair in pairs]
    weight = config.joint_weight if gains is not None else 1.0
    score_B = [0 if gains is None else round(MICRO * gains[b.ref]) for b in blocks]
    score_E = [round(MICRO * weight * joint_score(joints[pair].r2)) for pair in pairs]
    budget = config.budget
    return AssemblyProblem(
        num_stages=last_stage + 1,
        num_sets=1 + max(block.set_index for block in blocks),
        stage_B=np.array([b.stage for b in blocks], dtype=np.int64),
        set_B=np.array([b.set_index for b in blocks], dtype=np.int64),
        donor_B=np.array([donors[b.ref.donor] for b in blocks], dtype=np.int64),
        score_B=np.array(score_B, dtype=np.int64),
        src_E=np.array([pair[0] for pair in pairs], dtype=np.int64),
        dst_E=np.array([pair[1] for pair in pairs], dtype=np.int64),
        score_E=np.array(score_E, dtype=np.int64),
        resources=(
            Resource(
                name="params",
                cost_B=np.array(params_B, dtype=np.int64),
                cost_E=np.array([c.params for c in costs], dtype=np.int64),
                minimum=budget.min_params,
                maximum=budget.max_params,
            ),
            Resource(
                name="flops",
                cost_B=np.array(flops_B, dtype=np.int64),
                cost_E=np.array([c.flops for c in costs], dtype=np.int64),
                minimum=budget.min_flops,
                maximum=budget.max_flops,
            ),
            *more,
        ),
        filters=donor_filters(blocks, zoo, config.donors),
        max_donors=config.max_donors,
    )


def donor_filters(
    blocks: Sequence[PlacedBlock], zoo: Zoo, donors: DonorFilter
) -> tuple[Filter, ...]:
    """The blocks that each of the options about donors leaves in, by option."""
    reasons = {name: donors.reasons(donor) for name, donor in zoo.donors.items()}
    options = sorted({option for found in reasons.values() for option in found})
    return tuple(
        Filter(
            name=option,
            allowed_B=np.array([option not in reasons[block.ref.donor] for block in blocks]),
        )
        for option in options
    )


def merged(refs: Sequence[BlockRef]) -> tuple[BlockRef, ...]:
    """The blocks with neighbours of one donor joined, so that equal networks compare equal."""
    out: list[BlockRef] = []
    for ref in refs:
        if out and not needs_stitch(out[-1], ref):
            out[-1] = BlockRef(ref.donor, out[-1].start, ref.stop)
        else:
            out.append(ref)
    return tuple(out)


def geometric_mean(values: Sequence[float]) -> float | None:
    """Of the joints' R2, as a summary of an assembly; None where there is no joint."""
    if not values:
        return None
    return math.exp(sum(joint_score(value) for value in values) / len(values))
