"""Folders, fields of view, fingerprints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dery_cli.data import (
    EvalTransform,
    ImageDataset,
    choose_samples,
    field_of_view,
    fingerprint,
    open_data,
    stratified_holdout,
    to_mode,
)
from dery_cli.errors import DeryError, UsageError
from dery_cli.types import InputSpec
from tests.conftest import make_images


def test_one_folder_is_split_by_class(tmp_path):
    data = open_data(str(make_images(tmp_path, ["ant", "bee", "cow"], 10)))
    assert data.classes == ("ant", "bee", "cow")
    assert (len(data.train), len(data.test)) == (24, 6)
    assert [list(data.test.labels).count(label) for label in range(3)] == [2, 2, 2]
    again = open_data(str(tmp_path))
    assert fingerprint(data.train) == fingerprint(again.train)
    assert fingerprint(data.train) != fingerprint(data.test)


def test_train_and_val_folders_are_kept_apart(tmp_path):
    make_images(tmp_path / "train", ["ant", "bee"], 4)
    make_images(tmp_path / "val", ["ant", "bee"], 3)
    data = open_data(str(tmp_path))
    assert (len(data.train), len(data.test)) == (8, 6)
    make_images(tmp_path / "val", ["cow"], 3)
    with pytest.raises(UsageError, match=r"has classes that .* lacks: cow"):
        open_data(str(tmp_path))


def test_a_flat_folder_has_no_labels(tmp_path):
    make_images(tmp_path, ["."], 5)
    data = open_data(str(tmp_path))
    assert data.classes is None
    assert data.train.labels is None
    assert data.test is None
    assert ImageDataset(data.train, lambda image: image.size)[0] == ((46, 40), -1)


def test_a_broken_image_is_named(tmp_path):
    make_images(tmp_path, ["ant", "bee"], 3)
    (tmp_path / "ant" / "001.png").write_bytes(b"no image")
    data = open_data(str(tmp_path))
    images = [(split, i) for split in (data.train, data.test) for i in range(len(split))]

    def decode():
        return [split.image(index) for split, index in images]

    with pytest.raises(DeryError, match=r"cannot read the image .*ant.001\.png"):
        decode()


def test_the_field_of_view_is_a_centred_square():
    assert field_of_view((100, 60), 1.0) == (20.0, 0.0, 80.0, 60.0)
    left, top, right, bottom = field_of_view((60, 100), 0.5)
    assert (right - left, bottom - top) == (30.0, 30.0)
    assert (left + right, top + bottom) == (60.0, 100.0)


def test_the_transform_crops_resizes_and_normalises():
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, 10:50] = (255, 0, 51)  # all that the central square can see
    spec = InputSpec(image_size=(8, 8), mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 1.0))
    x = EvalTransform(spec, 1.0)(Image.fromarray(pixels))
    assert x.shape == (3, 8, 8)
    assert x.dtype == torch.float32
    assert torch.allclose(x[:, 4, 4], torch.tensor([1.0, -2.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_mode_becomes_gray_or_rgb(mode, in_chans):
    image = Image.new(mode, (8, 8))
    spec = InputSpec(
        image_size=(4, 4), mean=(0.0,) * in_chans, std=(1.0,) * in_chans, in_chans=in_chans
    )
    x = EvalTransform(spec)(image)
    assert x.shape == (in_chans, 4, 4)
    assert 0.0 <= float(x.min()) <= float(x.max()) <= 1.0


def test_transparent_is_white():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert to_mode(image, 3).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_brightness():
    image = Image.fromarray(np.full((2, 2), 32896, dtype=np.uint16))
    assert to_mode(image, 1).getpixel((0, 0)) == 128


def test_choices_are_by_seed():
    assert choose_samples(100, 10, 0) == choose_samples(100, 10, 0)
    assert choose_samples(100, 10, 0) != choose_samples(100, 10, 1)
    assert choose_samples(100, 10, 0) == choose_samples(100, 20, 0)[:10]
    assert sorted(choose_samples(5, 10, 0)) == [0, 1, 2, 3, 4]


def test_holdout_takes_the_same_share_of_every_class():
    labels = [0] * 10 + [1] * 20 + [2]
    kept, out = stratified_holdout(labels, fraction=0.2, seed=3)
    assert sorted(kept + out) == list(range(31))
    assert [sum(labels[i] == c for i in out) for c in range(3)] == [2, 4, 0]
