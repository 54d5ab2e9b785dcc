"""The words of ``dery`` as frozen dataclasses: nodes, donors, inputs, blocks.

Nothing here imports torch or numpy, so that commands can build and check these before the heavy
imports. ``Donor`` and what it holds round-trip through plain JSON (``to_json``/``from_json``).
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")  # files of 255 bytes are named after it
WEIGHTS_FOLDER = "weights"
"""Where a workspace keeps copies of local checkpoints."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def is_name(text: object) -> bool:
    """Whether this may name a donor, an assembly or a run: never a path to somewhere else."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def is_file_name(text: object) -> bool:
    """Whether this may name a file that lies beside a record: one plain name, no path."""
    return isinstance(text, str) and _FILE_NAME.fullmatch(text) is not None


class Layout(enum.StrEnum):
    """How a feature tensor is laid out in memory, batch first (timm's ``layers/format.py``)."""

    NCHW = "NCHW"
    NHWC = "NHWC"
    NLC = "NLC"
    NC = "NC"


class StitchKind(enum.StrEnum):
    """What a stitch is made of; see ``core.stitch.Stitch``."""

    LINEAR = "linear"
    MLP = "mlp"
    PAPER = "paper"


class StemKind(enum.StrEnum):
    """What a network begins with; see ``core.stitching.stem``."""

    DONOR = "donor"
    PAPER = "paper"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a donor expects of an image.

    Args:
        image_size: (height, width) in pixels.
        mean: Per-channel mean, in units of the [0, 1] image.
        std: Per-channel standard deviation, in the same units.
        interpolation: ``bilinear``, ``bicubic`` or ``nearest``.
        in_chans: 3 for RGB, 1 for grayscale.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    in_chans: int = 3

    def to_json(self) -> dict[str, Any]:
        return {
            "image_size": list(self.image_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "in_chans": self.in_chans,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputSpec:
        return cls(
            image_size=(data["image_size"][0], data["image_size"][1]),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation=data["interpolation"],
            in_chans=data["in_chans"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known of a pretrained model before it is built.

    Args:
        input: Size and normalisation the weights were trained with.
        license: SPDX identifier, or the licence's name; ``unknown`` where the source says nothing.
        task: What it was pretrained on, in words (``ImageNet-1k classification``).
        source: Where the weights come from: a URL, a package, a paper.
        metrics: Published figures, for example ``{"top1": 0.871}``.
    """

    input: InputSpec
    license: str = "unknown"
    task: str = "unknown"
    source: str = "unknown"
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """A place in a model's graph where exactly one float tensor is alive.

    Args:
        index: Position in the path graph; 0 is the normalised image, the last is the pre-logits.
        name: The donor's module (or operation) whose output it is, ``input`` for node 0.
        layout: Layout of the tensor.
        shape: Shape for one image, without the batch dimension, as the tensor is laid out.
        grid: (height, width) of the feature map; (1, 1) for a vector.
        num_prefix_tokens: Class and register tokens in front of the grid tokens (NLC only).
        params: Parameters of the unit that ends here (each counted where it is first used).
        flops: Multiply-adds of that unit for one image.
    """

    index: int
    name: str
    layout: Layout
    shape: tuple[int, ...]
    grid: tuple[int, int]
    num_prefix_tokens: int = 0
    params: int = 0
    flops: int = 0

    @property
    def num_chs(self) -> int:
        """Channels C, whatever the layout."""
        return self.shape[0] if self.layout is Layout.NCHW else self.shape[-1]

    def to_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "name": self.name,
            "layout": str(self.layout),
            "shape": list(self.shape),
            "grid": list(self.grid),
            "num_prefix_tokens": self.num_prefix_tokens,
            "params": self.params,
            "flops": self.flops,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Node:
        return cls(
            index=data["index"],
            name=data["name"],
            layout=Layout(data["layout"]),
            shape=tuple(data["shape"]),
            grid=(data["grid"][0], data["grid"][1]),
            num_prefix_tokens=data["num_prefix_tokens"],
            params=data["params"],
            flops=data["flops"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedParams:
    """Parameters that several units of one donor use.

    ``Node.params`` counts them at the first unit; a block that starts later but holds one of the
    other units owns them too.

    Args:
        count: Number of scalar parameters.
        units: 1-based unit indices that use them, ascending.
    """

    count: int
    units: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A dissected model as numbers: the path graph of its nodes.

    Args:
        nodes: Nodes 0..n; node 0 is the image, node n the pre-logits vector.
        shared: Parameters used by more than one unit.
        method: How the cut was found: ``fx``, ``intermediates`` or ``manifest``.
    """

    nodes: tuple[Node, ...]
    shared: tuple[SharedParams, ...] = ()
    method: str = "fx"

    @property
    def num_units(self) -> int:
        """Units n; the stem counts to the first of them, the last norm to the last."""
        return len(self.nodes) - 1

    def params(self, start: int, stop: int) -> int:
        """Parameters of the block between nodes ``start`` and ``stop``."""
        total = sum(node.params for node in self.nodes[start + 1 : stop + 1])
        for shared in self.shared:
            inside = any(start < unit <= stop for unit in shared.units)
            if inside and shared.units[0] <= start:
                total += shared.count
        return total

    def flops(self, start: int, stop: int) -> int:
        """Multiply-adds for one image of the block between nodes ``start`` and ``stop``."""
        return sum(node.flops for node in self.nodes[start + 1 : stop + 1])

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "nodes": [node.to_json() for node in self.nodes],
            "shared": [{"count": s.count, "units": list(s.units)} for s in self.shared],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Anatomy:
        return cls(
            nodes=tuple(Node.from_json(node) for node in data["nodes"]),
            shared=tuple(
                SharedParams(count=s["count"], units=tuple(s["units"])) for s in data["shared"]
            ),
            method=data["method"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Donor:
    """One registered model of the zoo.

    Args:
        name: Unique name in the zoo, ``[a-z0-9._-]``.
        spec: ``plugin/name[.tag]`` it was added by.
        weights_sha256: Hash over the sorted state dict's names, types, shapes and bytes.
        card: Licence, task, source and input; ``card.input`` is what it was registered with.
        anatomy: Its nodes.
        weights: Local checkpoint file the weights came from, else None.
        pretrained: False where it was added with random weights.
    """

    name: str
    spec: str
    weights_sha256: str
    card: ModelCard
    anatomy: Anatomy
    weights: str | None = None
    pretrained: bool = True

    @property
    def input(self) -> InputSpec:
        return self.card.input

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "spec": self.spec,
            "weights_sha256": self.weights_sha256,
            "weights": self.weights,
            "pretrained": self.pretrained,
            "license": self.card.license,
            "task": self.card.task,
            "source": self.card.source,
            "metrics": dict(self.card.metrics),
            "input": self.card.input.to_json(),
            "anatomy": self.anatomy.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Donor:
        """A donor from a record, which may be anybody's.

        Raises:
            ValueError: Its name, or that of its checkpoint, leads out of the workspace.
        """
        if not is_name(data["name"]):
            raise ValueError(f"{data['name']!r} is no name of a donor")
        if data["weights"] is not None:
            folder, _, file = str(data["weights"]).partition("/")
            if folder != WEIGHTS_FOLDER or not is_file_name(file):
                raise ValueError(f"{data['weights']!r} is no checkpoint in {WEIGHTS_FOLDER}/")
        return cls(
            name=data["name"],
            spec=data["spec"],
            weights_sha256=data["weights_sha256"],
            weights=data["weights"],
            pretrained=data["pretrained"],
            card=ModelCard(
                input=InputSpec.from_json(data["input"]),
                license=data["license"],
                task=data["task"],
                source=data["source"],
                metrics=dict(data["metrics"]),
            ),
            anatomy=Anatomy.from_json(data["anatomy"]),
        )


MIN_IMAGES_TO_CHOOSE_ON = 1000
"""With fewer labelled training images none are held out: the best of a few dozen is a lottery."""


@dataclasses.dataclass(frozen=True, order=True)
class BlockRef:
    """The stretch of ``donor`` between nodes ``start`` and ``stop``.

    Args:
        donor: Its name.
        start: Node it begins at.
        stop: Node it ends at.
        adapter: Whether a stitch is in front although it follows on the block before.
    """

    donor: str
    start: int
    stop: int
    adapter: bool = False

    def __str__(self) -> str:
        return f"{self.donor}[{self.start}:{self.stop}]"
