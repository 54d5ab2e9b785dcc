"""Containers of their own kind are still of that kind in blocks."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import NamedTuple

import pytest
import torch
from torch import nn

from dery_cli.core.dissection.dissect import dissect
from dery_cli.core.dissection.trees import leaves, map_tensors


class Named(NamedTuple):
    x: torch.Tensor
    size: torch.Size


@dataclasses.dataclass
class Plain:
    x: torch.Tensor
    others: tuple = ()
    batch: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor


class Ordered(collections.OrderedDict):
    """As Hugging Face's outputs: items are attributes too."""

    @property
    def first(self):
        return next(iter(self.values()))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@dataclasses.dataclass
class Both(Ordered):
    x: torch.Tensor = None
    none: object = None

    def __post_init__(self):
        self["x"] = self.x


class Rows(list):
    pass


class Pair(tuple):
    __slots__ = ()

    @property
    def x(self):
        return self[0]


class Attributes:
    def __init__(self, x):
        self.x = x


def rows(x):
    made = Rows([x])
    made.x = x
    return made


KINDS = {
    "named": lambda x: Named(x, x.shape),
    "dataclass": lambda x: Plain(x, (x,), x.shape[0]),
    "frozen": Frozen,
    "ordered": lambda x: Ordered(x=x),
    "both": lambda x: Both(x=x),
    "list": rows,
    "tuple": lambda x: Pair((x,)),
    "namespace": lambda x: types.SimpleNamespace(x=x, n=3),
    "object": Attributes,
    "nested": lambda x: Plain(Both(x=x).x, (Both(x=x),), x.shape[0]),
}


class Unit(nn.Module):
    def __init__(self, width, kind):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.kind = kind

    def forward(self, given):
        x = given.x
        if isinstance(given, Plain):
            assert given.batch == len(x)
        if isinstance(given, Named):
            assert given.size.numel() == x.numel()
        if isinstance(given, Ordered):
            assert given.first is given.x
        return KINDS[self.kind](x + torch.relu(self.norm(self.conv(x))))


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem, self.kind = nn.Conv2d(3, 4, 2, 2), kind
        self.units = nn.Sequential(*[Unit(4, kind) for _ in range(3)])
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.units(KINDS[self.kind](self.stem(x))).x.mean((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_hands_on_containers_of_its_own(kind):
    torch.manual_seed(0)
    model = Net(kind).eval()
    found = dissect(model, torch.zeros(1, 3, 16, 16))
    units = found.anatomy.num_units
    assert units >= 3
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        result = x
        for index in range(units):
            result = found.block(index, index + 1)(result)
        assert torch.allclose(model.head(result), model(x), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_found_and_replaced_in_all_of_them(kind):
    tree = KINDS[kind](torch.ones(2, 3))
    assert map_tensors(tree, lambda tensor: tensor) is tree
    changed = map_tensors(tree, lambda tensor: tensor + 1)
    assert type(changed) is type(tree)
    assert [float(tensor.mean()) for _, tensor in leaves(tree)] == [1.0] * len(list(leaves(tree)))
    assert {float(tensor.mean()) for _, tensor in leaves(changed)} == {2.0}
    assert float(changed.x.mean()) == 2.0


def test_results_of_torch_keep_their_names():
    tree = torch.ones(2, 3).max(1)
    changed = map_tensors(tree, lambda tensor: tensor + 1)
    assert torch.equal(changed.values, tree.values + 1)


def test_objects_in_circles_end():
    one, other = Plain(torch.ones(1)), Plain(torch.ones(1))
    one.others, other.others = (other,), (one,)
    assert 2 <= len(list(leaves(one))) < 100
