"""What a network sees of an image: the same field of view for every donor, at its own size.

A centred square of ``crop`` times the short side, resized to the donor's input and normalised its
way. torch is imported where tensors are made, so that ``--help`` does without.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from typing import TYPE_CHECKING

from PIL import ExifTags, Image

from dery_cli.types import InputSpec

if TYPE_CHECKING:
    import torch

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What a damaged file makes Pillow raise."""
DEFAULT_CROP = 0.95
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of an EXIF orientation upright."""


def field_of_view(size: tuple[int, int], crop: float) -> tuple[float, float, float, float]:
    """The centred square of ``crop`` times the short side, as a PIL box, for a (width, height)."""
    width, height = size
    side = crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def to_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """Upright as EXIF says; grayscale for one channel, else RGB; transparency is laid on white.

    Raises:
        NoBrightnessError: Its values cannot be told from 0 (black) to a known white.
    """
    image = to_bytes(_upright(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    elif image.mode == "LAB":
        image = image.convert("RGB")
    wanted = "L" if in_chans == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:  # the EXIF data are damaged, the pixels are not
        return image
    if orientation not in _UPRIGHT:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    kept = {"transparency"} & set(image.info)
    turned.info = {key: image.info[key] for key in kept}  # or it would be turned again
    return turned


class NoBrightnessError(ValueError):
    """An image's values have no known black and white; the message names mode and values."""


_BITS = (8, 12, 16, 31)
"""Whole numbers are of the fewest of these bits that hold the largest of an image."""


def to_bytes(image: Image.Image) -> Image.Image:
    """Gray of more than eight bits as eight; an image of another mode as it is.

    Whole numbers are scaled from the fewest of 8, 12, 16 or 31 bits that hold the largest of them;
    numbers with decimals from [0, 1], or else from [0, 255]. The one value that may be transparent
    becomes white.

    Raises:
        NoBrightnessError: Numbers are negative, not finite, or with decimals and larger.
    """
    whole = image.mode == "I" or image.mode.startswith("I;16")
    if not whole and image.mode != "F":
        return image
    import numpy as np

    values = np.asarray(image).astype(np.int64 if whole else np.float64)
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= 0 and high <= (1 << 31 if whole else 255)):  # NaN too
        raise NoBrightnessError(
            f"mode {image.mode} with values from {low:g} to {high:g}, of which none is known to "
            "be white"
        )
    if whole:
        bits = next(bits for bits in _BITS if high < 1 << bits)
        scaled = values * 255 // ((1 << bits) - 1)
    else:
        scaled = np.rint(values * 255 if high <= 1 else values)
    if "transparency" in image.info:
        scaled[values == image.info["transparency"]] = 255
    return Image.fromarray(scaled.astype(np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    """PIL image to bytes (C, H, W), uint8."""
    import numpy as np
    import torch

    values = np.array(image, dtype=np.uint8)
    if values.ndim == 2:
        values = values[:, :, None]
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def normalise(pixels_CHW: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """Bytes (..., C, H, W) to floats, scaled to [0, 1], then normalised."""
    import torch

    device = pixels_CHW.device
    mean = torch.tensor(spec.mean, dtype=torch.float32, device=device).view(-1, 1, 1)
    std = torch.tensor(spec.std, dtype=torch.float32, device=device).view(-1, 1, 1)
    return (pixels_CHW.float() / 255.0 - mean) / std


def normalised(image: Image.Image, spec: InputSpec) -> torch.Tensor:
    """PIL image to a float tensor (C, H, W), scaled to [0, 1], then normalised."""
    return normalise(pixels(image), spec)


@dataclasses.dataclass(frozen=True)
class SquareView:
    """The field of view of every donor, resized to this input's size."""

    input: InputSpec
    crop: float = DEFAULT_CROP

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.input.image_size
        resampling = _RESAMPLING[self.input.interpolation]
        return image.resize((width, height), resampling, box=field_of_view(image.size, self.crop))


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Square crop, resize, normalise: what a donor sees at embedding and evaluation."""

    input: InputSpec
    crop: float = DEFAULT_CROP

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return normalise(self.pixels(image), self.input)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """The same before it is normalised: bytes (C, H, W)."""
        image = to_mode(image, self.input.in_chans)
        return pixels(SquareView(self.input, self.crop)(image))
