"""Putting networks together, on the demo's architectures with random weights."""

from __future__ import annotations

import copy
import types

import pytest
import torch

import dery_demo
from dery_cli import dissect
from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.similarity.features import probe_features
from dery_cli.core.stitching.head import linear_head
from dery_cli.core.stitching.network import (
    AssembledNetwork,
    MemoryBudget,
    NetworkBuilder,
    head_inputs,
    replay,
)
from dery_cli.core.stitching.probe import fit_classifier
from dery_cli.types import BlockRef, StitchKind
from dery_cli.zoo.whole import network_cost


@pytest.fixture(scope="module")
def donors():
    """Three layouts; batch norms have seen the images, so that features are of a sane size."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32)
    built = {}
    for name in ("resnext", "vit_cls", "swin"):
        model = dery_demo.zoo.build(name, pretrained=False)
        model.train()
        with torch.no_grad():
            for _ in range(20):
                model(images)
        built[name] = dissect(model.eval(), images)
    return built


@pytest.fixture(scope="module")
def views():
    generator = torch.Generator().manual_seed(1)
    batches = list(torch.randn(96, 3, 32, 32, generator=generator).split(40))
    return lambda _donor: batches


@pytest.mark.parametrize("name", ["resnext", "vit_cls", "swin"])
def test_the_blocks_of_one_donor_are_the_donor(donors, views, name):
    n = donors[name].anatomy.num_units
    builder = NetworkBuilder(donors, views)
    cut = builder.build([BlockRef(name, 0, 2), BlockRef(name, 2, 5), BlockRef(name, 5, n)])
    whole = builder.build([BlockRef(name, 0, n)])
    x = views(name)[0]
    with torch.no_grad():
        assert torch.allclose(cut.network(x), whole.network(x), atol=1e-5)
    assert cut.fits == (None, None, None)
    assert len(cut.network.stitches) == 0


def test_a_donor_cut_and_stitched_to_itself_comes_back(donors, views):
    """The self-stitch control: the map to fit is the identity."""
    n = donors["swin"].anatomy.num_units
    again = {"swin": donors["swin"], "twin": donors["swin"]}
    built = NetworkBuilder(again, views).build([BlockRef("swin", 0, 4), BlockRef("twin", 4, n)])
    whole = NetworkBuilder(again, views).build([BlockRef("swin", 0, n)])
    assert built.fits[1].r2 > 0.999
    x = views("swin")[0]
    with torch.no_grad():
        one, other = built.network(x), whole.network(x)
    assert float((one - other).square().mean() / other.var()) < 1e-3


def test_prefixes_are_fitted_once_and_not_changed_by_longer_candidates(donors, views):
    passes = []

    def counted(donor):
        passes.append(donor)
        return views(donor)

    builder = NetworkBuilder(donors, counted)
    refs = [BlockRef("vit_cls", 0, 3), BlockRef("resnext", 3, 6)]
    first = builder.build([*refs, BlockRef("swin", 6, 9)])
    before = copy.deepcopy(first.network.state_dict())
    done = len(passes)
    second = builder.build([*refs, BlockRef("vit_cls", 5, 8)])
    assert first.network.blocks[1] is second.network.blocks[1]
    assert passes[done:] == ["vit_cls"]  # the new target alone
    for name, value in before.items():
        assert torch.equal(value, first.network.state_dict()[name]), name


def test_blocks_after_a_stitch_get_new_statistics_and_the_donor_keeps_its_own(donors, views):
    donor = donors["resnext"]
    before = copy.deepcopy(donor.block(3, 6).state_dict())
    built = NetworkBuilder(donors, views).build(
        [BlockRef("vit_cls", 0, 3), BlockRef("resnext", 3, 6), BlockRef("resnext", 6, 9)]
    )
    for index, (start, stop) in ((1, (3, 6)), (2, (6, 9))):
        own = donor.block(start, stop).state_dict()
        now = built.network.blocks[index].state_dict()
        moved = [name for name in own if not torch.equal(own[name], now[name])]
        assert moved
        assert all("running" in name or "num_batches" in name for name in moved)
    for name, value in donor.block(3, 6).state_dict().items():
        assert torch.equal(before[name], value)


def test_an_unstitched_prefix_shares_the_donors_very_parameters(donors, views):
    built = NetworkBuilder(donors, views).build([BlockRef("resnext", 0, 3), BlockRef("swin", 3, 9)])
    own = dict(donors["resnext"].block(0, 3).named_parameters())
    for name, parameter in built.network.blocks[0].named_parameters():
        assert parameter is own[name]


def test_parameters_are_named_by_role(donors, views):
    built = NetworkBuilder(donors, views).build(
        [BlockRef("resnext", 0, 3), BlockRef("vit_cls", 3, 8)]
    )
    classifier = fit_classifier(torch.randn(30, 72), torch.arange(30) % 3, 3)
    network = AssembledNetwork(
        list(built.network.blocks), [None, built.network.stitches["1"]], linear_head(classifier)
    )
    roles = {name.split(".")[0] for name, _ in network.named_parameters()}
    assert roles == {"blocks", "stitches", "head"}
    assert "stitches.1.channels.weight" in dict(network.named_parameters())
    x = torch.randn(2, 3, 32, 32)
    network.eval()
    with torch.no_grad():
        logits = network.forward_features(x).double() @ classifier.weight_CD + classifier.bias_D
        assert torch.allclose(network(x).double(), logits, atol=1e-4)


def test_every_parameter_of_a_stitched_network_learns(donors, views):
    built = NetworkBuilder(donors, views).build(
        [BlockRef("resnext", 0, 3), BlockRef("vit_cls", 3, 6), BlockRef("swin", 6, 9)]
    )
    network = copy.deepcopy(built.network).train()
    network(torch.randn(8, 3, 32, 32)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_a_small_memory_budget_changes_nothing(donors, views):
    refs = [BlockRef("resnext", 0, 3), BlockRef("vit_cls", 3, 6), BlockRef("resnext", 6, 9)]
    roomy = NetworkBuilder(donors, views).build(refs)
    tight = NetworkBuilder(donors, views, keep_bytes=1000).build(refs)
    for name, value in roomy.network.state_dict().items():
        assert torch.equal(value, tight.network.state_dict()[name]), name


def test_replay_keeps_within_its_budget():
    calls = []

    class Double(torch.nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return 2 * x

    batches = [torch.ones(4, 10), torch.ones(2, 10)]
    budget = MemoryBudget(1000)
    kept = replay(lambda: batches, Double(), budget)
    assert budget.left == 1000 - 240
    done = len(calls)
    assert [float(y.sum()) for y in kept()] == [80.0, 40.0]
    assert len(calls) == done
    budget = MemoryBudget(200)
    computed = replay(lambda: batches, Double(), budget)
    assert budget.left == 200
    done = len(calls)
    assert [float(y.sum()) for y in computed()] == [80.0, 40.0]
    assert len(calls) == done + 2


PATHS = {
    "a truncation": [BlockRef("vit_cls", 0, 3)],
    "a truncation of a map": [BlockRef("swin", 0, 4)],
    "a slice": [BlockRef("resnext", 0, 2), BlockRef("resnext", 5, 9)],
    "an adapter": [BlockRef("resnext", 0, 5), BlockRef("resnext", 5, 9, adapter=True)],
    "there and back": [
        BlockRef("resnext", 0, 2),
        BlockRef("vit_cls", 3, 4),
        BlockRef("resnext", 2, 4),
        BlockRef("resnext", 2, 3),
    ],
    "into tokens, cut off": [BlockRef("swin", 0, 3), BlockRef("vit_cls", 2, 5)],
}


@pytest.mark.parametrize("name", list(PATHS))
def test_every_path_is_built_and_costs_what_was_counted(donors, views, name):
    refs = PATHS[name]
    network = NetworkBuilder(donors, views).build(refs).network.copy()
    zoo = {key: types.SimpleNamespace(anatomy=found.anatomy) for key, found in donors.items()}
    end = donors[refs[-1].donor].anatomy.nodes[refs[-1].stop]
    network.head = torch.nn.Linear(head_inputs(end), 10)
    cost = network_cost(zoo, refs, 10, StitchKind.LINEAR)
    assert count_params(network) == cost.params
    assert count_flops(network, torch.zeros(1, 3, 32, 32)) == cost.flops
    with torch.no_grad():
        assert network(views("")[0]).shape == (40, 10)
    network(views("")[0]).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    stitched = {str(k) for k in range(1, len(refs))}
    assert set(network.stitches) == stitched


@pytest.mark.parametrize(("name", "node"), [("vit_cls", 3), ("swin", 4), ("resnext", 5)])
def test_a_truncated_network_ends_with_what_a_probe_sees(donors, views, name, node):
    network = NetworkBuilder(donors, views).build([BlockRef(name, 0, node)]).network
    x = views(name)[0]
    with torch.no_grad():
        raw = list(donors[name].features(x))[node]
        seen = probe_features(raw, donors[name].anatomy.nodes[node])
        assert torch.allclose(network.forward_features(x), seen, atol=1e-5)


def test_without_labels_an_adapter_is_the_identity(donors, views):
    builder = NetworkBuilder(donors, views)
    whole = builder.build([BlockRef("vit_cls", 0, 8)]).network
    adapted = builder.build([BlockRef("vit_cls", 0, 4), BlockRef("vit_cls", 4, 8, adapter=True)])
    assert adapted.fits[1].r2 > 0.999
    x = views("")[0]
    with torch.no_grad():
        difference = (adapted.network(x) - whole(x)).norm() / whole(x).norm()
    assert difference < 1e-2


def test_a_donor_that_comes_twice_is_there_twice(donors, views):
    refs = [BlockRef("resnext", 0, 3), BlockRef("swin", 2, 3), BlockRef("resnext", 1, 3)]
    network = NetworkBuilder(donors, views).build(refs).network.copy()
    first, last = network.blocks[0].state_dict(), network.blocks[2].state_dict()
    common = [key for key in last if key in first and last[key].is_floating_point()]
    assert common
    with torch.no_grad():
        for parameter in network.blocks[2].parameters():
            parameter.add_(1)
    key = next(k for k, _ in network.blocks[2].named_parameters() if k in first)
    assert not torch.equal(network.blocks[0].state_dict()[key], network.blocks[2].state_dict()[key])
