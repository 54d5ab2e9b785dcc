"""Images kept for many passes are those that a plain pass gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from dery_cli.data.batches import ImageBatches, ImageStore
from dery_cli.errors import DeryError
from dery_cli.types import InputSpec

SMALL = InputSpec(image_size=(8, 6))
OTHER_MEAN = dataclasses.replace(SMALL, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
LARGE = InputSpec(image_size=(24, 24))


class Split:
    """Twenty images of random bytes; counts what is decoded."""

    labels = None

    def __init__(self, broken: int | None = None) -> None:
        self.decoded: list[int] = []
        self.broken = broken

    def __len__(self) -> int:
        return 20

    def image(self, index: int) -> Image.Image:
        self.decoded.append(index)
        if index == self.broken:
            raise OSError("cut short")
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(256, (12, 10, 3), dtype=torch.uint8, generator=generator)
        return Image.fromarray(pixels.numpy())


def options(batch_size=3):
    return {"crop": 0.9, "batch_size": batch_size, "device": torch.device("cpu")}


INDICES = [1, 4, 5, 9, 12, 13, 17, 19]


@pytest.mark.parametrize("keep_bytes", [1 << 20, 0])
@pytest.mark.parametrize("spec", [SMALL, OTHER_MEAN, LARGE], ids=["small", "mean", "large"])
@pytest.mark.parametrize("some", [INDICES, [4, 9, 13, 19]], ids=["all", "some"])
def test_a_view_has_the_batches_of_a_plain_pass(spec, some, keep_bytes):
    split = Split()
    view = ImageStore(split, INDICES, keep_bytes=keep_bytes, **options()).view(spec, some)
    plain = list(ImageBatches(split, some, spec, **options()))
    for _ in range(2):
        given = list(view)
        assert [x.shape for x in given] == [x.shape for x in plain]
        assert all(torch.equal(x, y) for x, y in zip(given, plain, strict=True))


def test_inputs_of_one_size_are_decoded_once():
    split = Split()
    store = ImageStore(split, INDICES, **options())
    for spec in (SMALL, OTHER_MEAN, SMALL):
        list(store.view(spec, INDICES[:3]))
    assert split.decoded == INDICES
    list(store.view(LARGE, INDICES))
    assert split.decoded == INDICES * 2


def test_what_does_not_fit_is_decoded_in_every_pass():
    split = Split()
    size = len(INDICES) * 3 * 8 * 6
    store = ImageStore(split, INDICES, keep_bytes=size, **options())
    for spec in (SMALL, LARGE, LARGE, SMALL):
        list(store.view(spec, INDICES))
    assert split.decoded == INDICES * 3


@pytest.mark.parametrize("keep_bytes", [1 << 20, 0])
def test_a_broken_image_is_named(keep_bytes):
    store = ImageStore(Split(broken=12), INDICES, keep_bytes=keep_bytes, **options())
    with pytest.raises(DeryError, match="12"):
        list(store.view(SMALL, INDICES))
