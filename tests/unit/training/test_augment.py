"""Training transforms and Mixup."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from dery_cli.training.augment import make_mixup, train_transform
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.training.sampling import SeededDataset, seed_all
from dery_cli.types import InputSpec
from dery_cli.zoo.transforms import EvalTransform

SPEC = InputSpec(image_size=(16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
GRAY = InputSpec(image_size=(16, 16), mean=(0.5,), std=(0.2,), in_chans=1)


def picture(mode="RGB", size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def config(**changes):
    return FinetuneConfig(steps=1, **changes)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("spec", [SPEC, GRAY], ids=["rgb", "gray"])
def test_without_augmentation_training_sees_what_evaluation_sees(mode, spec):
    seen = train_transform(spec, config())(picture(mode))
    assert torch.equal(seen, EvalTransform(spec)(picture(mode)))


def test_gray_images_stay_gray_under_randaugment():
    transform = train_transform(
        InputSpec(image_size=(16, 16), mean=(0.5,) * 3, std=(0.2,) * 3),
        config(randaugment=9, crop_scale=(0.3, 1.0)),
    )
    for seed in range(40):
        seed_all(seed)
        image_CHW = transform(picture("L"))
        assert image_CHW.shape == (3, 16, 16)
        assert torch.equal(image_CHW[0], image_CHW[1])
        assert torch.equal(image_CHW[0], image_CHW[2])


def test_without_a_magnitude_there_is_no_randaugment():
    shown = [
        type(step).__name__
        for step in train_transform(GRAY, config(crop_padding=0.2, randaugment=0)).steps
    ]
    assert shown == ["SquareView", "RandomCrop"]


def test_randaugment_works_on_one_channel():
    transform = train_transform(GRAY, config(randaugment=10))
    for seed in range(60):
        seed_all(seed)
        assert transform(picture("L")).shape == (1, 16, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hflip": 0.5, "crop_padding": 0.2},
        {"randaugment": 9},
        {"crop_scale": (0.3, 1.0)},
        {"crop_scale": (0.3, 1.0), "randaugment": 9, "hflip": 0.5},
    ],
)
def test_a_transform_knows_whether_it_draws_from_torch_alone(changes):
    transform = train_transform(SPEC, config(**changes))
    seed_all(0)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for _ in range(20):
        transform(picture())
    same = before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert transform.torch_only == same


@pytest.mark.parametrize("changes", [{"crop_padding": 0.2, "hflip": 0.5}, {"randaugment": 9}])
def test_augmented_images_depend_on_nothing_but_their_key(changes):
    class Pictures:
        transform = train_transform(SPEC, config(**changes))

        def __getitem__(self, index):
            return self.transform(picture())

    dataset = SeededDataset(Pictures(), seed=0)
    seed_all(1)
    one = dataset[(0, 3)]
    seed_all(2)
    dataset[(0, 2)]
    assert torch.equal(one, dataset[(0, 3)])
    assert not torch.equal(one, dataset[(1, 3)])


def test_nothing_is_mirrored_unless_asked_for():
    plain = train_transform(SPEC, config())(picture())
    mirrored = train_transform(SPEC, config(hflip=1.0))(picture())
    assert torch.equal(mirrored, plain.flip(2))


def test_padding_shifts_the_image_and_repeats_its_edge():
    transform = train_transform(SPEC, config(crop_padding=0.125))  # 2 of 16 pixels
    plain = train_transform(SPEC, config())(picture())
    shifts = set()
    for seed in range(30):
        seed_all(seed)
        moved = transform(picture())
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                rows = (torch.arange(16) + dy).clamp(0, 15)
                columns = (torch.arange(16) + dx).clamp(0, 15)
                if torch.equal(moved, plain[:, rows][:, :, columns]):
                    shifts.add((dy, dx))
    assert len(shifts) > 10


def test_mixup_depends_on_the_seed_alone_and_smooths_the_labels():
    mixup = make_mixup(config(mixup=0.4, label_smoothing=0.1), 4)
    images, labels = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 3, 0, 1])

    def draw(seed):
        seed_all(seed)
        return mixup(images.clone(), labels)

    (one, target), (again, _), (other, _) = draw(5), draw(5), draw(6)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    lam = ((one[0] - images[5]) / (images[0] - images[5])).mean()  # image 0 is mixed with image 5
    expected = torch.full((4,), 0.025)
    expected[0] += 0.9 * lam
    expected[1] += 0.9 * (1 - lam)
    torch.testing.assert_close(target[0], expected, rtol=1e-4, atol=1e-4)


def test_no_mixing_without_an_alpha():
    assert make_mixup(config(), 4) is None
