"""An assembly's feature maps under torchvision's detection and segmentation heads."""

from __future__ import annotations

import collections

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from dery_cli.timm import NamedMaps, write_timm_folder
from tests.unit.zoo.assemblies import assembly, dissected_once


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with dissected_once():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("dense")
    for name in ("mixed", "vit"):
        write_timm_folder(assembly(name), base / name)
    return base


def rendered():
    """Four images with a bright square each; its box and its mask."""
    images_NCHW = 0.1 * torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    targets, masks_NHW = [], torch.zeros(4, 32, 32, dtype=torch.long)
    for n, (x, y) in enumerate([(2, 3), (14, 4), (5, 15), (16, 16)]):
        images_NCHW[n, :, y : y + 12, x : x + 12] += 1
        masks_NHW[n, y : y + 12, x : x + 12] = 1
        box = torch.tensor([[x, y, x + 12, y + 12]], dtype=torch.float)
        targets.append({"boxes": box, "labels": torch.tensor([1])})
    return images_NCHW, targets, masks_NHW


def trained(model: nn.Module, loss, steps: int) -> tuple[float, float]:
    """Loss before and after; every parameter gets a gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        seen.append(value.item())
        bare = [n for n, p in model.named_parameters() if p.grad is None]
        assert bare == []
        optimizer.step()
    return seen[0], seen[-1]


@pytest.mark.parametrize("name", [pytest.param("mixed", marks=pytest.mark.slow), "vit"])
def test_a_detector_learns(folders, name):
    torch.manual_seed(0)
    features = timm.create_model(
        f"local-dir:{folders / name}", pretrained=True, features_only=True, out_indices=(-2, -1)
    )
    # torchvision draws the heads at a deviation of 0.01: fewer channels would not get through
    pyramid = BackboneWithFPN(nn.Sequential(), {}, features.feature_info.channels(), 256)
    pyramid.body = NamedMaps(features)
    anchors = AnchorGenerator(((8.0,), (12.0,), (16.0,)), ((1.0,),) * 3)
    detector = RetinaNet(
        pyramid, 2, min_size=32, max_size=32, anchor_generator=anchors,
        image_mean=[0.0] * 3, image_std=[1.0] * 3,
    )  # fmt: skip
    images_NCHW, targets, _ = rendered()
    first, last = trained(detector, lambda: sum(detector(list(images_NCHW), targets).values()), 30)
    assert last < 0.9 * first


def test_a_segmenter_learns(folders):
    torch.manual_seed(0)
    features = timm.create_model(
        f"local-dir:{folders / 'vit'}", pretrained=True, features_only=True, out_indices=(1,)
    )
    head = DeepLabHead(features.feature_info.channels()[0], 2)
    segmenter = DeepLabV3(NamedMaps(features, ["out"]), head)
    images_NCHW, _, masks_NHW = rendered()

    def loss():
        output = segmenter(images_NCHW)
        assert isinstance(output, collections.OrderedDict)
        return nn.functional.cross_entropy(output["out"], masks_NHW)

    first, last = trained(segmenter, loss, 4)
    assert last < 0.9 * first
