"""State dicts of torchvision's detectors and segmenters, as donors of their backbone's kind."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import detection, mobilenet_v3_small, resnet18, segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from dery_cli.errors import UsageError
from dery_cli.zoo.state_dicts import load_weights


def detector():
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return detection.RetinaNet(backbone, num_classes=3)


def segmenter():
    layers = torch.nn.ModuleDict(
        {n: m for n, m in resnet18().named_children() if n not in ("avgpool", "fc")}
    )
    return segmentation.DeepLabV3(layers, segmentation.deeplabv3.DeepLabHead(512, 3))


def load(model, state, classifier):
    with torch.no_grad():
        for value in state.values():
            if value.is_floating_point():
                value += 0.01
    return load_weights(model, state, "dense.pth", classifier=classifier)


@pytest.mark.parametrize(
    ("build", "prefix", "other"),
    [(detector, "backbone.body.", "backbone.fpn."), (segmenter, "backbone.", "classifier.0.")],
)
def test_the_backbone_of_a_larger_model_is_found_and_said(build, prefix, other):
    state, model = build().state_dict(), resnet18()
    notes = load(model, state, ("fc.weight", "fc.bias"))
    mine = model.state_dict()
    layers = [n for n in mine if not n.startswith("fc.") and "num_batches" not in n]
    assert len(layers) == 100
    assert all(torch.equal(mine[n], state[prefix + n]) for n in layers)
    assert f"begin with '{prefix}', are loaded" in notes[0]
    assert other in notes[0]
    assert "the classifier of dense.pth does not fit" in notes[1]
    assert not model.fc.weight.any()


def test_layers_that_were_in_a_folder_of_the_classifier_are_found():
    features = mobilenet_v3_small().features
    state = {f"backbone.body.{n}": v for n, v in features.state_dict().items()}
    state |= {"rpn.head.conv.weight": torch.zeros(1)}
    model = mobilenet_v3_small()
    model.classifier = torch.nn.Linear(576, 10)
    load(model, state, ("classifier.weight", "classifier.bias"))
    mine = model.features.state_dict()
    assert all(torch.equal(mine[n], state[f"backbone.body.{n}"]) for n in mine)


def test_a_backbone_of_another_kind_is_refused():
    with pytest.raises(UsageError, match="does not match the architecture"):
        load(mobilenet_v3_small(), detector().state_dict(), ())
