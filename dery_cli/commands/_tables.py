"""Cells that the tables of several commands have."""

from __future__ import annotations

from dery_cli.sizes import show_count, show_shape
from dery_cli.types import Anatomy, Node

COST_COLUMNS = ("params", "multiply-adds")


def cost_cells(params: int, flops: int) -> list[str]:
    """For ``COST_COLUMNS``."""
    return [show_count(params), show_count(flops)]


def whole_cost_cells(anatomy: Anatomy) -> list[str]:
    """The same, of a whole model without its classifier."""
    n = anatomy.num_units
    return cost_cells(anatomy.params(0, n), anatomy.flops(0, n))


NODE_COLUMNS = ("node", "name", "layout", "shape")


def node_cells(node: Node) -> list[object]:
    """For ``NODE_COLUMNS``."""
    return [node.index, node.name, node.layout, show_shape(node.shape)]
