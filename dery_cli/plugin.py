"""The plugins' door: what a model zoo plugin and a data plugin offer, and how they are found.

A plugin is an object registered under an entry-point group; the entry point's name is the word
before the slash (or colon) in a spec. The built-ins (``dery_timm``, ``dery_torchvision``,
``dery_demo``) enter by this same door.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from dery_cli.errors import DeryError, UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from dery_cli.core.proxies import ProxyInputs
    from dery_cli.types import ModelCard

PLUGIN_API_VERSION = 1
"""Version of both protocols below; it grows when a method changes its meaning."""


@runtime_checkable
class ZooPlugin(Protocol):
    """Models by name. Entry-point group ``dery.zoo``.

    Optionally a plugin also has ``nodes(model: str) -> Sequence[str] | None``: the module names
    whose outputs are the nodes, for models that cannot be traced.
    """

    def list_models(self) -> Sequence[str]:
        """Names that ``build`` accepts, without the plugin's own prefix."""
        ...

    def card(self, model: str) -> ModelCard:
        """Input, licence, task and source of ``model``; builds nothing, fetches nothing.

        Raises:
            KeyError: ``model`` is unknown.
        """
        ...

    def build(
        self, model: str, *, pretrained: bool, image_size: tuple[int, int] | None = None
    ) -> nn.Module:
        """The model, classifier included, in eval mode, on the current default device.

        With ``pretrained`` its weights are loaded, fetched where they are not at hand (and only
        then may the network be used). Without, the call must work under ``torch.device("meta")``.

        Raises:
            KeyError: ``model`` is unknown.
            ValueError: ``image_size`` does not suit the architecture.
            OSError: The weights could not be fetched or read.
        """
        ...


@runtime_checkable
class ImageSplit(Protocol):
    """One split of a data set: images in a fixed order, decoded one at a time."""

    @property
    def labels(self) -> Sequence[int] | None:
        """One class index an image, or None where the data have no labels."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Image ``index``, undecoded until now, in whatever mode it is stored."""
        ...


@runtime_checkable
class DataPlugin(Protocol):
    """Data sets by name. Entry-point group ``dery.data``; spec ``NAME`` or ``NAME:ARGUMENT``."""

    def classes(self, argument: str) -> Sequence[str] | None:
        """Class names in label order, or None for unlabelled data."""
        ...

    def split(self, argument: str, name: str) -> ImageSplit | None:
        """The split ``train`` or ``test``, or None where there is no such split.

        Raises:
            KeyError: ``argument`` is unknown.
            OSError: The data are not there or cannot be read.
        """
        ...


@runtime_checkable
class Proxy(Protocol):
    """A training-free score of a network; larger is better. Entry-point group ``dery.proxies``."""

    def __call__(self, inputs: ProxyInputs) -> float:
        """Score ``inputs.network``.

        Raises:
            ValueError: It needs labels, and there are none.
        """
        ...


ZOO_GROUP = "dery.zoo"
DATA_GROUP = "dery.data"
PROXY_GROUP = "dery.proxies"

_Plugin = TypeVar("_Plugin")


@dataclasses.dataclass(frozen=True)
class PluginInfo:
    """One registered entry point, and what is wrong with it, if anything is."""

    group: str
    name: str
    target: str
    distribution: str
    version: str
    error: str | None


def _entry_points(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        same = found.setdefault(point.name, [])
        if all(point.value != other.value for other in same):
            same.append(point)
    return dict(sorted(found.items()))


def plugin_names(group: str) -> list[str]:
    """Names registered under ``group``; loads nothing."""
    return list(_entry_points(group))


def find_plugin(group: str, name: str, protocol: type[_Plugin], *, what: str = "plugin") -> _Plugin:
    """Load the plugin ``name`` of ``group``.

    Raises:
        UsageError: No such plugin; the message lists the close ones.
        DeryError: Two distributions register the name, or the plugin cannot be loaded or does not
            keep its protocol.
    """
    points = _entry_points(group)
    if name not in points:
        close = difflib.get_close_matches(name, points, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(points)}"
        raise UsageError(f"no such {what}: {name}", hint)
    if len(points[name]) > 1:
        owners = ", ".join(sorted(_owner(point) for point in points[name]))
        raise DeryError(
            f"two plugins of the group {group} are named '{name}': {owners}",
            "uninstall one of them",
        )
    try:
        return _load(points[name][0], protocol)
    except PluginError as error:
        raise DeryError(str(error), f"update or uninstall {_owner(points[name][0])}") from error


def find_proxy(name: str) -> Proxy:
    """Load a training-free proxy by name; see ``core.proxies``.

    Raises:
        UsageError: No such proxy.
        DeryError: It cannot be loaded.
    """
    return find_plugin(PROXY_GROUP, name, Proxy, what="proxy")


class PluginError(Exception):
    """A plugin that cannot be used, in one line."""


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _load(point: EntryPoint, protocol: type[_Plugin]) -> _Plugin:
    try:
        plugin = point.load()
    except Exception as error:  # whatever a third party's import does, dery goes on without it
        raise PluginError(
            f"plugin '{point.name}' ({point.value}) fails to load: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(plugin, protocol):
        wanted = sorted(n for n in vars(protocol) if not n.startswith("_"))
        missing = [n for n in wanted if not hasattr(plugin, n)]
        raise PluginError(f"plugin '{point.name}' ({point.value}) lacks {', '.join(missing)}")
    return plugin


def describe_plugins() -> list[PluginInfo]:
    """Every registered plugin; each is loaded once, and a broken one says why."""
    infos: list[PluginInfo] = []
    protocols: dict[str, type] = {
        ZOO_GROUP: ZooPlugin,
        DATA_GROUP: DataPlugin,
        PROXY_GROUP: Proxy,
    }
    for group, protocol in protocols.items():
        for name, points in _entry_points(group).items():
            for point in points:
                error = None if len(points) == 1 else f"the name '{name}' is taken twice"
                if error is None:
                    try:
                        _load(point, protocol)
                    except PluginError as failure:
                        error = str(failure)
                version = point.dist.version if point.dist is not None else "unknown"
                infos.append(PluginInfo(group, name, point.value, _owner(point), version, error))
    return infos
