from __future__ import annotations

import contextlib
import inspect
import os
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dery_cli.types import InputSpec, ModelCard

if TYPE_CHECKING:
    from torch import Tensor, nn

_SPDX = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-4.0": "CC-BY-4.0",
}

_IMAGE_SETS = {
    "in1k": "ImageNet-1k",
    "in12k": "ImageNet-12k",
    "in21k": "ImageNet-21k",
    "in22k": "ImageNet-22k",
    "inw21k": "ImageNet-21k winter",
}
"""What timm's weight tags call the ImageNet editions."""

_OBJECTIVES = {
    "fcmae": "masked autoencoding (FCMAE)",
    "mae": "masked autoencoding (MAE)",
    "mim": "masked image modelling",
    "ijepa": "self-supervised (I-JEPA)",
    "dino": "self-supervised (DINO)",
    "lvd142m": "self-supervised (DINOv2, LVD-142M)",
    "lvd1689m": "self-supervised (DINOv3, LVD-1689M)",
    "seer": "self-supervised (SEER)",
    "sa1b": "segmentation (SA-1B)",
    "openai": "image-text contrastive (CLIP, WIT-400M)",
    "laion2b": "image-text contrastive (CLIP, LAION-2B)",
    "laion400m": "image-text contrastive (CLIP, LAION-400M)",
    "laiona": "image-text contrastive (CLIP, LAION-A)",
    "datacomp1b": "image-text contrastive (CLIP, DataComp-1B)",
    "datacompxl": "image-text contrastive (CLIP, DataComp-XL)",
    "dfn2b": "image-text contrastive (CLIP, DFN-2B)",
    "dfn5b": "image-text contrastive (CLIP, DFN-5B)",
    "metaclip": "image-text contrastive (MetaCLIP)",
    "merged2b": "image-text contrastive (EVA-CLIP, Merged-2B)",
    "webli": "image-text sigmoid (SigLIP, WebLI)",
    "yfcc15m": "image-text contrastive (CLIP, YFCC-15M)",
    "cc12m": "image-text contrastive (CLIP, CC-12M)",
    "jft": "ImageNet-1k and unlabelled JFT-300M (noisy student)",
    "yfcc100m": "semi-supervised (YFCC-100M)",
    "ig1b": "weakly supervised (Instagram-1B)",
    "swag": "weakly supervised (SWAG)",
    "m38m": "masked image modelling (Merged-38M)",
    "m30m": "masked image modelling (Merged-30M)",
}
"""What the words of timm's weight tags say of the objective and the images."""


_SELF_SUPERVISED = {"fcmae", "mae", "mim", "ijepa", "dino", "seer"}


class TimmZoo:
    """All of timm's image classification architectures and their pretrained weights."""

    def list_models(self) -> Sequence[str]:
        import timm

        names = {*timm.list_models(), *timm.list_models(pretrained=True)}
        return sorted(names - {"dery_assembly"})  # which dery itself may have registered

    def card(self, model: str) -> ModelCard:
        cfg = _config(model)
        return ModelCard(
            input=InputSpec(
                image_size=(cfg.input_size[1], cfg.input_size[2]),
                mean=tuple(cfg.mean),
                std=tuple(cfg.std),
                interpolation=cfg.interpolation if cfg.interpolation != "random" else "bilinear",
                in_chans=cfg.input_size[0],
            ),
            license=_SPDX.get(cfg.license or "", cfg.license or "unknown"),
            task=_task(cfg.tag or "", cfg.num_classes),
            source=_source(cfg),
        )

    def build(
        self, model: str, *, pretrained: bool, image_size: tuple[int, int] | None = None
    ) -> nn.Module:
        import timm

        cfg = _config(model)
        options: dict[str, Any] = {}
        if image_size is not None and tuple(image_size) != tuple(cfg.input_size[1:]):
            options = _size_options(model, (image_size[0], image_size[1]), cfg)
        if not pretrained:
            return timm.create_model(model, pretrained=False, **options).eval()
        if not cfg.has_weights:
            raise OSError(f"timm has no pretrained weights for {model}")
        try:
            with _cache_alone_without_network():
                built: nn.Module = timm.create_model(model, pretrained=True, **options)
        except Exception as error:
            if not _from_network(error):
                raise
            raise OSError(_unreachable(model, error)) from error
        return built.eval()

    def convert_weights(self, built: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An architecture's older or original checkpoint, as timm converts it."""
        module = sys.modules[type(built).__module__]
        convert = getattr(module, "checkpoint_filter_fn", None)
        if convert is None:
            return state
        converted: dict[str, Tensor] = convert(state, built)
        return converted


def _config(model: str) -> Any:
    from timm.models import get_pretrained_cfg, is_model
    from timm.models._pretrained import PretrainedCfg

    try:
        cfg = get_pretrained_cfg(model)
    except RuntimeError as error:
        raise KeyError(model) from error
    if cfg is None:
        if not is_model(model):
            raise KeyError(model)
        cfg = PretrainedCfg(architecture=model)
    return cfg


def _task(tag: str, num_classes: int) -> str:
    """Pretraining task in words, as far as timm's weight tag says it."""
    before: list[str] = []
    after: list[str] = []
    words = tag.split("_")
    tuned = words.index("ft") if "ft" in words else len(words)
    for position, word in enumerate(words):
        if word in _IMAGE_SETS:
            (after if position > tuned else before).append(_IMAGE_SETS[word])
        elif word in _OBJECTIVES:
            before.insert(0, _OBJECTIVES[word])
    if before and before[-1] in _IMAGE_SETS.values():
        supervised = not any(word in _SELF_SUPERVISED for word in words)
        before[-1] += " classification" if supervised else " images"
    if after:
        before.append(f"fine-tuned on {', then '.join(after)} classification")
    if not before and num_classes == 1000:
        return "ImageNet-1k classification"
    return ", ".join(before) or "unknown"


def _source(cfg: Any) -> str:
    paper = (cfg.paper_ids,) if isinstance(cfg.paper_ids, str) else tuple(cfg.paper_ids or ())
    where = f"hf-hub:{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url or cfg.origin_url or ""
    return " ".join(filter(None, [where, *paper])) or "unknown"


def _size_options(model: str, size: tuple[int, int], cfg: Any) -> dict[str, Any]:
    """What ``create_model`` has to be told to build ``model`` for images of ``size``.

    Raises:
        ValueError: The architecture does not take that size.
    """
    import timm
    import torch

    options: dict[str, Any] = {"img_size": size}
    with torch.device("meta"):
        try:
            twin = timm.create_model(model, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            options = {}
            twin = timm.create_model(model)
        except (AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(_refusal(model, size, cfg, None, error)) from error
        patch = _patch_size(twin)
        if patch and (size[0] % patch[0] or size[1] % patch[1]):
            raise ValueError(_refusal(model, size, cfg, twin, None))
        try:
            with torch.no_grad():
                twin.eval()(torch.empty(1, cfg.input_size[0], *size))
        except Exception as error:
            raise ValueError(_refusal(model, size, cfg, twin, error)) from error
    return options


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(patch, int):
        return (patch, patch)
    return tuple(patch) if isinstance(patch, (tuple, list)) and len(patch) == 2 else None


def _refusal(
    model: str, size: tuple[int, int], cfg: Any, twin: nn.Module | None, error: Exception | None
) -> str:
    bounds = []
    patch = _patch_size(twin) if twin is not None else None
    if patch and (size[0] % patch[0] or size[1] % patch[1]):
        bounds.append(f"a multiple of the patch size {patch[0]}")
    windows = {m.window_size for m in twin.modules() if _has_window(m)} if twin is not None else ()
    if windows:
        sizes = ", ".join(
            sorted({str(w[0] if isinstance(w, (tuple, list)) else w) for w in windows})
        )
        bounds.append(f"grids that divide into windows of {sizes}")
    if cfg.fixed_input_size:
        bounds.append(f"position embeddings made for {cfg.input_size[1]}x{cfg.input_size[2]}")
    reason = str(error).strip().splitlines()[0] if error is not None and str(error).strip() else ""
    wanted = f"it wants {' and '.join(bounds)}" if bounds else ""
    text = "; ".join(filter(None, [wanted, reason])) or "too small or too uneven"
    return f"{model} does not take {size[0]}x{size[1]} images: {text}"


def _has_window(module: Any) -> bool:
    window = inspect.getattr_static(module, "window_size", None)
    return isinstance(window, (int, tuple)) and bool(window)


@contextlib.contextmanager
def _cache_alone_without_network() -> Iterator[None]:
    """Where the hub's name does not resolve, keep its client from retrying for a minute."""
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    before = constants.HF_HUB_OFFLINE
    if not urllib.request.getproxies():  # behind a proxy names need not resolve here
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _from_network(error: Exception) -> bool:
    """Whether a download failed, however the client library calls it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(
        names & {"HTTPError", "TransportError", "HfHubHTTPError", "OfflineModeIsEnabled"}
    )


def _unreachable(model: str, error: Exception) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return f"the weights of {model} are not in the local cache and HF_HUB_OFFLINE is set"
    return f"the weights of {model} could not be fetched: {type(error).__name__}, no network?"
