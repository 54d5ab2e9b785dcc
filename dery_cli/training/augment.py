"""Augmentation: timm's RandAugment, random crops, Mixup and CutMix, put together by the config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from dery_cli.training.recipe import FinetuneConfig
from dery_cli.types import InputSpec
from dery_cli.zoo.transforms import DEFAULT_CROP, SquareView, normalised, to_mode

ImageStep = Callable[[Image.Image], Image.Image]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """What a training image goes through; built by ``train_transform``.

    Args:
        input: Size and normalisation of the network.
        steps: From image to augmented image of the network's size, one after the other.
        torch_only: Whether all they draw comes from torch's generator.
    """

    input: InputSpec
    steps: tuple[ImageStep, ...]
    torch_only: bool

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = to_mode(image, self.input.in_chans)
        for step in self.steps:
            image = step(image)
        return normalised(image, self.input)


def train_transform(
    input: InputSpec,  # noqa: A002 - the word of DESIGN.md
    config: FinetuneConfig,
    crop: float = DEFAULT_CROP,
) -> TrainTransform:
    """Crop, mirror, RandAugment and normalise; without any of them, what evaluation sees.

    All of it draws from the global generators, which ``SeededDataset`` seeds per image. Gray images
    stay gray, and there is no colour jitter.

    Args:
        input: Size and normalisation of the network.
        config: Which augmentations.
        crop: Share of the short side the network sees where the crop is not random in size.

    Returns:
        From a PIL image to the normalised (C, H, W) tensor.
    """
    steps: list[ImageStep] = []
    if config.crop_scale is not None:
        steps.append(
            RandomResizedCropAndInterpolation(
                input.image_size, config.crop_scale, config.crop_ratio, input.interpolation
            )
        )
    else:
        steps.append(SquareView(input, crop))
        pad_hw = [round(config.crop_padding * side) for side in input.image_size]
        if any(pad_hw):
            steps.append(
                transforms.RandomCrop(input.image_size, padding=pad_hw[::-1], padding_mode="edge")
            )
    if config.hflip:
        steps.append(transforms.RandomHorizontalFlip(config.hflip))
    if config.randaugment:
        fill = tuple(round(255 * mean) for mean in input.mean)
        hparams = {
            "translate_const": round(min(input.image_size) * 0.45),
            "img_mean": fill if input.in_chans == 3 else fill[0],
            "magnitude_max": 9.9,  # at 10 timm posterizes to 0 bits, which Pillow refuses
        }
        steps.append(rand_augment_transform(f"rand-m{config.randaugment}-mstd0.5-inc1", hparams))
    timms = config.crop_scale is not None or config.randaugment > 0
    return TrainTransform(input=input, steps=tuple(steps), torch_only=not timms)


def make_mixup(config: FinetuneConfig, classes: int) -> Mixup | None:
    """Mixup and CutMix of a batch (timm's), which also smooths the labels; None for neither."""
    if not config.mixes:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.label_smoothing,
        num_classes=classes,
    )
