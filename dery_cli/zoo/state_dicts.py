"""Reading a user's checkpoint: safetensors, or ``.pt``/``.pth`` through ``weights_only=True``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dery_cli.errors import DeryError, UsageError

_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema", "net", "module", "teacher")
_PREFIXES = (
    "module.",
    "model.",
    "backbone.",
    "encoder.",
    "net.",
    "encoder_q.",  # MoCo
    "base_encoder.",  # MoCo v3
    "teacher.",  # DINO
)
_DEPTH = 3
_SHOWN = 4


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, wrappers such as ``state_dict`` removed; runs no code.

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
    for _ in range(_DEPTH):  # and not for ever: a pickle may hold itself
        wrapped = loaded if isinstance(loaded, Mapping) else {}
        loaded = next(
            (wrapped[key] for key in _WRAPPERS if isinstance(wrapped.get(key), Mapping)), loaded
        )
    if not isinstance(loaded, Mapping):
        return {}
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _strip_prefix(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Drop the prefixes that hide the model's own names, where more names match without them.

    Up to three prefixes may stand before a name (``module.encoder_q.backbone.``); of those that
    match most of ``wanted`` the shortest is taken.
    """
    best, most = state, len(wanted & state.keys())
    seen = [""]
    for _ in range(_DEPTH):
        seen = [
            before + prefix
            for before in seen
            for prefix in _PREFIXES
            if any(name.startswith(before + prefix) for name in state)
        ]
        for whole in seen:
            stripped = {name.removeprefix(whole): value for name, value in state.items()}
            matches = len(wanted & stripped.keys())
            if len(stripped) == len(state) and matches > most:
                best, most = stripped, matches
    return best


def load_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    *,
    classifier: Sequence[str] = (),
    allow_partial: bool = False,
) -> list[str]:
    """Load a checkpoint's tensors into ``model``.

    Only the classifier may differ (another number of classes, or none): no block contains it, and
    what it lacks is set to zero.

    Args:
        model: Freshly built; in case of an error it is unchanged.
        state: From ``read_state_dict``; common prefixes of the names are recognised.
        source: The file's name, for messages.
        classifier: Names of the classifier's parameters.
        allow_partial: Load what fits though keys are missing or unexpected.

    Returns:
        What was left out, in words.

    Raises:
        UsageError: The checkpoint is of another architecture; the message names keys and shapes.
        DeryError: A tensor holds no data, or NaN or infinity.
    """
    own = model.state_dict()
    state = _strip_prefix(state, set(own))
    missing = sorted(name for name in own if name not in state and not _is_counter(name))
    unexpected = sorted(name for name in state if name not in own)
    wrong = sorted(name for name in own if name in state and not _alike(own[name], state[name]))
    heads = {name.rpartition(".")[0] for name in classifier}
    differing = [*missing, *unexpected, *wrong]
    elsewhere = [name for name in differing if not _belongs(name, heads)]
    if elsewhere and not allow_partial:
        raise UsageError(
            f"{source} does not match the architecture: "
            f"{_difference(own, state, missing, unexpected, wrong)}",
            "check the model's name; --allow-partial loads what fits",
            details={"missing": missing, "unexpected": unexpected, "shape": wrong},
        )
    fitting = {n: v for n, v in state.items() if n in own and n not in wrong}
    if not any(not _belongs(name, heads) for name in fitting):
        raise UsageError(f"{source} has no tensor that fits the architecture")
    for name, value in fitting.items():
        if value.is_meta:
            raise DeryError(f"{source}: the tensor {name} holds no data")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DeryError(f"{source}: the tensor {name} holds NaN or infinity")
    model.load_state_dict(fitting, strict=False)
    with torch.no_grad():
        for name in (*missing, *wrong):
            if _belongs(name, heads):
                own[name].zero_()
    if elsewhere:
        difference = _difference(own, state, missing, unexpected, wrong)
        return [f"{source} was loaded in part, the rest is random: {difference}"]
    return [f"the classifier of {source} does not fit and is left out"] if differing else []


def _alike(own: Tensor, given: Tensor) -> bool:
    kinds = (own.is_floating_point(), given.is_floating_point())
    dense = given.layout == torch.strided and not given.is_quantized and not given.is_complex()
    return own.shape == given.shape and dense and kinds[0] == kinds[1]


def _belongs(name: str, heads: set[str]) -> bool:
    """Whether ``name`` is the classifier's, or that of a deeper classifier in its place."""
    return any(head and name.startswith(f"{head}.") for head in heads)


def _difference(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    wrong: list[str],
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if wrong:
        shapes = [f"{n} {_form(state[n])} for {_form(own[n])}" for n in wrong]
        parts.append(f"{len(wrong)} of another shape ({_some(shapes)})")
    return "; ".join(parts)


def _form(tensor: Tensor) -> str:
    plain = tensor.is_floating_point() and tensor.layout == torch.strided
    return f"{tuple(tensor.shape)}{'' if plain else f' {tensor.dtype}'.replace('torch.', '')}"


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
