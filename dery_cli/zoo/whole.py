"""A whole donor as a network: one block, and a linear head for the target."""

from __future__ import annotations

from dery_cli.core.stitching.stitch import StitchCost
from dery_cli.types import BlockRef
from dery_cli.zoo.registry import Zoo


def head_cost(num_chs: int, num_classes: int | None) -> StitchCost:
    """Cost of the linear head, nothing without classes."""
    if num_classes is None:
        return StitchCost(0, 0)
    return StitchCost(num_chs * num_classes + num_classes, num_chs * num_classes)


def whole_model(zoo: Zoo, donor: str) -> BlockRef:
    """A whole donor as one block."""
    return BlockRef(donor, 0, zoo[donor].anatomy.num_units)


def whole_cost(zoo: Zoo, donor: str, num_classes: int | None) -> StitchCost:
    """Parameters and multiply-adds of a whole donor with the head."""
    anatomy = zoo[donor].anatomy
    head = head_cost(anatomy.nodes[-1].num_chs, num_classes)
    units = anatomy.num_units
    return StitchCost(anatomy.params(0, units) + head.params, anatomy.flops(0, units) + head.flops)
