"""A whole donor as a network: one block, and a linear head for the target."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dery_cli.core.assembly.notation import needs_stitch
from dery_cli.core.stitching.head import fit_head
from dery_cli.core.stitching.network import AssembledNetwork, ending_pool, head_inputs
from dery_cli.core.stitching.stitch import StitchCost, stitch_cost
from dery_cli.io.artifacts import Workspace
from dery_cli.types import BlockRef, Donor, Node, StitchKind
from dery_cli.zoo.registry import Zoo, load_donor


def head_cost(num_chs: int, num_classes: int | None) -> StitchCost:
    """Cost of the linear head, nothing without classes."""
    if num_classes is None:
        return StitchCost(0, 0)
    return StitchCost(num_chs * num_classes + num_classes, num_chs * num_classes)


def whole_block(zoo: Zoo, donor: str) -> BlockRef:
    """A whole donor as one block."""
    return BlockRef(donor, 0, zoo[donor].anatomy.num_units)


def zoo_nodes(zoo: Zoo) -> list[Node]:
    """The nodes of all donors, one donor after another."""
    return [node for name in zoo.names() for node in zoo[name].anatomy.nodes]


def network_cost(
    zoo: Zoo, refs: Sequence[BlockRef], num_classes: int | None, kind: StitchKind
) -> StitchCost:
    """Parameters and multiply-adds of a network: its blocks, stitches and head.

    Args:
        zoo: The donors.
        refs: Blocks in order.
        num_classes: Of the head; None without one.
        kind: What stitches are made of.
    """
    end = zoo[refs[-1].donor].anatomy.nodes[refs[-1].stop]
    costs = [head_cost(head_inputs(end), num_classes)]
    for ref in refs:  # what two blocks share is in the network twice
        anatomy = zoo[ref.donor].anatomy
        costs.append(
            StitchCost(anatomy.params(ref.start, ref.stop), anatomy.flops(ref.start, ref.stop))
        )
    for before, after in itertools.pairwise(refs):
        if needs_stitch(before, after):
            source = zoo[before.donor].anatomy.nodes[before.stop]
            costs.append(stitch_cost(source, zoo[after.donor].anatomy.nodes[after.start], kind))
    return StitchCost(sum(cost.params for cost in costs), sum(cost.flops for cost in costs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeDonor:
    """A whole donor with a closed-form head for the target.

    Args:
        donor: From the zoo.
        network: On the device it was fitted on, in eval mode.
        accuracy: Cross-validated, of the head on the images it was fitted on.
    """

    donor: Donor
    network: AssembledNetwork
    accuracy: float


def fit_whole_donor(
    donor: Donor,
    workspace: Workspace,
    batches: Iterable[Tensor],
    labels: Sequence[int],
    num_classes: int,
    *,
    device: torch.device,
) -> WholeDonor:
    """Build a donor with its weights, and fit a head to its last features.

    Args:
        donor: From the zoo.
        workspace: Of the zoo.
        batches: Images of the target as the donor sees them, in one pass.
        labels: Their class indices, in order.
        num_classes: Of the target.
        device: Where to compute, and where the batches are.

    Raises:
        NotFiniteError: Its pre-logits are NaN or infinite.
        DeryError: Its weights changed.
    """
    dissection = load_donor(donor, workspace, device=device)
    anatomy = dissection.anatomy
    block = copy.deepcopy(dissection.block(0, anatomy.num_units))
    network = AssembledNetwork([block], [None], pool=ending_pool(anatomy.nodes[-1])).eval()
    accuracy = fit_head(network, batches, labels, num_classes)
    return WholeDonor(donor=donor, network=network, accuracy=accuracy)
