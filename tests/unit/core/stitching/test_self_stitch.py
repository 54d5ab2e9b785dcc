"""The self-stitch control: a trained donor, cut and stitched to itself by fitting, comes back."""

from __future__ import annotations

import pytest
import torch

import dery_demo
from dery_cli import dissect
from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.network import NetworkBuilder
from dery_cli.core.stitching.probe import fit_classifier
from dery_cli.data.batches import ImageBatches
from dery_cli.data.sets import open_data
from dery_cli.types import BlockRef

FIT_IMAGES = 800
CUTS = {"resnet": (3, 6), "resnext": (5,), "vit_cls": (2, 5), "swin": (4,)}


@pytest.fixture(scope="module")
def clothes():
    """Images and labels: to fit on, and the donors' own test images."""
    data = open_data("demo:fashion")
    spec = dery_demo.zoo.card("resnet").input
    found = {}
    for name, split, count in (
        ("train", data.train, FIT_IMAGES),
        ("test", data.test, len(data.test)),
    ):
        batches = ImageBatches(
            split, range(count), spec, crop=1.0, batch_size=200, device=torch.device("cpu")
        )
        found[name] = (list(batches), torch.tensor([int(split.labels[i]) for i in range(count)]))
    return found


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", list(CUTS))
def test_it_comes_back_within_a_hundredth_of_its_accuracy(clothes, name, labelled):
    model = dery_demo.zoo.build(name, pretrained=True).eval()
    (train, train_N), (test, test_N) = clothes["train"], clothes["test"]
    donor = dissect(model, train[0][:2])
    # under other names, so that every joint takes a stitch
    twins = {f"twin{k}": donor for k in range(3)}
    places = [0, *CUTS[name], donor.anatomy.num_units]
    refs = [BlockRef(f"twin{k}", *places[k : k + 2]) for k in range(len(places) - 1)]
    labels = train_N.tolist() if labelled else None
    built = NetworkBuilder(twins, lambda _: train, labels=labels).build(refs)
    assert len(built.network.stitches) == len(CUTS[name])
    if labelled:  # as an assembly is finished: with a closed-form head, which whole donors get too
        whole = donor.block(0, donor.anatomy.num_units).eval()
        nets = (whole, built.network)
        heads = [fit_classifier(network_outputs(net, train), train_N, 10) for net in nets]
        scores = [
            network_outputs(net, test).double() @ head.weight_CD + head.bias_D
            for net, head in zip(nets, heads, strict=True)
        ]
    else:  # with the classifier that the donor was trained with
        assert all(fit.r2 > 0.99 for fit in built.fits[1:])
        with torch.no_grad():
            scores = [
                torch.cat([model(x) for x in test]),
                model.get_classifier()(network_outputs(built.network, test)),
            ]
    own, stitched = (float((s.argmax(1) == test_N).double().mean()) for s in scores)
    assert own > 0.8
    assert stitched >= own - 0.01
