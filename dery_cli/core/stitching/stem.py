"""The paper's stem: fresh layers in place of those that the first donor begins with.

A 7x7 convolution of stride 2 to 64 channels, batch norm, ReLU and 3x3 max pooling of stride 2 (the
stem of a ResNet; Yang et al., NeurIPS 2022), and the paper's stitch to the first donor's features.
Nodes are not finer than units, so it stands in place of the donor's first unit, which owns its
pretrained stem: the block goes on from node 1. Its weights are random, to be trained.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from dery_cli.core.stitching.stitch import Stitch, StitchCost, stitch_cost
from dery_cli.types import Anatomy, Layout, Node, SharedParams, StitchKind

WIDTH, KERNEL = 64, 7


def _halved(side: int) -> int:
    """Of a window of odd width at stride 2 that is padded by half its width."""
    return (side + 1) // 2


def _after_convolution(image: Node) -> tuple[int, int]:
    return _halved(image.grid[0]), _halved(image.grid[1])


def stem_node(image: Node) -> Node:
    """What the fresh layers give, before the stitch.

    Args:
        image: Node 0 of the donor.
    """
    height, width = (_halved(side) for side in _after_convolution(image))
    return Node(
        index=1,
        name="stem",
        layout=Layout.NCHW,
        shape=(WIDTH, height, width),
        grid=(height, width),
    )


class Stem(nn.Module):
    """Images to what a donor has after its first unit, with random weights.

    Args:
        image: Node 0 of the donor.
        target: Its node 1.
    """

    def __init__(self, image: Node, target: Node) -> None:
        super().__init__()
        self.image, self.target = image, target
        self.layers = nn.Sequential(
            nn.Conv2d(image.num_chs, WIDTH, KERNEL, stride=2, padding=KERNEL // 2, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stitch = Stitch(stem_node(image), target, StitchKind.PAPER)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.stitch(self.layers(x))
        return result


def stem_cost(image: Node, target: Node) -> StitchCost:
    """Cost of ``Stem(image, target)``, without building it."""
    taps = KERNEL * KERNEL * image.num_chs * WIDTH
    height, width = _after_convolution(image)
    joint = stitch_cost(stem_node(image), target, StitchKind.PAPER)
    return StitchCost(taps + 2 * WIDTH + joint.params, taps * height * width + joint.flops)


def with_fresh_stem(anatomy: Anatomy) -> Anatomy:
    """The costs of a donor whose first unit is a ``Stem``.

    Parameters that the first unit shares with others are counted at the first of these.
    """
    image, target, *others = anatomy.nodes
    cost = stem_cost(image, target)
    nodes = [image, dataclasses.replace(target, params=cost.params, flops=cost.flops), *others]
    shared = []
    for group in anatomy.shared:
        units = tuple(unit for unit in group.units if unit > 1)
        if units and units != group.units:
            first = nodes[units[0]]
            nodes[units[0]] = dataclasses.replace(first, params=first.params + group.count)
        if len(units) > 1:
            shared.append(SharedParams(count=group.count, units=units))
    return dataclasses.replace(anatomy, nodes=tuple(nodes), shared=tuple(shared))
