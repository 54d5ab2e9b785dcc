"""Reading a user's checkpoint: safetensors, or ``.pt``/``.pth`` through ``weights_only=True``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dery_cli.errors import DeryError, UsageError

_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema", "net", "module")
_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "net.")
_SHOWN = 4


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, wrappers and common prefixes removed; runs no code.

    Raises:
        UsageError: No such file, or one that is no checkpoint.
        DeryError: The file is damaged, or would need unpickling to be read.
    """
    if not path.is_file():
        raise UsageError(f"no such weights file: {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise DeryError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its zip reader or unpickler met
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeryError(
            f"{path} cannot be read with weights_only=True: {reason[:200]}",
            "save it as safetensors, or torch.save(model.state_dict(), FILE)",
        ) from error
    state = _unwrap(loaded)
    if not state:
        raise UsageError(f"{path} holds no tensors", "expected is a state dict")
    return state


def _unwrap(loaded: object) -> dict[str, Tensor]:
    while isinstance(loaded, Mapping):
        inner = next(
            (loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None
        )
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping):
        return {}
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _strip_prefix(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Drop the prefixes that hide the model's own names, as long as more names match without."""
    while True:
        matches = len(wanted & state.keys())
        best = state
        for prefix in _PREFIXES:
            if any(name.startswith(prefix) for name in state):
                stripped = {name.removeprefix(prefix): value for name, value in state.items()}
                if len(stripped) == len(state) and len(wanted & stripped.keys()) > matches:
                    best, matches = stripped, len(wanted & stripped.keys())
        if best is state:
            return state
        state = best


def load_weights(model: nn.Module, path: Path, *, allow_partial: bool = False) -> None:
    """Load a checkpoint file into ``model``.

    A checkpoint that differs in its last linear layer alone (another number of classes) is loaded
    without that layer, since no block contains it.

    Args:
        model: Freshly built; its classifier may differ.
        path: Checkpoint file.
        allow_partial: Load what fits though keys are missing or unexpected.

    Raises:
        UsageError: The checkpoint is of another architecture; the message names keys and shapes.
        DeryError: It cannot be read, or holds NaN or infinity.
    """
    own = model.state_dict()
    state = _strip_prefix(read_state_dict(path), set(own))
    missing = sorted(name for name in own if name not in state and not _is_counter(name))
    unexpected = sorted(name for name in state if name not in own)
    wrong = sorted(name for name in own if name in state and own[name].shape != state[name].shape)
    differing = [*missing, *unexpected, *wrong]
    classifier = _classifier_names(model)
    if differing and not allow_partial and not set(differing) <= classifier:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing ({_some(missing)})")
        if unexpected:
            parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
        if wrong:
            shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in wrong]
            parts.append(f"{len(wrong)} of another shape ({_some(shapes)})")
        raise UsageError(
            f"{path.name} does not match the architecture: {'; '.join(parts)}",
            "check the model's name; --allow-partial loads what fits",
            details={"missing": missing, "unexpected": unexpected, "shape": wrong},
        )
    fitting = {n: v for n, v in state.items() if n in own and n not in wrong}
    if not fitting:
        raise UsageError(f"{path.name} has no tensor that fits the architecture")
    for name, value in fitting.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DeryError(f"{path.name}: the tensor {name} holds NaN or infinity")
    model.load_state_dict(fitting, strict=False)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _classifier_names(model: nn.Module) -> set[str]:
    """Parameters of the last linear layer (or 1x1 convolution) in definition order."""
    last = ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            last = name
    return {f"{last}.weight", f"{last}.bias"}
