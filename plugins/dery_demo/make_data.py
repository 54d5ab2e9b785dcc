"""Make the images that ship with the plugin: ``python -m dery_demo.make_data``.

Digits come from scikit-learn's ``load_digits``, clothes from Fashion-MNIST's ``.gz`` files; see
``data/NOTICE.md`` for where they are from and under which licences. A set becomes one grey PNG of
its images at their own size (8 x 8, 28 x 28), train before test, and a JSON file with the labels.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dery_demo.donors import FASHION_CLASSES
from dery_demo.images import DATA_DIR

SEED = 0
COLUMNS = 50  # images side by side in the PNG
DIGITS_TRAIN = 30  # a class; the other 1,497 digits are the test split
FASHION_TRAIN = 200  # a class, of the training split
FASHION_TEST = 100  # a class, of the test split
IDX_NAMES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in a gzip-compressed IDX file (4-byte magic number, sizes, bytes).

    Raises:
        ValueError: The file is not an IDX file of unsigned bytes.
    """
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape.astype(int))


def load_fashion(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST's images (N, 28, 28) and labels (N) of ``train`` or ``test``."""
    images, labels = (read_idx(root / name) for name in IDX_NAMES[split])
    return images, labels


def resize_images(images_NHW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Grey byte images resized bilinearly, the same way the data plugin does it."""
    from PIL import Image

    height, width = size
    resized = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        for image in images_NHW
    ]
    return np.stack(resized)


def stratified(labels_N: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of ``per_class`` random items of every class, in random order."""
    chosen = [
        rng.choice(np.flatnonzero(labels_N == label), per_class, replace=False)
        for label in np.unique(labels_N)
    ]
    return rng.permutation(np.concatenate(chosen))


def write_set(
    stem: Path, classes: Sequence[str], images_NHW: np.ndarray, labels: dict[str, np.ndarray]
) -> None:
    """Write ``stem``.png and ``stem``.json; ``images_NHW`` holds train, then test."""
    from PIL import Image

    count, tile, _ = images_NHW.shape
    rows = -(-count // COLUMNS)
    canvas = np.zeros((rows * COLUMNS, tile, tile), np.uint8)
    canvas[:count] = images_NHW
    mosaic = canvas.reshape(rows, COLUMNS, tile, tile).swapaxes(1, 2)
    picture = Image.fromarray(mosaic.reshape(rows * tile, COLUMNS * tile))
    picture.save(stem.with_suffix(".png"), optimize=True)
    info = {
        "tile": tile,
        "classes": list(classes),
        "labels": {name: "".join(map(str, values)) for name, values in labels.items()},
    }
    stem.with_suffix(".json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def make_digits(out: Path) -> None:
    """300 labelled digits, 30 a class, and the other 1,497."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    rng = np.random.default_rng(SEED)
    train = stratified(digits.target, DIGITS_TRAIN, rng)
    test = np.setdiff1d(np.arange(len(images)), train)
    labels = {"train": digits.target[train], "test": digits.target[test]}
    order = np.concatenate([train, test])
    write_set(out / "digits", [str(digit) for digit in range(10)], images[order], labels)


def make_fashion(out: Path, root: Path) -> None:
    """2,000 images of Fashion-MNIST's training split and 1,000 of its test split, balanced."""
    rng = np.random.default_rng(SEED)
    images, labels = {}, {}
    for split, per_class in (("train", FASHION_TRAIN), ("test", FASHION_TEST)):
        all_images, all_labels = load_fashion(root, split)
        chosen = stratified(all_labels, per_class, rng)
        images[split], labels[split] = all_images[chosen], all_labels[chosen]
    both = np.concatenate([images["train"], images["test"]])
    write_set(out / "fashion", FASHION_CLASSES, both, labels)


def main() -> None:
    """Parse the command line and write both sets."""
    parser = argparse.ArgumentParser(description="Make the images that ship with dery_demo.")
    parser.add_argument(
        "--data-root",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of Fashion-MNIST's four .gz files",
    )
    parser.add_argument("--out", type=Path, default=DATA_DIR, help="where to write")
    args = parser.parse_args()
    make_digits(args.out)
    make_fashion(args.out, args.data_root)


if __name__ == "__main__":
    main()
