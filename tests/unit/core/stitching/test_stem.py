"""The paper's fresh stem: its costs, and networks that begin with it."""

from __future__ import annotations

import copy

import pytest
import torch

import dery_demo
from dery_cli import dissect
from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.stitching.network import AssembledNetwork, NetworkBuilder
from dery_cli.core.stitching.stem import Stem, stem_cost, stem_node, with_fresh_stem
from dery_cli.types import (
    Anatomy,
    BlockRef,
    Layout,
    Node,
    SharedParams,
    StemKind,
    StitchKind,
)

DONORS = ("resnext", "vit_cls", "swin")


@pytest.fixture(scope="module")
def donors():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    built = {name: dery_demo.zoo.build(name, pretrained=False).eval() for name in DONORS}
    return {name: dissect(model, x) for name, model in built.items()}


@pytest.fixture(scope="module")
def views():
    generator = torch.Generator().manual_seed(1)
    batches = list((3 + 2 * torch.randn(48, 3, 32, 32, generator=generator)).split(24))
    return lambda _donor: batches


def image(height, width):
    return Node(
        index=0,
        name="input",
        layout=Layout.NCHW,
        shape=(3, height, width),
        grid=(height, width),
    )


@pytest.mark.parametrize("size", [(32, 32), (31, 50), (7, 9)])
def test_its_grid_is_what_the_layers_give(size):
    node = image(*size)
    target = stem_node(node)
    stem = Stem(node, target)
    assert stem.layers(torch.zeros(1, *node.shape)).shape[1:] == target.shape


@pytest.mark.parametrize("name", DONORS)
def test_its_cost_is_counted_exactly(donors, name):
    ends = donors[name].anatomy.nodes[:2]
    stem, cost = Stem(*ends), stem_cost(*ends)
    x = torch.zeros(1, *ends[0].shape)
    assert (count_params(stem), count_flops(stem, x)) == (cost.params, cost.flops)
    assert stem(x).shape[1:] == ends[1].shape


@pytest.mark.parametrize("name", DONORS)
def test_a_donor_behind_it_costs_what_is_built(donors, views, name):
    builder = NetworkBuilder(donors, views, kind=StitchKind.PAPER, stem=StemKind.PAPER)
    anatomy = with_fresh_stem(donors[name].anatomy)
    for stop in (1, 3, anatomy.num_units):
        network = builder.build([BlockRef(name, 0, stop)]).network
        x = torch.zeros(1, *anatomy.nodes[0].shape)
        assert count_params(network) == anatomy.params(0, stop)
        assert count_flops(network, x) == anatomy.flops(0, stop)


def test_what_the_first_unit_shared_is_counted_where_it_is_first_used_now():
    nodes = (
        image(8, 8),
        *(
            Node(
                index=i, name=f"u{i}", layout=Layout.NCHW, shape=(4, 4, 4), grid=(4, 4), params=100
            )
            for i in (1, 2, 3)
        ),
    )
    shared = (
        SharedParams(count=30, units=(1, 3)),
        SharedParams(count=7, units=(1, 2, 3)),
        SharedParams(count=5, units=(2, 3)),
    )
    anatomy = with_fresh_stem(Anatomy(nodes=nodes, shared=shared))
    stem = stem_cost(nodes[0], nodes[1]).params
    assert [node.params for node in anatomy.nodes[1:]] == [stem, 107, 130]
    assert anatomy.params(2, 3) == 130 + 7 + 5
    assert anatomy.shared == (
        SharedParams(count=7, units=(2, 3)),
        SharedParams(count=5, units=(2, 3)),
    )


def test_a_network_begins_with_it_and_goes_on_after_the_first_unit(donors, views):
    refs = [BlockRef("resnext", 0, 3), BlockRef("swin", 4, 6)]
    builder = NetworkBuilder(donors, views, kind=StitchKind.PAPER, stem=StemKind.PAPER, seed=5)
    network = builder.build(refs).network
    assert sorted(network.stem.state_dict()) == sorted(
        Stem(*donors["resnext"].anatomy.nodes[:2]).state_dict()
    )
    x = views("resnext")[0]
    with torch.no_grad():
        expected = network.stem(x)
        expected = network.blocks[0](expected)
        expected = network.pool(network.blocks[1](network.stitches["1"](expected)))
        assert torch.equal(network(x), expected)
    own = set(dict(donors["resnext"].block(0, 1).named_parameters()))
    assert not own & set(dict(network.blocks[0].named_parameters()))


def test_its_batch_norms_are_those_of_the_images_and_donors_keep_theirs(donors, views):
    before = copy.deepcopy(dict(donors["resnext"].block(0, 3).named_buffers()))
    builder = NetworkBuilder(donors, views, stem=StemKind.PAPER)
    network = builder.build([BlockRef("resnext", 0, 3)]).network
    x = torch.cat(views("resnext"))
    with torch.no_grad():
        after = network.stem.layers[0](x)
        normed = network.stem.layers[1](after)
    assert torch.allclose(normed.mean((0, 2, 3)), torch.zeros(64), atol=0.02)
    assert torch.allclose(network.stem.layers[1].running_mean, after.mean((0, 2, 3)), atol=1e-4)
    for name, buffer in donors["resnext"].block(0, 3).named_buffers():
        assert torch.equal(buffer, before[name])


def test_weights_are_of_the_seed_and_a_copy_shares_none(donors, views):
    def built(seed):
        builder = NetworkBuilder(donors, views, stem=StemKind.PAPER, seed=seed)
        return builder.build([BlockRef("resnext", 0, 1)]).network

    one, same, other = built(1), built(1), built(2)
    weight = one.stem.layers[0].weight
    assert torch.equal(weight, same.stem.layers[0].weight)
    assert not torch.equal(weight, other.stem.layers[0].weight)
    twin = one.copy()
    assert isinstance(twin, AssembledNetwork)
    assert twin.stem.layers[0].weight is not weight
    assert torch.equal(twin.stem.layers[0].weight, weight)
