"""The plugins' door: what a model zoo plugin and a data plugin offer, and how they are found.

A plugin is an object registered under an entry-point group; the entry point's name is the word
before the slash (or colon) in a spec. The built-ins (``dery_timm``, ``dery_torchvision``,
``dery_lite``, ``dery_demo``) enter by this same door. ``dery_cli.testing`` proves that a zoo
plugin keeps its contract.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

from dery_cli.errors import DeryError, UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from PIL import Image
    from torch import nn

    from dery_cli.core.similarity.metric import Metric
    from dery_cli.core.training_free.inputs import ProxyInputs
    from dery_cli.types import ModelCard

PLUGIN_API_VERSION = 1
"""Version of the protocols below; it grows when a method changes its meaning.

A plugin may have an attribute ``api_version``; one that names another version is left out.
"""


@runtime_checkable
class ZooPlugin(Protocol):
    """Models by name. Entry-point group ``dery.zoo``.

    Optionally a plugin also has

    - ``nodes(model: str) -> Sequence[str] | None``: the module names whose outputs are the nodes,
      where the automatic choice does not suit;
    - ``weights_sha256(model: str) -> str | None``: the hash of the file ``build`` reads the
      weights from, for manifests that pin it; fetches nothing;
    - ``convert_weights(built: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]``: a user's
      older checkpoint in today's form, for a model that ``build`` gave.
    """

    def list_models(self) -> Sequence[str]:
        """Names that ``build`` accepts, without the plugin's own prefix."""
        ...

    def card(self, model: str) -> ModelCard:
        """Input, licence, task and source of ``model``; builds nothing, fetches nothing.

        What it says of licence, task and source is said of the plugin's own weights.

        Raises:
            KeyError: ``model`` is unknown.
        """
        ...

    def build(
        self, model: str, *, pretrained: bool, image_size: tuple[int, int] | None = None
    ) -> nn.Module:
        """The model, classifier included, in eval mode, on the current default device.

        Its parameters are used in single precision, whatever they come in.

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
    """One split of a data set: images in a fixed order, decoded one at a time.

    Optionally a split also has

    - ``name(index: int) -> str``: what to call an image in messages, as its file;
    - ``digest(index: int) -> bytes``: a hash of an image's content that spares decoding it.
    """

    @property
    def labels(self) -> Sequence[int] | None:
        """One class index an image, or None where the data have no labels."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Image ``index``, undecoded until now, in whatever mode it is stored.

        Threads may call it at the same time. What Pillow raises for a damaged image may go through.
        """
        ...


@runtime_checkable
class DataPlugin(Protocol):
    """Data sets by name. Entry-point group ``dery.data``; spec ``NAME`` or ``NAME:ARGUMENT``.

    Optionally a plugin also has ``resolve(argument: str) -> str``: the argument with its folders as
    absolute paths, for later stages that may be started elsewhere.
    """

    def classes(self, argument: str) -> Sequence[str] | None:
        """Class names in label order, or None for unlabelled data."""
        ...

    def split(self, argument: str, name: str) -> ImageSplit | None:
        """The split ``train`` or ``test``, or None where there is no such split.

        Labels are indices into the classes, and there are some in both splits or in none. Without
        a ``test`` split a fifth of each class of ``train`` is held out to test on.

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


@runtime_checkable
class MetricPlugin(Protocol):
    """What ``core.similarity.metric.Metric`` has. Entry-point group ``dery.metrics``."""

    @property
    def name(self) -> str: ...

    @property
    def directional(self) -> bool: ...

    @property
    def fn(self) -> Any: ...


class BrokenPluginError(DeryError):
    """A plugin cannot be loaded, does not keep its protocol, or fails where it may not."""

    code = "plugin"


ZOO_GROUP = "dery.zoo"
DATA_GROUP = "dery.data"
PROXY_GROUP = "dery.proxies"
METRIC_GROUP = "dery.metrics"

_Plugin = TypeVar("_Plugin")


@dataclasses.dataclass(frozen=True)
class PluginInfo:
    """One registered entry point, and what is wrong with it, if anything is.

    Args:
        models: How many models a zoo plugin offers.
    """

    group: str
    name: str
    target: str
    distribution: str
    version: str
    error: str | None
    models: int | None = None


def _entry_points(group: str) -> dict[str, list[EntryPoint]]:
    from importlib.metadata import entry_points

    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        same = found.setdefault(point.name, [])
        if all(point.value != other.value for other in same):
            same.append(point)
    return dict(sorted(found.items()))


def plugin_names(group: str) -> list[str]:
    """Names registered under ``group``; loads nothing."""
    return list(_entry_points(group))


def is_built_in(group: str, name: str) -> bool:
    """Whether a plugin is of ``dery_cli`` itself, whose version the records name."""
    points = _entry_points(group).get(name, [])
    return all(point.value.startswith("dery_cli.") for point in points) and bool(points)


def find_plugin(group: str, name: str, protocol: type[_Plugin], *, what: str = "plugin") -> _Plugin:
    """Load the plugin ``name`` of ``group``.

    Raises:
        UsageError: No such plugin; the message lists the close ones.
        BrokenPluginError: Two distributions register the name, or the plugin cannot be loaded or
            does not keep its protocol.
    """
    points = _entry_points(group)
    if name not in points:
        close = difflib.get_close_matches(name, points, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(points)}"
        raise UsageError(f"no such {what}: {name or repr(name)}", hint)
    return _load(points[name], protocol)


def find_proxy(name: str) -> Proxy:
    """Load a training-free proxy by name; see ``core.proxies``.

    Raises:
        UsageError: No such proxy.
        DeryError: It cannot be loaded.
    """
    return find_plugin(PROXY_GROUP, name, Proxy, what="proxy")


def find_metric(name: str) -> Metric:
    """Load a similarity metric by name; see ``core.similarity.metric``.

    Raises:
        UsageError: No such metric.
        DeryError: It cannot be loaded.
    """
    return cast("Metric", find_plugin(METRIC_GROUP, name, MetricPlugin, what="metric"))


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _load(points: Sequence[EntryPoint], protocol: type[_Plugin]) -> _Plugin:
    """Load the one plugin of a name; ``points`` are all that claim it."""
    point = points[0]
    if len(points) > 1:
        owners = ", ".join(sorted(_owner(p) for p in points))
        raise BrokenPluginError(
            f"two plugins of the group {point.group} are named '{point.name}': {owners}",
            "uninstall one of them",
        )
    where = f"plugin '{point.name}' ({point.value})"
    hint = f"update or uninstall {_owner(point)}"
    try:
        plugin = point.load()
    except (Exception, SystemExit) as error:  # whatever a third party's import does, dery goes on
        raise BrokenPluginError(f"{where} fails to load: {explain(error)}", hint) from error
    if isinstance(plugin, type):
        raise BrokenPluginError(f"{where} is a class; register an instance of it", hint)
    if not isinstance(plugin, protocol):
        wanted = sorted(n for n in vars(protocol) if not n.startswith("_"))
        missing = [n for n in wanted if not hasattr(plugin, n)]
        lacks = ", ".join(missing) or "a __call__ method"
        raise BrokenPluginError(f"{where} lacks {lacks}", hint)
    version = getattr(plugin, "api_version", PLUGIN_API_VERSION)
    if version != PLUGIN_API_VERSION:
        raise BrokenPluginError(
            f"{where} is written for version {version} of dery's plugin interface, "
            f"this is version {PLUGIN_API_VERSION}",
            f"update dery-cli or {_owner(point)}",
        )
    return plugin


def explain(error: BaseException) -> str:
    """An exception of foreign code in one line: its type, its first line, where it was raised."""
    lines = str(error).strip().splitlines()
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")
    ]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' + lines[0][:300] if lines else ''}{where}"


@contextlib.contextmanager
def guarded(plugin: str, call: str, *, let: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn whatever a plugin's own code raises into an error that names the plugin.

    Args:
        plugin: Its name.
        call: What is asked of it, as ``card('resnet18')``.
        let: What its contract lets it raise, which goes through.

    Raises:
        BrokenPluginError: Something else than a ``DeryError`` or these was raised inside.
    """
    expected: tuple[type[Exception], ...] = (DeryError, *let)
    try:
        yield
    except expected:
        raise
    except Exception as error:
        raise BrokenPluginError(
            f"the plugin '{plugin}' fails at {call}: {explain(error)}",
            "this is a fault of the plugin; dery zoo plugins names its package",
        ) from error


def list_models(name: str, plugin: ZooPlugin) -> list[str]:
    """The models of a zoo plugin.

    Raises:
        BrokenPluginError: It fails at that, or gives something else than names.
    """
    with guarded(name, "list_models()"):
        names = plugin.list_models()
        if isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"expected a sequence of names, got {str(names)[:80]!r}")
        return list(names)


def describe_plugins() -> list[PluginInfo]:
    """Every registered plugin; each is loaded and asked once, and a broken one says why."""
    infos: list[PluginInfo] = []
    protocols: dict[str, type] = {
        ZOO_GROUP: ZooPlugin,
        DATA_GROUP: DataPlugin,
        METRIC_GROUP: MetricPlugin,
        PROXY_GROUP: Proxy,
    }
    for group, protocol in protocols.items():
        for name, points in _entry_points(group).items():
            for point in points:
                error, models = None, None
                try:
                    plugin: ZooPlugin = _load(points, protocol)
                    if group == ZOO_GROUP:
                        models = len(list_models(name, plugin))
                except BrokenPluginError as failure:
                    error = failure.message
                version = point.dist.version if point.dist is not None else "unknown"
                infos.append(
                    PluginInfo(group, name, point.value, _owner(point), version, error, models)
                )
    return infos
