"""The demo zoo: architectures from timm's classes, weights from this package."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dery_cli.types import InputSpec, ModelCard
from dery_demo.donors import DONORS, IMAGE_SIZE, MEAN, STD, DemoDonor

if TYPE_CHECKING:
    from torch import nn

WEIGHTS_DIR = Path(__file__).parent / "weights"
INDEX_NAME = "index.json"
LICENSE = "Apache-2.0"
SOURCE = "trained by dery_demo.pretrain on Fashion-MNIST (Zalando SE, MIT licence)"
MIN_IMAGE_SIZE = 16  # below this, the convolutional donors' last grids vanish


@functools.cache
def read_index(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """The published donors: hash, accuracy and what else ``publish`` wrote, by name."""
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    try:
        index: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(
            f"{INDEX_NAME} of the demo zoo is damaged: {error}; reinstall dery-cli"
        ) from error
    return index


class DemoZoo:
    """A ``ZooPlugin`` whose weights lie beside it.

    Args:
        weights_dir: Folder of the weights and their index.
    """

    def __init__(self, weights_dir: Path = WEIGHTS_DIR) -> None:
        self.weights_dir = weights_dir

    def list_models(self) -> Sequence[str]:
        """Every donor's name, smallest architecture first."""
        return tuple(DONORS)

    def card(self, model: str) -> ModelCard:
        """The donor's card; the accuracy is that of the shipped half-precision weights."""
        donor = DONORS[model]
        entry = read_index(self.weights_dir).get(model)
        return ModelCard(
            input=InputSpec(
                image_size=IMAGE_SIZE, mean=(MEAN,) * 3, std=(STD,) * 3, interpolation="bilinear"
            ),
            license=LICENSE,
            task=donor.task_text,
            source=SOURCE,
            metrics={} if entry is None else {"top1": entry["top1"]},
        )

    def build(
        self, model: str, *, pretrained: bool, image_size: tuple[int, int] | None = None
    ) -> nn.Module:
        """The donor in eval mode, float32.

        Raises:
            KeyError: ``model`` is unknown.
            ValueError: ``image_size`` does not suit the architecture.
            OSError: The weights are missing, or are not the published ones.
        """
        donor = DONORS[model]
        size = IMAGE_SIZE if image_size is None else image_size
        _check_size(model, donor, size)
        if not pretrained:
            return donor.construct(donor.num_classes, size).eval()
        raw = self._verified_weights(model)

        from safetensors.torch import load

        network = donor.construct(donor.num_classes, size)
        network.load_state_dict(load(raw))  # half precision on disk, copied into float32
        return network.eval()

    def weights_sha256(self, model: str) -> str | None:
        """Hash of the published weights file, the one ``build`` insists on."""
        if model not in DONORS:
            raise KeyError(model)
        entry = read_index(self.weights_dir).get(model)
        return None if entry is None else str(entry["sha256"])

    def _verified_weights(self, model: str) -> bytes:
        path = self.weights_dir / f"{model}.safetensors"
        entry = read_index(self.weights_dir).get(model)
        if entry is None or not path.exists():
            raise OSError(
                f"the weights of demo/{model} are missing from the package; reinstall dery-cli"
            )
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        if digest != entry["sha256"]:
            raise OSError(
                f"the weights of demo/{model} are truncated or altered: {path.name} has sha256 "
                f"{digest[:12]}..., published was {entry['sha256'][:12]}...; reinstall dery-cli"
            )
        return raw


def _check_size(model: str, donor: DemoDonor, size: tuple[int, int]) -> None:
    height, width = size
    if donor.fixed_size and size != IMAGE_SIZE:
        raise ValueError(
            f"demo/{model} takes {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} images only, "
            f"not {height} x {width}"
        )
    if min(size) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"demo/{model} takes images of {MIN_IMAGE_SIZE} pixels a side or more, "
            f"not {height} x {width}"
        )
