from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import typing
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dery_cli.types import InputSpec, ModelCard

if TYPE_CHECKING:
    from torch import nn


class TorchvisionZoo:
    """Torchvision's classification models: ``torchvision/NAME[.WEIGHTS]``.

    Without ``.WEIGHTS`` a name stands for torchvision's default weights.
    """

    def list_models(self) -> Sequence[str]:
        from torchvision import models

        names = models.list_models(module=models)
        tagged = [f"{name}.{w.name}" for name in names for w in models.get_model_weights(name)]
        return sorted([*names, *tagged])

    def card(self, model: str) -> ModelCard:
        _, weights = _resolve(model)
        if weights is None:
            return ModelCard(input=InputSpec(image_size=(224, 224), interpolation="bilinear"))
        seen, meta = weights.transforms(), weights.meta
        size = tuple(seen.crop_size) * (2 if len(seen.crop_size) == 1 else 1)
        figures = meta.get("_metrics", {}).get("ImageNet-1K", {})
        metrics = {"top1": figures["acc@1"] / 100} if "acc@1" in figures else {}
        task = "ImageNet-1k classification"
        if "SWAG" in weights.name:
            how = "linear probe on" if "LINEAR" in weights.name else "fine-tuned on"
            task = f"weakly supervised (SWAG), {how} {task}"
        return ModelCard(
            input=InputSpec(
                image_size=(size[0], size[1]),
                mean=tuple(seen.mean),
                std=tuple(seen.std),
                interpolation=seen.interpolation.value,
            ),
            license="CC-BY-NC-4.0" if "SWAG" in weights.name else "BSD-3-Clause",
            task=task,
            source=weights.url,
            metrics=metrics,
        )

    def build(
        self, model: str, *, pretrained: bool, image_size: tuple[int, int] | None = None
    ) -> nn.Module:
        name, weights = _resolve(model)
        usual = self.card(model).input.image_size
        size = usual if image_size is None else (image_size[0], image_size[1])
        options = _variant(name)
        options |= _size_options(model, name, size, options, check=size != usual)
        if not pretrained:
            return _construct(name, options).eval()
        if weights is None:
            raise OSError(f"torchvision has no pretrained weights for {name}")
        with _safe_downloads(model):
            if size == usual or not _size_argument(name):
                from torchvision import models

                built: nn.Module = models.get_model(name, weights=weights)
                return built.eval()
            state = weights.get_state_dict(progress=True, check_hash=True)
        built = _construct(name, options)
        state = _resample(built, state, options)
        mismatch = [
            key for key, value in built.state_dict().items() if state[key].shape != value.shape
        ]
        if mismatch:
            raise ValueError(
                f"the weights of {model} are made for {usual[0]}x{usual[1]} images: "
                f"{mismatch[0]} has another shape at {options}"
            )
        built.load_state_dict(state)
        return built.eval()


def _resolve(model: str) -> tuple[str, Any]:
    """Builder name and weights (None where torchvision offers none) of a spec.

    Raises:
        KeyError: Torchvision has no such classification model, or no such weights for it.
    """
    from torchvision import models

    name, _, tag = model.partition(".")
    if name not in models.list_models(module=models):
        raise KeyError(model)
    offered = models.get_model_weights(name)
    if tag:
        if tag not in offered.__members__:
            raise KeyError(model)
        return name, offered[tag]
    if not len(offered):
        return name, None
    return name, getattr(offered, "DEFAULT", next(iter(offered)))


def _signature(name: str) -> inspect.Signature:
    """The constructor arguments of the class that builder ``name`` returns."""
    from torchvision import models

    kind = typing.get_type_hints(models.get_model_builder(name))["return"]
    return inspect.signature(kind)


def _variant(name: str) -> dict[str, Any]:
    """What torchvision's pretrained variant of a model sets and its untrained one does not.

    Models with auxiliary classifiers drop them, and take the input normalised as all others do.
    """
    known = _signature(name).parameters
    return {k: v for k, v in _PRETRAINED_VARIANT.items() if k in known}


_PRETRAINED_VARIANT = {"aux_logits": False, "transform_input": True, "init_weights": True}


def _size_argument(name: str) -> str | None:
    """How the constructor of ``name`` calls the image size, if it asks for it."""
    known = _signature(name).parameters
    return next((key for key in ("image_size", "input_size") if key in known), None)


def _construct(name: str, options: dict[str, Any]) -> nn.Module:
    import torch
    from torchvision import models

    try:
        built: nn.Module = models.get_model(name, weights=None, **options)
    except NotImplementedError:  # it computes its widths with tensors: not on the meta device
        target = torch.get_default_device()
        with torch.device("cpu"):
            built = models.get_model(name, weights=None, **options)
        built = built.to(target)
    return built


def _size_options(
    model: str, name: str, size: tuple[int, int], options: dict[str, Any], *, check: bool
) -> dict[str, Any]:
    """What the constructor has to be told for images of ``size``.

    With ``check`` the model is first tried on the meta device.

    Raises:
        ValueError: The architecture does not take that size.
    """
    import torch

    argument = _size_argument(name)
    sized: dict[str, Any] = {}
    if argument == "image_size":
        if size[0] != size[1]:
            raise ValueError(f"{model} takes square images only, not {size[0]}x{size[1]}")
        sized = {argument: size[0]}
    elif argument is not None:
        sized = {argument: size}
    if not check:
        return sized
    try:
        with torch.device("meta"), torch.no_grad():
            _construct(name, options | sized).eval()(torch.empty(1, 3, *size))
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{model} does not take {size[0]}x{size[1]} images: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    return sized


def _resample(built: nn.Module, state: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Position embeddings resampled to the image size ``built`` was made for."""
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    if isinstance(built, VisionTransformer):
        ordered = OrderedDict(state)
        return dict(interpolate_embeddings(options["image_size"], built.patch_size, ordered))
    return state


@contextlib.contextmanager
def _safe_downloads(model: str) -> Iterator[None]:
    """Make torchvision's weights load without unpickling code, and say clearly what fails."""
    from unittest import mock

    import torch
    from torchvision.models import WeightsEnum

    def fetch(self: Any, *, progress: bool = True, check_hash: bool = True) -> Any:
        return torch.hub.load_state_dict_from_url(
            self.url,
            progress=progress,
            check_hash=check_hash,
            map_location="cpu",
            weights_only=True,
            model_dir=None,
        )

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}

    def refuse(self: Any, **_: Any) -> Any:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        if os.path.exists(os.path.join(folder, os.path.basename(self.url))):
            return fetch(self)
        raise OSError(
            f"the weights of {model} are not in the local cache and HF_HUB_OFFLINE is set"
        )

    try:
        with mock.patch.object(WeightsEnum, "get_state_dict", refuse if offline else fetch):
            yield
    except pickle.UnpicklingError as error:
        raise OSError(f"the weights of {model} are refused: they hold more than tensors") from error
    except RuntimeError as error:
        if "hash" not in str(error):
            raise
        raise OSError(f"the weights of {model} are damaged: {error}") from error
    except OSError as error:
        if "HF_HUB_OFFLINE" in str(error):
            raise
        raise OSError(
            f"the weights of {model} could not be fetched: {type(error).__name__}, no network?"
        ) from error
