"""The embedded demo zoo and data: what ships is what the index and the manifest say."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dery_cli.zoo.plugin import DataPlugin, ZooPlugin
from dery_demo import data, images, make_data, pretrain, publish, zoo
from dery_demo.donors import DONORS, FASHION_CLASSES, IMAGE_SIZE
from dery_demo.zoo import DemoZoo, read_index

NAMES = list(DONORS)
ONE_IMAGE = (1, 3, *IMAGE_SIZE)


@pytest.fixture(scope="module")
def index():
    return read_index(zoo.weights_dir)


# --- zoo


def test_plugins_keep_the_contract():
    assert isinstance(zoo, ZooPlugin)
    assert isinstance(data, DataPlugin)


def test_importing_the_plugin_imports_nothing_heavy():
    code = (
        "import sys, dery_demo; dery_demo.zoo.card('resnet'); dery_demo.data.classes('');"
        "print(sorted({'torch', 'timm', 'numpy', 'PIL', 'safetensors'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_donor_builds_on_meta_with_the_indexed_parameter_count(name, index):
    with torch.device("meta"):
        model = zoo.build(name, pretrained=False)
        logits = model(torch.empty(ONE_IMAGE))
    assert not model.training
    assert logits.shape == (1, DONORS[name].num_classes)
    assert sum(p.numel() for p in model.parameters()) == index[name]["params"]


def test_zoo_is_varied_in_family_size_and_task(index):
    assert list(index) == NAMES
    assert len({donor.family for donor in DONORS.values()}) >= 6
    params = sorted(index[name]["params"] for name in NAMES)
    assert params[0] < 0.25e6
    assert params[-1] > 2.0e6
    assert max(b / a for a, b in pairwise(params)) < 1.7
    assert 8e6 < sum(params) < 10e6
    assert DONORS["resnet"].construct is DONORS["resnet.rotation"].construct
    assert zoo.card("resnet").task != zoo.card("resnet.rotation").task


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_donor_loads_as_float32_and_is_not_constant(name):
    model = zoo.build(name, pretrained=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    split = data.split("fashion", "test")
    pixels = torch.stack([torch.from_numpy(np.asarray(split.image(i)).copy()) for i in range(8)])
    with torch.no_grad():
        logits = model(pretrain.to_input(pixels))
    assert torch.isfinite(logits).all()
    assert logits.std(dim=0).min() > 1e-3


def _accuracy_on_shipped_images(name):
    split = data.split("fashion", "test")
    pixels = np.stack([np.asarray(split.image(i)) for i in range(len(split))])
    shipped = pretrain.Images(torch.from_numpy(pixels), torch.tensor(split.labels))
    return pretrain.accuracy(zoo.build(name, pretrained=True), shipped, DONORS[name])


def test_small_donor_is_as_accurate_as_its_card_says():
    # 1,000 of the 10,000 test images: a standard error of about one point
    measured = _accuracy_on_shipped_images("mobilenetv3")
    assert measured == pytest.approx(zoo.card("mobilenetv3").metrics["top1"], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_donor_is_as_accurate_as_its_card_says(name):
    measured = _accuracy_on_shipped_images(name)
    assert measured == pytest.approx(zoo.card(name).metrics["top1"], abs=0.03)
    assert measured > 0.84


def test_manifest_says_what_the_index_says(index):
    path = Path(__file__).parents[3] / "zoo_manifests" / "demo.toml"
    text = path.read_text(encoding="utf-8")
    assert text == publish.manifest_text(index)
    manifest = tomllib.loads(text)
    assert manifest["zoo"]["name"] == "demo"
    assert [model["spec"] for model in manifest["model"]] == [f"demo/{name}" for name in NAMES]
    for name, model in zip(NAMES, manifest["model"], strict=True):
        card = zoo.card(name)
        weights = (zoo.weights_dir / f"{name}.safetensors").read_bytes()
        assert model["sha256"] == hashlib.sha256(weights).hexdigest() == zoo.weights_sha256(name)
        assert model["top1"] == card.metrics["top1"]
        assert (model["task"], model["license"]) == (card.task, card.license)


def test_weights_fit_in_the_wheel():
    weights = list(zoo.weights_dir.glob("*.safetensors"))
    assert {path.stem for path in weights} == set(NAMES)
    assert sum(path.stat().st_size for path in weights) <= 19 * 2**20


@pytest.fixture
def copied_zoo(tmp_path):
    for name in ("mobilenetv3.safetensors", "index.json"):
        shutil.copy(zoo.weights_dir / name, tmp_path)
    return DemoZoo(tmp_path)


def test_altered_weights_are_refused(copied_zoo):
    path = copied_zoo.weights_dir / "mobilenetv3.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(OSError, match=r"demo/mobilenetv3 are truncated or altered: .* sha256"):
        copied_zoo.build("mobilenetv3", pretrained=True)


def test_truncated_weights_are_refused(copied_zoo):
    path = copied_zoo.weights_dir / "mobilenetv3.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(OSError, match="truncated or altered"):
        copied_zoo.build("mobilenetv3", pretrained=True)


def test_missing_weights_are_refused(copied_zoo):
    with pytest.raises(OSError, match="weights of demo/resnext are missing"):
        copied_zoo.build("resnext", pretrained=True)
    assert copied_zoo.build("resnext", pretrained=False) is not None


def test_unknown_donor_is_a_key_error():
    with pytest.raises(KeyError):
        zoo.card("resnet999")
    with pytest.raises(KeyError):
        zoo.build("resnet999", pretrained=False)
    with pytest.raises(KeyError):
        zoo.weights_sha256("resnet999")


@pytest.mark.parametrize("name", NAMES)
def test_image_size_is_taken_where_the_architecture_allows_it(name):
    if DONORS[name].fixed_size:
        with pytest.raises(ValueError, match="32 x 32 images only, not 48 x 64"):
            zoo.build(name, pretrained=False, image_size=(48, 64))
        return
    with torch.device("meta"):
        model = zoo.build(name, pretrained=False, image_size=(48, 64))
        assert model(torch.empty(1, 3, 48, 64)).shape[0] == 1
    with pytest.raises(ValueError, match="16 pixels a side or more, not 8 x 32"):
        zoo.build(name, pretrained=False, image_size=(8, 32))


# --- data


def _pixels(split):
    return [np.asarray(split.image(i)).tobytes() for i in range(len(split))]


@pytest.mark.parametrize(
    ("argument", "train", "test"), [("", [30] * 10, None), ("fashion", [200] * 10, [100] * 10)]
)
def test_splits_are_balanced_and_disjoint(argument, train, test):
    splits = {name: data.split(argument, name) for name in ("train", "test")}
    assert data.split(argument, "val") is None
    assert len(data.classes(argument)) == 10
    for name, expected in (("train", train), ("test", test)):
        split = splits[name]
        assert len(split) == len(split.labels)
        counts = Counter(split.labels)
        assert sorted(counts) == list(range(10))
        if expected is not None:
            assert [counts[label] for label in range(10)] == expected
        image = split.image(len(split) - 1)
        assert (image.size, image.mode) == ((32, 32), "L")
    assert not set(_pixels(splits["train"])) & set(_pixels(splits["test"]))


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    resized = make_data.resize_images(grey, (32, 32))
    original = Counter(
        (image.tobytes(), label) for image, label in zip(resized, digits.target, strict=True)
    )
    train, test = data.split("", "train"), data.split("", "test")
    shipped = Counter(zip(_pixels(train), train.labels, strict=True))
    shipped.update(zip(_pixels(test), test.labels, strict=True))
    assert (len(train), len(test)) == (300, 1497)
    assert shipped == original


def test_shipped_digits_can_be_made_again(tmp_path):
    make_data.make_digits(tmp_path)
    again = images.DemoData(tmp_path)
    for name in ("train", "test"):
        old, new = data.split("", name), again.split("", name)
        assert old.labels == new.labels
        assert _pixels(old) == _pixels(new)


def test_tiles_are_cut_in_order(tmp_path):
    grey = np.zeros((53, 4, 4), np.uint8)
    grey += np.arange(53, dtype=np.uint8)[:, None, None]  # 53 tiles: a second row of three
    labels = {"train": np.array([1, 0]), "test": np.arange(51) % 2}
    make_data.write_set(tmp_path / "digits", ["even", "odd"], grey, labels)
    split = images.DemoData(tmp_path).split("", "test")
    assert [split.image(i).getpixel((16, 16)) for i in (0, 47, 48, 50)] == [2, 49, 50, 52]
    with pytest.raises(IndexError, match="image 51 of a split of 51"):
        split.image(51)


def test_unknown_data_is_a_key_error():
    with pytest.raises(KeyError, match="there are demo and demo:fashion"):
        data.split("letters", "train")
    with pytest.raises(KeyError, match="there are demo and demo:fashion"):
        data.classes("letters")


@pytest.mark.parametrize("suffix", ["png", "json"])
def test_damaged_data_are_an_os_error(tmp_path, suffix):
    for path in images.DATA_DIR.glob("digits.*"):
        shutil.copy(path, tmp_path)
    broken = tmp_path / f"digits.{suffix}"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(OSError, match=rf"digits\.{suffix} of the demo data is damaged"):
        images.DemoData(tmp_path).split("", "train")


def test_idx_files_are_read(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, *range(6)])))
    assert make_data.read_idx(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(gzip.compress(bytes([0, 0, 13, 1, 0, 0, 0, 0])))
    with pytest.raises(ValueError, match="not an IDX file of unsigned bytes"):
        make_data.read_idx(path)


# --- pretraining and publishing


def test_augmentation_moves_and_mirrors_and_nothing_else():
    pixels = torch.zeros(64, 32, 32, dtype=torch.uint8)
    pixels[:, 10, 12] = 7
    moved = pretrain.augment(pixels, torch.Generator().manual_seed(0))
    spots = moved.nonzero()
    assert torch.equal(moved.sum(dim=(1, 2)), torch.full((64,), 7))
    rows, columns = spots[:, 1] - 10, spots[:, 2]
    assert rows.abs().max() == pretrain.MAX_SHIFT
    straight = columns < 16
    assert (columns[straight] - 12).abs().max() <= pretrain.MAX_SHIFT
    assert (columns[~straight] - (31 - 12)).abs().max() <= pretrain.MAX_SHIFT
    assert 16 < straight.sum() < 48


def test_rotation_turns_each_image_its_own_way():
    corner = torch.zeros(4, 3, 3)
    corner[:, 0, 2] = 1.0  # top right; one turn counter-clockwise moves it to the top left
    turned = pretrain.rotate(corner, torch.arange(4))
    assert turned.nonzero()[:, 1:].tolist() == [[0, 2], [0, 0], [2, 0], [2, 2]]


def test_learning_rate_warms_up_and_ends_at_zero():
    config = pretrain.TrainConfig(lr=2.0, warmup=0.2)
    rates = [pretrain.learning_rate(config, p) for p in (0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([1.0, 2.0, 1.0, 0.0])


def test_overflowing_tensors_stay_float32():
    halved = publish.to_half(
        {"w": torch.tensor([1.0 / 3.0]), "v": torch.tensor([1e5]), "n": torch.tensor(70000)}
    )
    assert [t.dtype for t in halved.values()] == [torch.float16, torch.float32, torch.int64]
    assert halved["v"].item() == 1e5


@pytest.fixture
def tiny_sets():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (256, *IMAGE_SIZE), generator=generator, dtype=torch.uint8)
    tiny = pretrain.Images(pixels, torch.arange(256) % 10)
    return tiny, tiny


def test_an_interrupted_training_ends_like_an_uninterrupted_one(tmp_path, tiny_sets, monkeypatch):
    config = pretrain.TrainConfig(epochs=2)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    for folder in (straight, cut):
        folder.mkdir()
    pretrain.train("resnext", config, tiny_sets, straight)

    calls = []

    def stop_in_second_epoch(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.5

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "accuracy", stop_in_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            pretrain.train("resnext", config, tiny_sets, cut)
    assert publish.checkpoint_state(cut / "resnext.safetensors")["epoch"] == 1
    pretrain.train("resnext", config, tiny_sets, cut)

    ends = [pretrain.load_file(folder / "resnext.safetensors") for folder in (straight, cut)]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, msg=lambda text, name=name: name + text)
    with pytest.raises(SystemExit, match="trained with other settings"):
        pretrain.train("resnext", pretrain.TrainConfig(epochs=3), tiny_sets, cut)


def test_publishing_writes_weights_index_and_manifest_that_agree(tmp_path, tiny_sets):
    pretrain.train("resnext", pretrain.TrainConfig(epochs=1), tiny_sets, tmp_path)
    shipped, manifest = tmp_path / "weights", tmp_path / "demo.toml"
    shipped.mkdir()
    entry = publish.publish(
        "resnext", tmp_path / "resnext.safetensors", lambda *_: 0.12345, shipped, manifest
    )
    assert json.loads((shipped / "index.json").read_text()) == {"resnext": entry}
    assert (entry["top1"], entry["epochs"]) == (0.1235, 1)
    (model,) = tomllib.loads(manifest.read_text())["model"]
    assert model["sha256"] == entry["sha256"]
    half = DemoZoo(shipped).build("resnext", pretrained=True).state_dict()
    trained = pretrain.load_file(tmp_path / "resnext.safetensors")
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, trained[f"model.{name}"], rtol=1e-3, atol=1e-6)


def test_publishing_an_untrained_donor_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"resnext has no checkpoint at .*; train it first"):
        publish.publish("resnext", tmp_path / "resnext.safetensors", lambda *_: 0.0, tmp_path)


def test_classes_of_fashion_are_named():
    assert tuple(data.classes("fashion")) == FASHION_CLASSES
    assert Image.open(images.DATA_DIR / "fashion.png").mode == "L"
