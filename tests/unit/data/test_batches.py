"""Images kept for many passes are those that a plain pass gives."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch
from PIL import Image

from dery_cli.data.batches import ImageBatches, ImageStore, in_order
from dery_cli.errors import DeryError
from dery_cli.types import InputSpec

SMALL = InputSpec(image_size=(8, 6))
OTHER_MEAN = dataclasses.replace(SMALL, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
LARGE = InputSpec(image_size=(24, 24))
UNKNOWN = InputSpec(image_size=(9, 9))


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


def options(batch_size=3, workers=0):
    device = torch.device("cpu")
    return {"crop": 0.9, "batch_size": batch_size, "device": device, "workers": workers}


INDICES = [1, 4, 5, 9, 12, 13, 17, 19]


@pytest.mark.parametrize(("keep_bytes", "workers"), [(1 << 20, 0), (0, 0), (500, 3), (0, 2)])
@pytest.mark.parametrize("spec", [SMALL, OTHER_MEAN, LARGE], ids=["small", "mean", "large"])
@pytest.mark.parametrize("some", [INDICES, [4, 9, 13, 19]], ids=["all", "some"])
def test_a_view_has_the_batches_of_a_plain_pass(spec, some, keep_bytes, workers):
    """500 bytes hold the first of the images, and of the large ones none."""
    split = Split()
    store = ImageStore(split, INDICES, keep_bytes=keep_bytes, **options(workers=workers))
    view = store.view(spec, some)
    plain = list(ImageBatches(split, some, spec, **options()))
    for _ in range(2):
        given = list(view)
        assert [x.shape for x in given] == [x.shape for x in plain]
        assert all(torch.equal(x, y) for x, y in zip(given, plain, strict=True))


@pytest.mark.parametrize("workers", [0, 3])
def test_an_image_is_decoded_once_for_all_inputs_that_are_known(workers):
    split = Split()
    store = ImageStore(split, INDICES, inputs=[SMALL, LARGE], **options(workers=workers))
    for spec in (SMALL, OTHER_MEAN, LARGE):
        list(store.view(spec, INDICES[:3]))
    assert sorted(split.decoded) == INDICES[:3]
    list(store.view(LARGE, INDICES))
    list(store.view(SMALL, INDICES[::-1]))
    assert sorted(split.decoded) == INDICES
    list(store.view(UNKNOWN, INDICES))
    assert len(split.decoded) == 2 * len(INDICES)


def test_the_first_images_are_kept_where_there_is_no_room_for_all():
    split = Split()
    both = 3 * (8 * 6 + 24 * 24)
    store = ImageStore(split, INDICES, inputs=[SMALL, LARGE], keep_bytes=5 * both + 1, **options())
    for spec in (SMALL, LARGE):
        list(store.view(spec, INDICES))
    assert split.decoded == INDICES + INDICES[5:]


def test_a_pass_that_is_given_up_ends_its_threads():
    before = threading.active_count()
    batches = iter(ImageStore(Split(), INDICES, **options(1, workers=3)).view(SMALL, INDICES))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_results_come_in_order_and_no_more_are_made_than_may_wait():
    started = []
    results = in_order(
        lambda n: (started.append(n), time.sleep(0.002 * (n % 3)))[0] or n,
        range(30),
        workers=4,
        ahead=5,
    )
    assert next(results) == 0
    time.sleep(0.05)
    assert sorted(started) == list(range(6))
    assert list(results) == list(range(1, 30))


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


def test_images_that_were_first_looked_at_without_gradients_can_be_added_to():
    store = ImageStore(Split(), range(20), crop=1.0, batch_size=5, device=torch.device("cpu"))
    with torch.inference_mode():
        first = list(store.view(SMALL, range(10)))
    second = list(store.view(SMALL, range(20)))
    assert torch.equal(torch.cat(first), torch.cat(second)[:10])
