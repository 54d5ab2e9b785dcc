"""JPEG files of the size of photographs, for benches that are to decode what users have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_photographs(
    folder: Path, count: int, *, classes: int = 4, size: tuple[int, int] = (500, 375)
) -> Path:
    """``count`` pictures of (width, height) in so many class folders: smooth shapes and some noise.

    They compress about as photographs do, to a tenth of their bytes.
    """
    rng = np.random.default_rng(0)
    for index in range(count):
        place = folder / f"class{index % classes}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 255, (6 + index % classes, 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        noise = rng.normal(0, 6, (*smooth.shape[:2], 1))
        picture = Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))
        picture.save(place / f"{index:05d}.jpg", quality=90)
    return folder
