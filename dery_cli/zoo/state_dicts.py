"""Loading a checkpoint's tensors into a model: prefixes, other classifiers, older forms.

What does not fit is refused, or left out where that changes nothing; all of it is told.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dery_cli.errors import DeryError, UsageError
from dery_cli.sizes import some_of
from dery_cli.zoo.checkpoints import TRIVIAL

_LATER = ("student", "encoder_k", "momentum", "decoder")
"""Prefixes that are taken where no other serves as well."""
_PREFIX_DEPTH = 5


def _strip_prefix(state: dict[str, Tensor], wanted: set[str]) -> tuple[str, dict[str, Tensor]]:
    """Drop the prefix that hides the model's own names, where more names match without it.

    Of those that match most of ``wanted`` a main model's is taken before a student's or a momentum
    encoder's, then the shortest. Names without it are kept, but for those that get in the way.
    """
    matches: collections.Counter[str] = collections.Counter({"": len(wanted & state.keys())})
    for name in state:
        parts = name.split(".")
        for depth in range(1, min(len(parts), _PREFIX_DEPTH + 1)):
            if ".".join(parts[depth:]) in wanted:
                matches[".".join(parts[:depth]) + "."] += 1

    def rank(prefix: str) -> tuple[int, bool, int]:
        later = any(word in prefix for word in _LATER)
        return (-matches[prefix], later, prefix.count("."))

    best = min(matches, key=rank)
    if not best:
        return "", state
    stripped = {n.removeprefix(best): v for n, v in state.items() if n.startswith(best)}
    return best, {n: v for n, v in state.items() if not n.startswith(best)} | stripped


_BACKBONES = ("backbone.body.", "backbone.", "body.")
"""Where torchvision's detectors and segmenters keep a classifier's layers."""
_DENSE = re.compile(
    r"backbone\.fpn\.|rpn\.|roi_heads\.|head\.(classification|regression)_head\.|"
    r"(aux_)?classifier\."
)
"""Begins the names of what such models have beside their backbone."""


def _from_dense_task(state: dict[str, Tensor], wanted: set[str]) -> tuple[str, dict[str, Tensor]]:
    """The backbone alone of a detector's or segmenter's tensors, under the names of ``wanted``.

    Torchvision keeps a whole network's layers, or those of its ``features`` without that word;
    pyramids and heads are dropped, lest they be taken for the classifier's layers.

    Returns:
        The prefix that was found and the tensors; an empty one and ``state`` where there is none.
    """
    folders = {""} | {f"{name.partition('.')[0]}." for name in wanted}
    found = {
        (prefix, folder): {
            folder + name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix) and folder + name.removeprefix(prefix) in wanted
        }
        for prefix in _BACKBONES
        for folder in sorted(folders)
    }
    best = max(found, key=lambda key: len(found[key]))
    marked = any(map(_DENSE.match, state))
    if not marked or len(found[best]) <= len(wanted & state.keys()):
        return "", state
    return best[0], found[best]


@dataclasses.dataclass(frozen=True)
class _Difference:
    """How a state dict differs from a model's own, classifiers left aside in ``elsewhere``.

    Args:
        missing: Names that the model needs.
        unexpected: Names that it has no place for.
        wrong: Names whose tensors are of another shape or kind.
        elsewhere: Those of all these that are not the classifier's.
    """

    missing: list[str]
    unexpected: list[str]
    wrong: list[str]
    elsewhere: list[str]

    def blocking(self, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
        """Whether the tensors are of another architecture."""
        tops = {name.partition(".")[0] for name in own}
        owners = {name.rpartition(".")[0] for name in own}
        return any(
            name in own or not _needless(name, state[name], tops, owners) for name in self.elsewhere
        )


_BUFFERS = re.compile(r"attn_mask|relative_(position_index|coords_table)|mean|std|num_updates")


def _needless(name: str, value: Tensor, tops: set[str], owners: set[str]) -> bool:
    """Whether a tensor that the model has no place for may be left out: it changes nothing.

    It stands apart from all that the model has (a loss, a decoder, a mask token), or is a table
    that newer versions of a layer compute.
    """
    owner, _, leaf = name.rpartition(".")
    if name.partition(".")[0] not in tops:
        return True
    table = not value.is_floating_point() or _BUFFERS.fullmatch(leaf) is not None
    return table and owner in owners


def _compare(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], heads: set[str]
) -> _Difference:
    missing = sorted(name for name in own if name not in state and not _is_counter(name))
    unexpected = sorted(name for name in state if name not in own)
    wrong = sorted(name for name in own if name in state and not _alike(own[name], state[name]))
    elsewhere = [n for n in (*missing, *unexpected, *wrong) if not _belongs(n, heads)]
    return _Difference(missing, unexpected, wrong, elsewhere)


Convert = Callable[[dict[str, Tensor]], Mapping[str, Any]]


def load_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    *,
    classifier: Sequence[str] = (),
    allow_partial: bool = False,
    image_size: tuple[int, int] | None = None,
    convert: Convert | None = None,
) -> list[str]:
    """Load a checkpoint's tensors into ``model``.

    Only the classifier may differ (another number of classes, or none): no block contains it, and
    what it lacks is set to zero. Tensors that the architecture has no place for, and that would
    change nothing, are left out.

    Args:
        model: Freshly built; in case of an error it is unchanged.
        state: From ``read_checkpoint``; common prefixes of the names are recognised.
        source: The file's name, for messages.
        classifier: Names of the classifier's parameters.
        allow_partial: Load what fits though keys are missing or unexpected.
        image_size: (height, width) the model is built for, for a hint.
        convert: Renames older checkpoints' tensors, where they do not fit as they are.

    Returns:
        What was chosen, converted and left out, in words.

    Raises:
        UsageError: The checkpoint is of another architecture; the message names keys and shapes.
        DeryError: A tensor holds no data, or NaN or infinity.
    """
    own = model.state_dict()
    whole = state
    dense, state = _from_dense_task(state, set(own))
    prefix, state = _strip_prefix(state, set(own))
    notes = []
    if dense:
        left = sorted(name for name in whole if not name.startswith(dense))
        notes.append(
            f"{source} has a backbone inside: its tensors, whose names begin with '{dense}', are "
            f"loaded, {len(left)} others (pyramid, heads) are not: {some_of(left)}"
        )
    if not TRIVIAL.issuperset(filter(None, prefix.split("."))):
        notes.append(f"the tensors of {source} whose names begin with '{prefix}' are loaded")
    heads = {name.rpartition(".")[0] for name in classifier}
    differ = _compare(own, state, heads)
    if differ.blocking(own, state):
        size = None if image_size is None else _fitting_size(own, state, differ, image_size)
        if size is not None and not allow_partial:
            raise _refused(source, own, state, differ, size)
        converted = None if convert is None else _converted(convert, state)
        if converted is not None:
            again = _compare(own, converted, heads)
            if not again.blocking(own, converted):
                state, differ = converted, again
                notes.append(f"{source} is of an older form and was converted by its plugin")
    if differ.blocking(own, state) and not allow_partial:
        raise _refused(source, own, state, differ)
    fitting = {n: v for n, v in state.items() if n in own and n not in differ.wrong}
    if not any(not _belongs(name, heads) for name in fitting):
        raise UsageError(f"{source} has no tensor that fits the architecture")
    _check_numbers(source, fitting)
    model.load_state_dict(fitting, strict=False)
    with torch.no_grad():
        for name in (*differ.missing, *differ.wrong):
            if _belongs(name, heads):
                own[name].zero_()
    return notes + _left_out(source, own, state, differ)


def _left_out(
    source: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor], differ: _Difference
) -> list[str]:
    """What of a checkpoint was not loaded, and what it did not give, in words."""
    if any(name in own for name in differ.elsewhere):
        difference = _in_words(own, state, differ)
        return [f"{source} was loaded in part, the rest is random: {difference}"]
    notes = []
    if differ.elsewhere:
        count, some = len(differ.elsewhere), some_of(differ.elsewhere)
        what = f"{count} tensor{'s' * (count > 1)} that the architecture has no place for"
        notes.append(f"{what} {'are' if count > 1 else 'is'} left out of {source}: {some}")
    if len(differ.missing + differ.unexpected + differ.wrong) > len(differ.elsewhere):
        notes.append(f"the classifier of {source} does not fit and is left out")
    return notes


def _refused(
    source: str,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    differ: _Difference,
    size: int | None = None,
) -> UsageError:
    hint = "check the model's name; --allow-partial loads what fits"
    if size is not None:
        hint = f"it is for images of {size} pixels: --image-size {size}"
    return UsageError(
        f"{source} does not match the architecture: {_in_words(own, state, differ)}",
        hint,
        details={
            "missing": differ.missing,
            "unexpected": differ.unexpected,
            "shape": differ.wrong,
        },
    )


def _converted(convert: Convert, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    try:
        found = convert(dict(state))
        return {str(n): value for n, value in found.items() if isinstance(value, Tensor)}
    except Exception:  # it was written for other checkpoints than this one
        return None


def _fitting_size(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    differ: _Difference,
    image_size: tuple[int, int],
) -> int | None:
    """The image side that explains why position embeddings, and nothing else, have other shapes."""
    if any(name not in differ.wrong for name in differ.elsewhere):
        return None
    height, width = image_size
    shapes = [(tuple(own[name].shape), tuple(state[name].shape)) for name in differ.elsewhere]
    sides = {_side(mine, theirs, height) for mine, theirs in shapes}
    return sides.pop() if len(sides) == 1 and height == width else None


def _side(mine: tuple[int, ...], theirs: tuple[int, ...], side: int) -> int | None:
    """``side`` times how much longer the grid of the other position embedding is."""
    if len(mine) != len(theirs) or len(mine) not in (2, 3, 4):
        return None
    differing = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
    if len(mine) == 4 and len(differing) == 2:  # a map
        ratios = {(theirs[i] * side / mine[i]) for i in differing}
        ratio = ratios.pop()
        return round(ratio) if not ratios and ratio == round(ratio) else None
    if len(differing) != 1:
        return None
    length, other = mine[differing[0]], theirs[differing[0]]
    for prefix in (0, 1, 2, 4, 5, 8, 9):  # class and register tokens
        grid, theirs_grid = (math.isqrt(max(0, n - prefix)) for n in (length, other))
        square = grid**2 + prefix == length and theirs_grid**2 + prefix == other
        if square and grid and theirs_grid and side * theirs_grid % grid == 0:
            return side * theirs_grid // grid
    return None


def _check_numbers(source: str, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.is_meta:
            raise DeryError(f"{source}: the tensor {name} holds no data")
        if not value.is_floating_point():
            continue
        try:
            whole = bool(torch.isfinite(value.float() if value.itemsize == 1 else value).all())
        except (NotImplementedError, RuntimeError) as error:
            raise DeryError(
                f"{source}: the tensor {name} is of type {_type(value)}, which is not read",
                "save it in half precision",
            ) from error
        if not whole:
            raise DeryError(f"{source}: the tensor {name} holds NaN or infinity")


def _alike(own: Tensor, given: Tensor) -> bool:
    kinds = (own.is_floating_point(), given.is_floating_point())
    dense = given.layout == torch.strided and not given.is_quantized and not given.is_complex()
    return own.shape == given.shape and dense and kinds[0] == kinds[1]


def _belongs(name: str, heads: set[str]) -> bool:
    """Whether ``name`` is the classifier's, or that of a deeper classifier in its place."""
    return any(head and name.startswith(f"{head}.") for head in heads)


def _in_words(own: Mapping[str, Tensor], state: Mapping[str, Tensor], differ: _Difference) -> str:
    parts = []
    if differ.missing:
        parts.append(f"{len(differ.missing)} missing ({some_of(differ.missing)})")
    if differ.unexpected:
        parts.append(f"{len(differ.unexpected)} unexpected ({some_of(differ.unexpected)})")
    if differ.wrong:
        shapes = [f"{n} {_form(state[n])} for {_form(own[n])}" for n in differ.wrong]
        parts.append(f"{len(differ.wrong)} of another shape ({some_of(shapes)})")
    return "; ".join(parts)


def _form(tensor: Tensor) -> str:
    plain = tensor.is_floating_point() and tensor.layout == torch.strided
    return f"{tuple(tensor.shape)}{'' if plain else f' {_type(tensor)}'}"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).replace("torch.", "")


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
