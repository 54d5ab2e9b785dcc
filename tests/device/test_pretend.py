"""Devices without float64, by a device that is not there: nothing mixes, and numbers are the same.

No accelerator is needed. What these cannot show is what a real device computes, and how fast.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dery_cli.core import proxies
from dery_cli.core.dissection.dissect import dissect
from dery_cli.core.numerics import double, seeded, solving_device
from dery_cli.core.scoring import top1
from dery_cli.core.similarity.compare import CKA, LR, RBF_CKA, RIDGE, MetricOptions, similarity
from dery_cli.core.similarity.features import embed_batches
from dery_cli.core.stitching.head import fit_head
from dery_cli.core.stitching.network import NetworkBuilder
from dery_cli.types import BlockRef, StitchKind
from tests.device.pretend import DEVICE, There, moved, pretending


def residual(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


def small(width: int, seed: int) -> nn.Module:
    """Three units and a head, on 12 x 12 images."""
    with seeded(seed):
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU()),
            residual(width),
            residual(width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 5),
        ).eval()


@pytest.fixture(scope="module")
def x_NCHW() -> torch.Tensor:
    return torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_the_pretence_refuses_what_a_device_refuses():
    with pretending():
        x = torch.ones(3, device="mps")
        assert isinstance(x, There)
        assert (x.device, (x + 1).device, x.cpu().device.type) == (DEVICE, DEVICE, "cpu")
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64, device="mps")
        with pytest.raises(RuntimeError, match="found mps and cpu"):
            x + torch.ones(3)
        assert (x * torch.tensor(2.0)).sum().item() == 6


def test_double_precision_goes_to_the_cpu():
    assert solving_device("mps") == torch.device("cpu")
    assert solving_device("cuda:1") == torch.device("cuda:1")
    with pretending():
        wide = double(torch.ones(3, device="mps"))
    assert (wide.device.type, wide.dtype) == ("cpu", torch.float64)


@pytest.mark.parametrize("metric", [CKA, RBF_CKA, LR, RIDGE], ids=lambda m: m.name)
def test_similarity(metric):
    draw = torch.Generator().manual_seed(1)
    features = [torch.randn(64, width, generator=draw) for width in (3, 5, 4)]
    expected = similarity(features, metric, MetricOptions(minibatch=32))
    with pretending():
        found = similarity(features, metric, MetricOptions(minibatch=32, device="mps"))
    assert torch.equal(found.sim_PP, expected.sim_PP)


@pytest.mark.parametrize("kind", [StitchKind.LINEAR, StitchKind.MLP, StitchKind.PAPER])
def test_building_and_scoring_a_network(x_NCHW, kind):
    """Two stitches, one between maps of different width, batch norms, a head and a proxy."""
    labels = [index % 3 for index in range(len(x_NCHW))]
    refs = [BlockRef("a", 0, 2), BlockRef("b", 1, 2), BlockRef("a", 2, 3)]
    found = []
    for there in (False, True):
        models = {"a": small(6, 1), "b": small(8, 2)}
        donors = {name: dissect(model, x_NCHW[:1]) for name, model in models.items()}
        with pretending(), torch.no_grad():
            images = x_NCHW
            if there:
                images = x_NCHW.to("mps")
                for model in models.values():
                    moved(model)
            views = list(torch.split(images, 8))
            builder = NetworkBuilder(donors, lambda _, v=views: v, labels=labels, kind=kind, seed=3)
            if there:
                assert builder.build(refs[:1]).network.forward_features(images).device == DEVICE
            built = builder.build(refs)
            score = proxies.naswot(
                proxies.ProxyInputs(built.network, lambda v=views: v, None, None)
            )
            accuracy = fit_head(built.network, views, labels, 3)
            logits = built.network(images)
            right = float(top1(logits, torch.tensor(labels).to(logits.device)))
        found.append((logits.cpu(), [fit and fit.r2 for fit in built.fits], score, accuracy, right))
    (logits, *numbers), (there_logits, *there_numbers) = found
    assert torch.equal(logits, there_logits)
    assert numbers == there_numbers


def test_features_come_to_the_cpu(x_NCHW):
    model = small(6, 1)
    dissection = dissect(model, x_NCHW[:1])
    expected = next(iter(embed_batches(dissection, [x_NCHW])))
    with pretending():
        moved(model)
        found = next(iter(embed_batches(dissection, [x_NCHW.to("mps")])))
    for mine, theirs in zip(found.nodes, expected.nodes, strict=True):
        assert torch.equal(mine.feat_NC, theirs.feat_NC)
        assert torch.equal(mine.feat_NGC, theirs.feat_NGC)
