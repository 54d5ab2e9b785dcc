"""Torchvision's data sets as ``torchvision:NAME[?root=DIR&download=1]``.

Nothing is fetched unless ``download=1`` says so, nor with ``HF_HUB_OFFLINE=1``. Files that are
pickles are compared with the checksum torchvision publishes and then read by an unpickler that
knows arrays and containers only.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import os
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from dery_cli.plugin import ImageSplit

_IDX = ("MNIST", "FashionMNIST", "KMNIST")
_CIFAR = ("CIFAR10", "CIFAR100")
_FILES = (
    "Country211", "DTD", "FGVCAircraft", "Flowers102", "Food101", "GTSRB", "OxfordIIITPet",
    "RenderedSST2", "STL10", "SVHN", "StanfordCars",
)  # fmt: skip
"""Data sets of image and table files that torchvision itself reads without unpickling."""
_TRAIN = {"OxfordIIITPet": "trainval"}
"""What their training images are called, where not ``train``."""
_TRUE = {"1", "ON", "YES", "TRUE"}


class TorchvisionData:
    """The data sets named above, by torchvision's class names."""

    def resolve(self, argument: str) -> str:
        """``argument`` with its root folder, if it names one, as an absolute path."""
        root = str(_parse(argument)[1].resolve())
        name, _, query = argument.partition("?")
        options = [(k, root if k == "root" else v) for k, v in parse_qsl(query)]
        return f"{name}?{urlencode(options, safe='/')}" if options else name

    def classes(self, argument: str) -> Sequence[str] | None:
        name, root, download = _parse(argument)
        if name in _CIFAR:
            return _cifar_classes(name, root, download)
        if name in _IDX:
            from torchvision import datasets

            return list(getattr(datasets, name).classes)
        return _class_names(_dataset(name, root, "train", download))

    def split(self, argument: str, name: str) -> ImageSplit | None:
        if name not in ("train", "test"):
            return None
        data, root, download = _parse(argument)
        if data in _CIFAR:
            return _cifar(data, root, name, download)
        if data in _IDX:
            return _idx(data, root, name, download)
        return FileSplit(_dataset(data, root, name, download))


class ArraySplit:
    """Images held as one uint8 array, (N, H, W) or (N, H, W, C)."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        if len(images) != len(labels):
            raise OSError(f"{len(images)} images but {len(labels)} labels")
        self._images = images
        self.labels: Sequence[int] | None = [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        from PIL import Image

        return Image.fromarray(self._images[index])


class FileSplit:
    """A torchvision data set that decodes an image when it is asked for."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.labels: Sequence[int] | None = _labels(dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def image(self, index: int) -> Image.Image:
        image: Image.Image = self._dataset[index][0]
        return image

    def name(self, index: int) -> str:
        for attribute in ("_image_files", "_images", "_samples", "samples"):
            files = getattr(self._dataset, attribute, None)
            if files is not None:
                return str(files[index][0] if "samples" in attribute else files[index])
        return f"number {index}"


def _parse(argument: str) -> tuple[str, Path, bool]:
    """Name, root folder and download flag of a spec.

    Raises:
        KeyError: The name, or an option, is unknown.
    """
    name, _, query = argument.partition("?")
    if name not in (*_IDX, *_CIFAR, *_FILES):
        known = ", ".join(sorted((*_IDX, *_CIFAR, *_FILES)))
        raise KeyError(f"it is not one of {known}; give a set of class folders as a folder")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - {"root", "download"})
    if unknown:
        raise KeyError(f"{argument}: unknown option {unknown[0]!r}, known are root and download")
    usual = os.environ.get("DERY_DATA") or Path.home() / ".cache" / "dery" / "torchvision"
    root = Path(os.path.expanduser(options.get("root") or usual))
    asked = options.get("download", "").upper() in _TRUE
    return name, root, asked and not _offline()


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def _missing(name: str, where: Path, state: str = "is not in") -> OSError:
    return OSError(
        f"{name} {state} {where}: put its files there, name another folder "
        f"(torchvision:{name}?root=DIR) or let it be fetched (torchvision:{name}?download=1)"
        + (", which HF_HUB_OFFLINE forbids" if _offline() else "")
    )


def _idx(name: str, root: Path, split: str, download: bool) -> ArraySplit:
    folder = root / name / "raw"
    prefix = "train" if split == "train" else "t10k"
    paths = [folder / f"{prefix}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if download and not all(map(_existing, paths)):
        from torchvision import datasets

        kind = getattr(datasets, name)
        fetcher = kind.__new__(kind)  # its constructor would go on to read what it fetched
        fetcher.root = str(root)
        fetcher.download()
    images, labels = (_read_idx(name, folder, path) for path in paths)
    if (images.ndim, labels.ndim) != (3, 1):
        raise OSError(f"the images and labels in {folder} are of {images.shape} and {labels.shape}")
    return ArraySplit(images, labels.tolist())


def _existing(path: Path) -> Path | None:
    packed = path.with_name(path.name + ".gz")
    return next((each for each in (path, packed) if each.is_file()), None)


def _read_idx(name: str, folder: Path, path: Path) -> np.ndarray:
    """The array in an idx file of unsigned bytes, plain or gzipped.

    Raises:
        OSError: It is not there, or its length does not fit its header.
    """
    import numpy as np

    found = _existing(path)
    if found is None:
        raise _missing(name, folder)
    try:
        data = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except EOFError as error:
        raise OSError(f"{found} is truncated") from error
    except zlib.error as error:
        raise OSError(f"{found} is damaged: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise OSError(f"{found} is not an idx file of unsigned bytes")
    ndim = data[3]
    header = 4 + 4 * ndim
    shape = struct.unpack(f">{ndim}I", data[4:header]) if len(data) >= header else ()
    count = int(np.prod(shape, dtype=object)) if shape else -1
    if count != len(data) - header:
        raise OSError(f"{found} is damaged: {len(data) - header} bytes where {shape} are announced")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _cifar(name: str, root: Path, split: str, download: bool) -> ArraySplit:
    import numpy as np
    from torchvision import datasets

    kind = getattr(datasets, name)
    listed = kind.train_list if split == "train" else kind.test_list
    parts = [_cifar_file(kind, root, file, md5, download) for file, md5 in listed]
    images = np.concatenate([np.asarray(part["data"], np.uint8) for part in parts])
    labels = [x for part in parts for x in part["labels" if "labels" in part else "fine_labels"]]
    return ArraySplit(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)


def _cifar_classes(name: str, root: Path, download: bool) -> list[str]:
    from torchvision import datasets

    kind = getattr(datasets, name)
    meta = kind.meta
    names = _cifar_file(kind, root, meta["filename"], meta["md5"], download)[meta["key"]]
    return [str(each) for each in names]


def _cifar_file(kind: Any, root: Path, file: str, md5: str, download: bool) -> dict[str, Any]:
    """One of CIFAR's pickles, after its checksum.

    Raises:
        OSError: It is not there, it is not the published file, or it holds more than arrays.
    """
    path = root / kind.base_folder / file
    if download and not path.is_file():
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(kind.url, str(root), filename=kind.filename, md5=kind.tgz_md5)
    if not path.is_file():
        raise _missing(kind.__name__, root / kind.base_folder)
    data = path.read_bytes()
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise OSError(f"{path} is not the published file: its MD5 is {found}, not {md5}")
    return unpickle(data, str(path))


_ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _resolve(module, name)


@functools.cache
def _resolve(module: str, name: str) -> Any:
    import codecs

    import numpy as np

    if module == "_codecs":
        return codecs.encode
    if name == "_reconstruct":
        # the function that numpy's own pickles name, whatever its module is called today
        return np.zeros(0).__reduce__()[0]
    return getattr(np, name)


def unpickle(data: bytes, source: str) -> dict[str, Any]:
    """A dict of arrays, numbers, strings and containers of them from a pickle, and nothing else.

    Raises:
        OSError: The pickle asks for anything but numpy's arrays, or is damaged.
    """
    try:
        result = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:
        raise OSError(f"{source} is refused: {error}") from error
    if not isinstance(result, dict):
        raise OSError(f"{source} is refused: it holds {type(result).__name__}, not a dict")
    return result


def _dataset(name: str, root: Path, split: str, download: bool) -> Any:
    from torchvision import datasets

    called = _TRAIN.get(name, split) if split == "train" else split
    try:
        return getattr(datasets, name)(str(root), split=called, download=download)
    except (RuntimeError, FileNotFoundError) as error:  # neither tells missing from damaged
        raise _missing(name, root, "is not, or not whole, in") from error
    except OSError:
        raise
    except Exception as error:  # whatever its readers make of damaged lists
        raise OSError(f"the files of {name} in {root} cannot be read: {error}") from error


def _labels(dataset: Any) -> list[int] | None:
    for name in ("_labels", "labels", "targets"):
        labels = getattr(dataset, name, None)
        if labels is not None:
            return [int(label) for label in labels]
    samples = getattr(dataset, "_samples", None) or getattr(dataset, "samples", None)
    return [int(label) for _, label in samples] if samples else None


def _class_names(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "classes", None)
    if names is not None:
        return [str(name) for name in names]
    labels = _labels(dataset)
    return [str(label) for label in range(max(labels) + 1)] if labels else None
