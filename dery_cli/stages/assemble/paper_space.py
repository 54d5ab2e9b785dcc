"""The paper's space: the partition's blocks, one a stage and a set (Eq. 8-11).

Blocks get their gains (probe accuracy at the end less that at the beginning), edges the R2 of the
linear stitch between their nodes, both their exact costs; ``core.assembly`` does the rest. Whole
models within the budget join its best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dery_cli.core.assembly.frontier import random_feasible
from dery_cli.core.assembly.notation import merged, needs_stitch
from dery_cli.core.assembly.problem import Assembly, AssemblyProblem, Filter, Resource
from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.similarity.features import probe_features
from dery_cli.core.stitching.joint_r2 import joint_r2, joint_score
from dery_cli.core.stitching.probe import probe_accuracy
from dery_cli.core.stitching.stitch import StitchCost, stitch_cost
from dery_cli.stages.assemble.candidates import Candidate, Proof, unique
from dery_cli.stages.assemble.config import AssembleConfig, DonorFilter
from dery_cli.stages.assemble.costs import block_resources
from dery_cli.stages.assemble.explain import explain_infeasible
from dery_cli.stages.assemble.setting import MICRO, Setting, best_of
from dery_cli.stages.embed.store import Embeddings
from dery_cli.stages.partition.store import StoredPartition
from dery_cli.types import BlockRef, Node, StitchKind
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.whole import head_cost

CANDIDATES = 32
"""Best of the program that are built."""

MOST_DRAWN, TRIES = 128, 4
"""Networks that are drawn at random at most, and draws for each: some come twice."""

JOINT_WEIGHT = 0.1
"""Of the joints' log R2 beside the blocks' gains."""


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

    Score: the summed gains of the blocks (where there are labels) plus ``JOINT_WEIGHT``
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
    weight = JOINT_WEIGHT if gains is not None else 1.0
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


def placed_blocks(stored: StoredPartition) -> list[PlacedBlock]:
    """The partition's blocks, stage by stage, donors in order."""
    blocks = [
        PlacedBlock(ref=stored.block(donor, stage), stage=stage, set_index=index)
        for donor, sets in enumerate(stored.partition.sets)
        for stage, index in enumerate(sets)
    ]
    return sorted(blocks, key=lambda block: (block.stage, block.ref))


DRAWN: Proof = {
    "upper_bound": None,
    "optimal": True,
    "complete": False,
    "solver": "not asked",
    "solver_agrees": True,
    "agreement": "candidates were drawn at random",
}


class PaperSpace:
    """The program over a partition, and the whole models beside it.

    Args:
        setting: Donors, target, options.
        partition: Of the same donors.
    """

    def __init__(self, setting: Setting, partition: StoredPartition) -> None:
        self.setting, self.partition = setting, partition
        self.blocks = placed_blocks(partition)
        self._joints = joint_costs(self.blocks, setting.zoo, setting.stitch)
        self.problem = self._stated(None, self._joints)

    def _stated(
        self,
        gains: Mapping[BlockRef, float] | None,
        joints: Mapping[tuple[int, int], Joint],
    ) -> AssemblyProblem:
        setting = self.setting
        return build_problem(
            self.blocks,
            setting.costed,
            joints,
            gains,
            num_classes=setting.num_classes,
            config=setting.config,
            more=block_resources(
                setting.latency,
                setting.memory,
                setting.config.budget,
                [block.ref for block in self.blocks],
                np.array([block.stage for block in self.blocks], dtype=np.int64),
                sorted(joints),
            ),
        )

    def scores(self, advance: Callable[[str], None]) -> dict[str, Any]:
        """Gains and joints as the scores artifact keeps them: no budget or filter enters.

        Args:
            advance: Called ``num_scores`` times with what was done.
        """
        gains = self._gains(lambda: advance("probing blocks"))
        embeddings = self.setting.embeddings
        joints = score_joints(self.blocks, embeddings, lambda: advance("scoring joints"))
        return {
            "gains": None
            if gains is None
            else [[b.ref.donor, b.ref.start, b.ref.stop, gains[b.ref]] for b in self.blocks],
            "joints": [[*pair, r2] for pair, r2 in sorted(joints.items())],
        }

    @property
    def num_scores(self) -> int:
        labelled = self.setting.target.labels is not None
        return len(self.setting.zoo) * labelled + len(self.blocks)

    def use_scores(self, scores: Mapping[str, Any]) -> None:
        """Let the program rank by the scores artifact's data."""
        gains = None
        if scores["gains"] is not None:
            gains = {BlockRef(*entry[:3]): float(entry[3]) for entry in scores["gains"]}
        joints = dict(self._joints)
        for before, after, r2 in scores["joints"]:
            joints[before, after] = dataclasses.replace(joints[before, after], r2=r2)
        self.problem = self._stated(gains, joints)

    def _gains(self, advance: Callable[[], None]) -> dict[BlockRef, float] | None:
        """Probe accuracy gained by every block; None without labels."""
        setting = self.setting
        labels, num_classes = setting.target.labels, setting.num_classes
        if labels is None or num_classes is None:
            return None
        accuracy: dict[tuple[str, int], float] = {}
        for donor, nodes in boundary_nodes(self.blocks).items():
            batches = iter(setting.builder.view(donor))
            found = probe_nodes(setting.donors[donor], nodes, batches, labels, num_classes)
            accuracy.update({(donor, node): q for node, q in found.items()})
            accuracy[donor, 0] = 1 / num_classes
            advance()
        return {
            b.ref: accuracy[b.ref.donor, b.ref.stop] - accuracy[b.ref.donor, b.ref.start]
            for b in self.blocks
        }

    def candidate(self, assembly: Assembly) -> Candidate:
        members = [self.blocks[number] for number in assembly.blocks]
        refs = tuple(member.ref for member in members)
        return Candidate(
            refs=refs,
            sets=tuple(member.set_index for member in members),
            params=assembly.costs[0],
            flops=assembly.costs[1],
            program_score=assembly.score / MICRO,
            latency=self.problem.total("latency", assembly.costs),
            memory=self.problem.total("memory", assembly.costs),
            whole=self.setting.is_whole(merged(refs)),
        )

    def check_budget(self) -> None:
        wholes = self.setting.whole_candidates()
        if not wholes and best_of(self.problem, 1, self.setting.config).best is None:
            raise explain_infeasible(self.problem, self.setting)

    def candidates(self) -> tuple[list[Candidate], Proof]:
        setting = self.setting
        if setting.config.draw == "random":
            return self._drawn(), DRAWN
        ranked, proof = setting.solved(self.problem, CANDIDATES)
        found = [self.candidate(assembly) for assembly in ranked]
        # a whole model joins as one block, exempt from the sets
        chosen = [candidate for candidate in found if not candidate.whole]
        chosen = unique([*chosen, *setting.whole_candidates()])
        if not chosen:
            raise explain_infeasible(self.problem, setting)
        return chosen, proof

    def _drawn(self) -> list[Candidate]:
        """Different networks within the budget as the seed draws them, and no whole donor."""
        generator = np.random.default_rng(self.setting.config.seed)
        found: dict[tuple[object, ...], Candidate] = {}
        for _ in range(TRIES * MOST_DRAWN):
            drawn = random_feasible(self.problem, generator)
            if drawn is None or len(found) == MOST_DRAWN:
                break
            candidate = self.candidate(drawn)
            if not candidate.whole:
                found.setdefault(candidate.key, candidate)
        if not found:
            raise explain_infeasible(self.problem, self.setting)
        return list(found.values())
