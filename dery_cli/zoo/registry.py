"""The model zoo of a workspace: specs, donors and their weights.

``zoo.json`` holds what every later stage needs to know of a donor without building it. Models are
built through the plugins of the entry-point group ``dery.zoo`` alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dery_cli.errors import DeryError, StaleError, UsageError
from dery_cli.io.artifacts import Workspace, read_record, write_record
from dery_cli.io.look import AbsentError
from dery_cli.io.records import Artifact
from dery_cli.sizes import check_name
from dery_cli.types import Donor, InputSpec, ModelCard
from dery_cli.zoo.plugin import (
    ZOO_GROUP,
    ZooPlugin,
    find_plugin,
    guarded,
    list_models,
    plugin_names,
)
from dery_cli.zoo.schemas import ZOO

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dery_cli.core.dissection.dissect import Dissection

UNKNOWN = "unknown"
"""Licence, task and source of weights that nobody vouches for."""
ADD_HINT = "dery zoo add SPEC (dery zoo plugins lists what can be added)"


@dataclasses.dataclass(frozen=True)
class Spec:
    """A parsed ``plugin/name[.tag]``."""

    plugin: str
    model: str

    def __str__(self) -> str:
        return f"{self.plugin}/{self.model}"


def parse_spec(text: str) -> Spec:
    """Split a model spec.

    Raises:
        UsageError: It has no slash, or an empty part.
    """
    plugin, slash, model = text.partition("/")
    if not (plugin and slash and model):
        names = ", ".join(plugin_names(ZOO_GROUP))
        raise UsageError(
            f"'{text}' is not a model spec", f"write PLUGIN/NAME[.TAG]; plugins are {names}"
        )
    return Spec(plugin, model)


def default_name(spec: Spec) -> str:
    """A donor's name where none is given: its spec with ``/`` written ``__``, lower case."""
    return str(spec).replace("/", "__").lower()


def resolve(spec: Spec) -> tuple[ZooPlugin, ModelCard]:
    """The plugin and the model's card; builds nothing.

    Raises:
        UsageError: No such plugin or model; close names are listed.
        DeryError: The plugin is broken.
    """
    plugin = find_plugin(ZOO_GROUP, spec.plugin, ZooPlugin, what="zoo plugin")
    with guarded(spec.plugin, f"card({spec.model!r})"):
        try:
            card = plugin.card(spec.model)
        except KeyError:
            names = list_models(spec.plugin, plugin)
            if spec.model in names:
                raise
            close = difflib.get_close_matches(spec.model, names, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(f'{spec.plugin}/{name}' for name in close)}?"
                if close
                else f"dery zoo plugins --models {spec.plugin} lists its {len(names)} models"
            )
            raise UsageError(
                f"the plugin '{spec.plugin}' has no model '{spec.model}'", hint
            ) from None
        if not isinstance(card, ModelCard):
            raise TypeError(f"expected a ModelCard, got {type(card).__name__}")
        check_card(card)
    return plugin, card


INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_IN_CHANS = (1, 3)
"""Channels that images have as dery reads them."""


def check_card(card: ModelCard) -> None:
    """Whether all that later stages need is in a card, and of its type.

    Raises:
        ValueError: It is not.
    """
    for key in ("license", "task", "source"):
        if not isinstance(getattr(card, key), str):
            raise ValueError(f"the card's {key} is {getattr(card, key)!r}, not a text")
    metrics = card.metrics if isinstance(card.metrics, Mapping) else {"": None}
    if not all(isinstance(key, str) and _is_number(value) for key, value in metrics.items()):
        raise ValueError(f"the card's metrics are {card.metrics!r}, not numbers by name")
    _check_input(card.input)


def _check_input(spec: InputSpec) -> None:
    if not isinstance(spec, InputSpec):
        raise ValueError(f"the card's input is a {type(spec).__name__}, not an InputSpec")
    size, chans = spec.image_size, spec.in_chans
    whole = isinstance(size, tuple) and all(type(side) is int and side > 0 for side in size)
    if not whole or len(size) != 2:
        raise ValueError(f"the card's image_size is {size!r}, not (height, width) in pixels")
    if type(chans) is not int or chans not in _IN_CHANS:
        raise ValueError(f"the card's in_chans is {chans!r}; images have 3 channels (RGB) or 1")
    for key in ("mean", "std"):
        values = getattr(spec, key)
        numbers = isinstance(values, tuple) and all(map(_is_number, values))
        if not numbers or len(values) != chans or (key == "std" and min(values) <= 0):
            kind = "mean" if key == "mean" else "positive std"
            raise ValueError(
                f"the card needs a {kind} for each of {chans} channels, not {values!r}"
            )
    if spec.interpolation not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        raise ValueError(f"the card's interpolation is {spec.interpolation!r}; known are {known}")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def plugin_sha256(spec: Spec) -> str | None:
    """The hash of the file the plugin reads a model's weights from, where it tells it."""
    plugin, _ = resolve(spec)
    offered = getattr(plugin, "weights_sha256", None)
    if offered is None:
        return None
    with guarded(spec.plugin, f"weights_sha256({spec.model!r})"):
        found: str | None = offered(spec.model)
        return found


def build_model(
    spec: Spec, plugin: ZooPlugin, *, pretrained: bool, image_size: tuple[int, int] | None
) -> nn.Module:
    """Build a model through its plugin, in eval mode.

    Raises:
        UsageError: The image size does not suit it.
        DeryError: Its weights cannot be had, or the plugin is broken.
    """
    from torch import nn

    with guarded(spec.plugin, f"build({spec.model!r})"):
        try:
            model = plugin.build(spec.model, pretrained=pretrained, image_size=image_size)
        except ValueError as error:
            if image_size is None:
                raise
            raise UsageError(f"{spec}: {error}") from error
        except OSError as error:
            if not pretrained:
                raise
            raise DeryError(
                f"cannot get the weights of {spec}: {error}",
                "give a local checkpoint with --weights FILE, or random weights with "
                "--no-pretrained",
            ) from error
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
        return model.float().eval()  # half and double precision ones too


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Hash over the sorted names, types, shapes and bytes of a state dict."""
    import torch

    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def dissect_donor(
    model: nn.Module,
    card: ModelCard,
    spec: Spec,
    plugin: ZooPlugin,
    *,
    warn: Callable[[str], None] | None = None,
) -> Dissection:
    """Dissect a built model, with the plugin's own nodes where it names some.

    A model with no place to cut, or that cannot be traced, is taken as one single unit; ``warn`` is
    told why.
    """
    import torch

    from dery_cli.core.dissection.dissect import DissectError, dissect

    nodes = None
    explicit = getattr(plugin, "nodes", None)
    if explicit is not None:
        with guarded(spec.plugin, f"nodes({spec.model!r})"):
            nodes = explicit(spec.model)
    parameter = next(model.parameters(), None)
    example = torch.zeros(
        1,
        card.input.in_chans,
        *card.input.image_size,
        device=None if parameter is None else parameter.device,
    )
    try:
        return dissect(model, example, nodes=nodes)
    except DissectError as reason:
        try:
            dissection = dissect(model, example, whole=True)
        except DissectError:
            from dery_cli.core.dissection.whole import dissect_whole

            dissection = dissect_whole(model, example)
        if warn is not None:
            warn(f"{spec} serves as a whole model only: {reason.message}")
        return dissection


def prepare_donor(
    text: str,
    *,
    name: str | None = None,
    image_size: tuple[int, int] | None = None,
    pretrained: bool = True,
    weights: Path | None = None,
    weights_key: str | None = None,
    allow_partial: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
    warn: Callable[[str], None] | None = None,
) -> tuple[Donor, Dissection]:
    """Build, dissect, load and hash one model: what ``zoo add`` registers.

    A model with no place to cut becomes a donor of one single unit.

    Args:
        text: Model spec.
        name: Name in the zoo; from the spec where None.
        image_size: (height, width) of the input in pixels; the model's own where None.
        pretrained: Load the plugin's weights; otherwise they are random, by ``seed``.
        weights: Local checkpoint to load instead.
        weights_key: Where in it the state dict is, where there are several.
        allow_partial: Load ``weights`` though keys are missing or unexpected.
        device: Where the dissected model goes.
        seed: For random weights.
        warn: Told, in one line each, what the user should know of this donor.

    Raises:
        UsageError: Unknown plugin or model, bad name or size, weights of another architecture.
        DeryError: The weights cannot be had or read, or the model does not run.
    """
    from dery_cli.core.numerics import seeded

    spec = parse_spec(text)
    name = check_name(name or default_name(spec), "donor")
    plugin, card = resolve(spec)
    size = None if image_size == card.input.image_size else image_size
    if size is not None:
        card = dataclasses.replace(card, input=dataclasses.replace(card.input, image_size=size))
    checkpoint = None
    if weights is not None:
        from dery_cli.zoo.checkpoints import read_checkpoint

        pretrained, checkpoint = False, read_checkpoint(weights, weights_key)
    if not pretrained:  # what the plugin says is said of its own weights
        card = dataclasses.replace(card, license=UNKNOWN, task=UNKNOWN, source=UNKNOWN, metrics={})
    with seeded(seed):
        model = build_model(spec, plugin, pretrained=pretrained, image_size=size)
    dissection = dissect_donor(model, card, spec, plugin, warn=warn)
    if weights is not None and checkpoint is not None:
        from dery_cli.zoo.state_dicts import load_weights

        offered = getattr(plugin, "convert_weights", None)
        notes = load_weights(
            model,
            checkpoint.tensors,
            weights.name,
            classifier=dissection.classifier,
            allow_partial=allow_partial,
            image_size=card.input.image_size,
            convert=None if offered is None else functools.partial(offered, model),
        )
        if warn is not None:
            for note in filter(None, (checkpoint.choice, *notes)):
                warn(f"{name}: {note}")
    weights_hash = weights_sha256(model.state_dict())
    model.to(device)
    donor = Donor(
        name=name,
        spec=str(spec),
        weights_sha256=weights_hash,
        weights=None if weights is None else weights.name,
        pretrained=pretrained,
        card=card,
        anatomy=dissection.anatomy,
    )
    return donor, dissection


def load_donor(
    donor: Donor,
    workspace: Workspace,
    *,
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> Dissection:
    """Build a registered donor again, with its weights, and dissect it.

    Args:
        donor: From the zoo.
        workspace: Where a copy of its local checkpoint is kept, if it has one.
        device: Where the model goes.
        verify: Check that weights and nodes are those that were registered.

    Raises:
        DeryError: Its weights or its nodes are no longer what was registered.
    """
    again, dissection = prepare_donor(
        donor.spec,
        name=donor.name,
        image_size=donor.input.image_size,
        pretrained=donor.pretrained,
        weights=None if donor.weights is None else workspace.root / donor.weights,
        allow_partial=True,  # decided when it was added; the hash tells whether all is the same
        device=device,
    )
    hint = f"dery zoo remove {donor.name}, then dery zoo add {donor.spec}"
    if verify and again.weights_sha256 != donor.weights_sha256:
        raise DeryError(
            f"the weights of {donor.name} changed: sha256 {again.weights_sha256[:12]}, "
            f"registered {donor.weights_sha256[:12]}",
            hint,
        )
    if verify and again.anatomy.to_json() != donor.anatomy.to_json():
        raise DeryError(f"{donor.name} no longer dissects into the nodes it was added with", hint)
    return dissection


class Zoo:
    """The registered donors of a workspace, in the order of their names."""

    def __init__(self, donors: Iterable[Donor]) -> None:
        self.donors = {donor.name: donor for donor in sorted(donors, key=lambda d: d.name)}

    def __len__(self) -> int:
        return len(self.donors)

    def __getitem__(self, name: str) -> Donor:
        if name not in self.donors:
            close = difflib.get_close_matches(name, self.donors, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(close)}?" if close else "dery zoo list"
            raise UsageError(f"no donor named '{name}' in the zoo", hint)
        return self.donors[name]

    def names(self) -> list[str]:
        return list(self.donors)

    def check_free(self, name: str, spec: str) -> None:
        """Whether ``name`` may become a donor of ``spec``.

        Raises:
            UsageError: The name is that of another model.
        """
        present = self.donors.get(name)
        if present is not None and present.spec != spec:
            raise self._taken(present)

    @staticmethod
    def _taken(present: Donor) -> UsageError:
        return UsageError(
            f"the zoo has a donor named '{present.name}' already, of {present.spec}",
            f"choose a name with --as NAME, or dery zoo remove {present.name} first",
        )

    def with_donor(self, donor: Donor) -> Zoo:
        """A zoo with one more donor.

        Raises:
            UsageError: The name is taken by another model, or the same with other weights.
        """
        present = self.donors.get(donor.name)
        if present is not None and present != donor:
            raise self._taken(present)
        return Zoo([*self.donors.values(), donor])

    def without(self, name: str) -> Zoo:
        """The zoo less one donor."""
        gone = self[name]
        return Zoo(donor for donor in self.donors.values() if donor is not gone)


def read_zoo(workspace: Workspace) -> Zoo:
    """The workspace's zoo; an empty one where none was written yet.

    Raises:
        DeryError: Its record is damaged, of another version, or was edited.
    """
    try:
        record = read_record(workspace.zoo, ZOO, missing="there is no zoo", hint=ADD_HINT)
    except AbsentError:
        return Zoo([])
    return Zoo(Donor.from_json(entry) for entry in record.data["donors"])


def require_zoo(workspace: Workspace) -> Zoo:
    """The workspace's zoo.

    Raises:
        StaleError: It is empty.
    """
    zoo = read_zoo(workspace)
    if len(zoo) == 0:
        raise StaleError(f"the zoo in {workspace.root} is empty", ADD_HINT)
    return zoo


def write_zoo(workspace: Workspace, zoo: Zoo) -> None:
    """Replace ``zoo.json``."""
    data = {"donors": [donor.to_json() for donor in zoo.donors.values()]}
    write_record(workspace.zoo, Artifact(kind=ZOO, data=data))
