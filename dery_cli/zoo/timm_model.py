"""An assembly as a timm model: features, other heads, other input channels, feature maps.

``TimmAssembly`` has the parameters of the assembled network under the same names, so that an
assembly's ``model.safetensors`` is its checkpoint. It runs the same blocks stretch by stretch, from
node to node, so that what is alive at each node can be handed out.

Legend: N images, C channels, H x W grid.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, checkpoint
from torch import Tensor, nn
from torch.nn import functional

from dery_cli.core.dissection.block import Stretch, units_of
from dery_cli.core.stitching.network import after_stem, ending_pool, head_inputs
from dery_cli.core.stitching.stem import Stem
from dery_cli.core.stitching.stitch import Stitch, split_tokens
from dery_cli.errors import UsageError
from dery_cli.types import Layout, Node, StitchKind
from dery_cli.zoo.networks import fresh_donor

ARCHITECTURE = "dery_assembly"
"""Name in timm's registry."""
PYRAMID = (4.0, 2.0, 1.0, 0.5)
"""Sizes of the maps of a network with one stride, relative to its own map (ViTDet's)."""


@dataclasses.dataclass(frozen=True)
class _Leg:
    """One stretch of the network: of block ``block``, behind its stitch where it is the first."""

    block: int
    stretch: Stretch
    first: bool


@dataclasses.dataclass(frozen=True)
class _Level:
    """A feature map that is offered: after which leg, and resized by how much."""

    leg: int
    scale: float
    stride: float


class TimmAssembly(nn.Module):
    """An assembled network with the interface of timm's models.

    Feature levels are the last node of each stride, the finest first. A network with a single
    stride, as a plain ViT, has a simple pyramid of its last map instead (after ViTDet, Li et al.
    2022, but without parameters): bilinear at 4 and 2 times the size, as it is, and a 2x2 max-pool.

    Args:
        network: Description, as in ``assembly.json`` under ``network``.
        num_classes: Of the head; 0 for none; None for the description's.
        in_chans: Channels of the image; None for the description's.
        global_pool: ``""`` passes the map on; None, or the network's own name for it, pools.
        img_size: Must be the network's own: stitches and position embeddings are of that size.
        drop_rate: Dropout in front of the head.
        pyramid: Resize the last map where there is one stride only.

    Raises:
        UsageError: Another image size or pooling, or in_chans that cannot be adapted.
        DeryError: A donor's plugin is missing.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        num_classes: int | None = None,
        in_chans: int | None = None,
        global_pool: str | None = None,
        img_size: int | Sequence[int] | None = None,
        drop_rate: float = 0.0,
        pyramid: bool = True,
    ) -> None:
        super().__init__()
        size = network["input"]["image_size"]
        self.image_size = (size[0], size[1])
        _check_size(self.image_size, img_size)
        end = Node.from_json(network["end"])
        self.pool = ending_pool(end)
        self.own_pool = "donor" if self.pool is None else "avg"
        self.grad_checkpointing = False
        self.stem: Stem | None = None
        if "stem" in network:
            ends = (network["stem"][key] for key in ("source", "target"))
            self.stem = Stem(*map(Node.from_json, ends))
        self.blocks = nn.ModuleList()
        self.stitches = nn.ModuleDict()
        self._no_decay: set[str] = set()
        self._legs: list[_Leg] = []
        self._build(network)
        self._tail: _Leg | None = None
        if self.pool is None and len(self._legs) > 1 and _is_map(self._legs[-2].stretch.node):
            self._tail = self._legs.pop()
        self.in_chans = network["input"]["in_chans"]
        self.first_conv = _first_conv(
            {"stem": self.stem} if self.stem else {"blocks.0": self.blocks[0]}, self.in_chans
        )
        if in_chans is not None and in_chans != self.in_chans:
            self._set_in_chans(in_chans)
        self.output_node = self._legs[-1].stretch.node
        self.output_fmt = str(self.output_node.layout)
        self.num_features = self.output_node.num_chs
        self.head_hidden_size = head_inputs(end)
        self.levels = self._find_levels(pyramid)
        self.feature_info = [
            {
                "num_chs": self._legs[level.leg].stretch.node.num_chs,
                "reduction": int(level.stride) if level.stride.is_integer() else level.stride,
                "module": self._place(level.leg),
            }
            for level in self.levels
        ]
        self.head_drop = nn.Dropout(drop_rate)
        classes = len(network["classes"] or ()) if num_classes is None else num_classes
        self.reset_classifier(classes, global_pool)

    def _build(self, network: Mapping[str, Any]) -> None:
        for k, (block, joint) in enumerate(zip(network["blocks"], network["joints"], strict=True)):
            model, dissection = fresh_donor(block)
            start, stop = block["start"], block["stop"]
            if k == 0 and self.stem is not None:
                start = 1
                module = copy.deepcopy(after_stem(dissection, stop))
            else:
                module = copy.deepcopy(dissection.block(start, stop))
            stretches = dissection.stretches(start, stop) if start < stop else []
            for i, stretch in enumerate(stretches):
                self._legs.append(_Leg(k, stretch, i == 0))
            named = dict(module.named_parameters())
            plain: set[str] = getattr(model, "no_weight_decay", set)()
            self._no_decay |= {f"blocks.{k}.{name}" for name in plain if name in named}
            self.blocks.append(module)
            if joint is not None:
                source, target = Node.from_json(joint["source"]), Node.from_json(joint["target"])
                stitch = Stitch(source, target, StitchKind(joint["stitch"]))
                self.stitches[str(k)] = stitch
                if stitch.position is not None:
                    self._no_decay.add(f"stitches.{k}.position")

    def _set_in_chans(self, in_chans: int) -> None:
        """Put a fresh first convolution in place of the old; timm adapts its pretrained weights."""
        name = self.first_conv
        if name is None:
            raise UsageError(
                f"in_chans={in_chans}: the first block has no convolution on "
                f"{self.in_chans} channels that could be adapted",
                "assemble with another donor at the start: dery assemble --start DONOR",
            )
        parent, _, leaf = name.rpartition(".")
        old = self.get_submodule(name)
        assert isinstance(old, nn.Conv2d)
        new = copy.deepcopy(old)
        new.in_channels = in_chans
        new.weight = nn.Parameter(old.weight.new_empty(len(old.weight), in_chans, *old.kernel_size))
        new.reset_parameters()
        setattr(self.get_submodule(parent), leaf, new)
        self.in_chans = in_chans

    def _find_levels(self, pyramid: bool) -> list[_Level]:
        last: dict[float, int] = {}
        for i, leg in enumerate(self._legs):
            node = leg.stretch.node
            if _is_map(node):
                last[self.image_size[0] / node.grid[0]] = i
        if len(last) == 1 and pyramid:
            ((stride, leg_index),) = last.items()
            return [_Level(leg_index, s, stride / s) for s in PYRAMID if stride / s >= 1]
        return [_Level(leg, 1.0, stride) for stride, leg in sorted(last.items())]

    def _place(self, leg: int) -> str:
        return f"blocks.{self._legs[leg].block}.{self._legs[leg].stretch.node.name}"

    def _begin(self, x: Tensor) -> Tensor:
        return x if self.stem is None else self.stem(x)

    def _run(self, leg: _Leg, x: Tensor) -> Tensor:
        if leg.first and str(leg.block) in self.stitches:
            x = self.stitches[str(leg.block)](x)
        block = self.blocks[leg.block]
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            result: Tensor = checkpoint(leg.stretch, block, x)
            return result
        return leg.stretch(block, x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) to the last feature map, laid out as ``output_fmt`` says.

        Where the model has no map in front of its pooling it is the pre-logits vector (N, C).
        """
        x = self._begin(x)
        for leg in self._legs:
            x = self._run(leg, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map to logits, or to the pre-logits vector (N, C)."""
        if self.global_pool:
            if self._tail is not None:
                x = self._run(self._tail, x)
            elif self.pool is not None:
                x = self.pool(x)
        x = self.head_drop(x)
        result: Tensor = x if pre_logits else self.head(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) to logits (N, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps of the levels asked for, and the last map as ``forward_features`` gives it.

        Args:
            x: (N, C, H, W), normalised.
            indices: Levels in ``feature_info``; a number for the last so many; None for all.
            norm: Has no effect: a level is what is alive at its node, the last one behind the norm.
            stop_early: Run no further than the last level asked for.
            output_fmt: ``NCHW``, the one that is offered; prefix tokens are dropped.
            intermediates_only: Return the maps alone.

        Raises:
            UsageError: No such level, or another format.
        """
        del norm
        if str(getattr(output_fmt, "value", output_fmt)) != "NCHW":
            raise UsageError(f"output_fmt {output_fmt} is not offered", "output_fmt='NCHW'")
        taken = self.take(indices)
        wanted = {self.levels[i].leg for i in taken}
        legs = self._legs[: max(wanted) + 1] if stop_early else self._legs
        alive: dict[int, Tensor] = {}
        x = self._begin(x)
        for i, leg in enumerate(legs):
            x = self._run(leg, x)
            if i in wanted:
                alive[i] = split_tokens(x, leg.stretch.node)[0]
        maps = [_resized(alive[self.levels[i].leg], self.levels[i].scale) for i in taken]
        return maps if intermediates_only else (x, maps)

    def take(self, indices: int | Sequence[int] | None) -> list[int]:
        """Levels by index, as timm's ``out_indices`` names them: from 0, or from the end.

        Raises:
            UsageError: One that is not there.
        """
        count = len(self.levels)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            asked: Sequence[int] = range(-indices, 0) if indices > 0 else (count,)
        else:
            asked = indices
        for i in asked:
            if not -count <= i < count:
                strides = ", ".join(f"{info['reduction']:g}" for info in self.feature_info)
                raise UsageError(
                    f"out_indices {indices}: the network has {count} feature levels, "
                    f"of strides {strides}",
                    f"choose from 0 to {count - 1}",
                )
        return [i % count for i in asked]

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the levels asked for do not need, and the head."""
        del prune_norm
        taken = self.take(indices)
        self._legs = self._legs[: max(self.levels[i].leg for i in taken) + 1]
        if prune_head:
            self.reset_classifier(0, "")
            self._tail = None
        kept = [*self._legs, *([] if self._tail is None else [self._tail])]
        for k, block in enumerate(self.blocks):
            mine = [leg.stretch for leg in kept if leg.block == k]
            if not mine:
                self.blocks[k] = nn.Identity()
                if str(k) in self.stitches:
                    del self.stitches[str(k)]
            else:
                _keep(block, mine)
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another head, with fresh weights; 0 classes for none.

        Raises:
            UsageError: A pooling that is not the network's own.
        """
        if global_pool is None:
            global_pool = getattr(self, "global_pool", self.own_pool)
        if global_pool not in ("", self.own_pool):
            raise UsageError(
                f"global_pool '{global_pool}' is not what this network ends in",
                f"'{self.own_pool}', or '' for the map as it is",
            )
        if num_classes and not global_pool:
            raise UsageError("a head needs pooled features", f"global_pool='{self.own_pool}'")
        self.global_pool = global_pool
        self.num_classes = num_classes
        device = next(self.parameters()).device
        self.head = (
            nn.Linear(self.head_hidden_size, num_classes, device=device)
            if num_classes
            else nn.Identity()
        )

    def group_matcher(self, coarse: bool = False) -> Any:
        """Which group of layers a parameter belongs to, from the image on: a function of its name.

        Groups are the donors' units, or with ``coarse`` the blocks. A stitch goes with the block
        that it leads to; the head is the last group.
        """
        starts: list[int] = []
        order: dict[str, int] = {}
        start = 0
        for k, block in enumerate(self.blocks):
            known = units_of(block)
            units = {name: known.get(name, 1) for name, _ in block.named_parameters()}
            first, last = min(units.values(), default=1), max(units.values(), default=1)
            starts.append(k if coarse else start)
            for name, unit in units.items():
                order[f"blocks.{k}.{name}"] = k if coarse else start + unit - first
            start += last - first + 1

        def group(name: str) -> int | float:
            if name in order:
                return order[name]
            parts = name.split(".")
            if parts[0] == "stem":
                return 0
            if parts[0] not in ("blocks", "stitches"):
                return float("inf")
            inside = [g for n, g in order.items() if n.startswith(f"{name}.")]  # a module's name
            return min(inside, default=starts[int(parts[1])])

        return group

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the embeddings that the donors and the stitches leave undecayed."""
        return set(self._no_decay)


def _check_size(own: tuple[int, int], asked: int | Sequence[int] | None) -> None:
    if asked is None:
        return
    size = (asked, asked) if isinstance(asked, int) else tuple(asked)
    if size != own:
        raise UsageError(
            f"img_size {size[0]}x{size[1]}: this network is for images of {own[0]}x{own[1]}; its "
            "stitches and grids are of that size",
            "assemble it anew from donors of another size: dery zoo add SPEC --image-size N",
        )


def _is_map(node: Node) -> bool:
    return node.layout is not Layout.NC


def _first_conv(parts: Mapping[str, nn.Module], in_chans: int) -> str | None:
    """The convolution that the image enters, by name."""
    for place, part in parts.items():
        for name, module in part.named_modules():
            conv = isinstance(module, nn.Conv2d) and module.groups == 1
            if conv and module.in_channels == in_chans:
                return f"{place}.{name}"
    return None


def _resized(map_NCHW: Tensor, scale: float) -> Tensor:
    if scale > 1:
        return functional.interpolate(
            map_NCHW, scale_factor=scale, mode="bilinear", align_corners=False
        )
    if scale < 1:
        return functional.max_pool2d(map_NCHW, 2, ceil_mode=True)
    return map_NCHW


def _keep(block: nn.Module, stretches: Iterable[Stretch]) -> None:
    """Remove from a block the parameters and buffers that these stretches do not need."""
    stretches = list(stretches)
    for path, module in list(block.named_modules()):
        for held in (module._parameters, module._buffers):
            for leaf in list(held):
                name = f"{path}.{leaf}" if path else leaf
                if not any(stretch.uses(name) for stretch in stretches):
                    del held[leaf]


def create_assembly(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """What timm's ``create_model`` calls: the model, or its feature maps.

    Args:
        pretrained: Load the folder's weights.
        kwargs: timm's own, and ``network``: a description, which a folder's ``config.json`` has in
            ``model_args``.

    Raises:
        UsageError: There is no description.
    """
    if "network" not in kwargs:
        raise UsageError(
            f"{ARCHITECTURE} is built from an assembly's folder",
            'timm.create_model("local-dir:FOLDER"); dery push, or dery_cli.timm.write_timm_folder '
            "write one",
        )
    placed = {key: kwargs.pop(key) for key in ("device", "dtype") if key in kwargs}
    model: nn.Module = build_model_with_cfg(
        TimmAssembly,
        ARCHITECTURE,
        pretrained,
        feature_cfg={"out_indices": None, "feature_cls": "getter"},
        **kwargs,
    )
    return model.to(**placed) if placed else model


class NamedMaps(nn.Module):
    """Feature maps by name, as torchvision's detection and segmentation models want them.

    Args:
        features: A ``features_only`` model of timm's: images to a list of maps.
        names: Of the maps; None numbers them, as ``BackboneWithFPN`` does.
    """

    def __init__(self, features: nn.Module, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.features = features
        self.names = None if names is None else tuple(names)

    def forward(self, x: Tensor) -> collections.OrderedDict[str, Tensor]:
        maps = self.features(x)
        names = self.names or [str(i) for i in range(len(maps))]
        return collections.OrderedDict(zip(names, maps, strict=True))
