"""The assembled network, and how it is put together from blocks of several donors.

``AssembledNetwork`` is the module; ``NetworkBuilder`` makes networks of dissected donors: it takes
the blocks, adds the stitches, and fits these in order, joint by joint, each on what the network so
far really delivers. Prefixes that several candidates share are fitted once.

The parts, in the order in which to read them: the layer itself in ``stitch``, the regression in
``ridge``, the fit of a stitch with it in ``fit``, how much classes count in ``class_weight``, the
closed-form classifier in ``probe``. ``joint_r2`` foresees fits, ``match`` trains stitches further.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dery_cli.core.assembly.notation import needs_stitch
from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.numerics import seeded
from dery_cli.core.stitching.class_weight import choose_class_weight
from dery_cli.core.stitching.fit import (
    StitchFit,
    StitchRegression,
    reestimate_batch_norm,
)
from dery_cli.core.stitching.stem import Stem
from dery_cli.core.stitching.stitch import Stitch, split_tokens
from dery_cli.types import BlockRef, Layout, Node, StemKind, StitchKind

KEEP_BYTES = 4 << 30
"""Calibration tensors at joints are kept in memory up to this size, else computed anew."""


def with_own_buffers(block: nn.Module) -> nn.Module:
    """A copy with the same parameters, but statistics of its own."""
    return copy.deepcopy(block, {id(p): p for p in block.parameters()})


class Pool(nn.Module):
    """The vector that a head sees of a node: the mean over positions, then the prefix tokens.

    It has no parameters. A probe at the node sees the same (``probe_features``).

    Args:
        node: What comes in.
    """

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, x: Tensor) -> Tensor:
        grid_NCHW, prefix_NTC = split_tokens(x, self.node)
        return torch.cat([grid_NCHW.mean((2, 3)), prefix_NTC.flatten(1)], dim=1)

    def extra_repr(self) -> str:
        return f"{self.node.layout}{self.node.shape}"


def ending_pool(node: Node) -> Pool | None:
    """What a network needs between its last block and its head: nothing after a vector."""
    return None if node.layout is Layout.NC else Pool(node)


def head_inputs(node: Node) -> int:
    """Inputs of a head on a node, pooled."""
    return node.num_chs * (1 + node.num_prefix_tokens)


def after_stem(donor: Dissection, stop: int) -> nn.Module:
    """What is left of a first block when a ``Stem`` takes its first unit's place."""
    return donor.block(1, stop) if stop > 1 else nn.Identity()


class AssembledNetwork(nn.Module):
    """K blocks, the stitches between them, and a linear head.

    Parameters keep the donors' names: ``blocks.<k>.<name in the donor>``, ``stitches.<k>.*`` for
    the stitch in front of block k, ``stem.*`` for a fresh stem, ``head.*``. Without a head
    the output is the pre-logits vector.

    Args:
        blocks: K block modules.
        stitches: Stitch in front of each block, None where blocks meet without one.
        head: Classifier on the pre-logits vector.
        pool: Makes that vector where the last block ends before its donor does.
        stem: Fresh layers in front of the first block; None where the donor's own begin it.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        stitches: Sequence[nn.Module | None],
        head: nn.Linear | None = None,
        pool: Pool | None = None,
        stem: Stem | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.stitches = nn.ModuleDict(
            {str(k): stitch for k, stitch in enumerate(stitches) if stitch is not None}
        )
        self.pool = pool
        self.head = head

    @property
    def ending(self) -> list[nn.Module]:
        """What comes after the last block, in order."""
        return [module for module in (self.pool, self.head) if module is not None]

    def copy(self) -> AssembledNetwork:
        """A network that shares nothing with this one, nor one block with another."""
        stitches = self.stitches
        again = AssembledNetwork(
            [copy.deepcopy(block) for block in self.blocks],
            [
                copy.deepcopy(stitches[k]) if k in stitches else None
                for k in map(str, range(len(self.blocks)))
            ],
            copy.deepcopy(self.head),
            copy.deepcopy(self.pool),
            copy.deepcopy(self.stem),
        )
        return again.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) to the pre-logits vector (N, C)."""
        if self.stem is not None:
            x = self.stem(x)
        for index, block in enumerate(self.blocks):
            if str(index) in self.stitches:
                x = self.stitches[str(index)](x)
            x = block(x)
        return x if self.pool is None else self.pool(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) to logits (N, classes)."""
        x = self.forward_features(x)
        return x if self.head is None else self.head(x)


def unfitted_network(
    donors: Donors,
    refs: Sequence[BlockRef],
    *,
    kind: StitchKind,
    stem: StemKind,
    num_classes: int | None,
) -> AssembledNetwork:
    """The network of these blocks with stitches and head as they are drawn, in eval mode.

    Its blocks are the donors' own: for what follows from shapes alone, such as time.

    Args:
        donors: Dissected donors by name, on one device.
        refs: Blocks in order.
        kind: What stitches are made of.
        stem: What the network begins with.
        num_classes: Of the head; None leaves it out.
    """
    ends = [donors[ref.donor].anatomy.nodes for ref in refs]
    blocks = [donors[ref.donor].block(ref.start, ref.stop) for ref in refs]
    stitches: list[Stitch | None] = [None]
    with seeded(0):
        for before, after in itertools.pairwise(range(len(refs))):
            joined = needs_stitch(refs[before], refs[after])
            source, target = ends[before][refs[before].stop], ends[after][refs[after].start]
            stitches.append(Stitch(source, target, kind) if joined else None)
        fresh = None
        if stem is not StemKind.DONOR:
            fresh = Stem(ends[0][0], ends[0][1])
            blocks[0] = after_stem(donors[refs[0].donor], refs[0].stop)
        end = ends[-1][refs[-1].stop]
        head = None if num_classes is None else nn.Linear(head_inputs(end), num_classes)
    return AssembledNetwork(blocks, stitches, head, ending_pool(end), fresh).eval()


Batches = Callable[[], Iterable[Tensor]]
"""Starts a pass over tensors, batch by batch, always of the same images in the same order."""


class MemoryBudget:
    """Bytes that kept calibration tensors may still take."""

    def __init__(self, limit: int = KEEP_BYTES) -> None:
        self.left = limit

    def take(self, size: int) -> bool:
        """Reserve ``size`` bytes; False where they do not fit."""
        if size > self.left:
            return False
        self.left -= size
        return True


def replay(batches: Batches, module: nn.Module, budget: MemoryBudget) -> Batches:
    """The batches after ``module``: kept while ``budget`` lasts, else computed in each pass."""

    def compute() -> Iterator[Tensor]:
        with torch.no_grad():
            for x in batches():
                yield module(x)

    kept: list[Tensor] = []
    for y in compute():
        if not budget.take(y.numel() * y.element_size()):
            budget.left += sum(x.numel() * x.element_size() for x in kept)
            return compute
        kept.append(y)
    return lambda: kept


@dataclasses.dataclass(frozen=True)
class _Prefix:
    """The first k blocks of an assembly with their fitted stitches."""

    blocks: tuple[nn.Module, ...]
    stitches: tuple[Stitch | None, ...]
    fits: tuple[StitchFit | None, ...]
    outputs: Batches


@dataclasses.dataclass(frozen=True)
class BuiltNetwork:
    """A network with fitted stitches and no head.

    Args:
        network: The assembly, in eval mode. Its parameters may be those of the donors, and of other
            candidates of the same builder: take its ``copy`` before changing it.
        fits: For each block, how well the stitch in front of it was fitted, or None.
    """

    network: AssembledNetwork
    fits: tuple[StitchFit | None, ...]


class Donors(Protocol):
    """Dissected donors by name: a mapping, or something that loads them when asked."""

    def __getitem__(self, name: str, /) -> Dissection: ...


class NetworkBuilder:
    """Builds assemblies with closed-form stitches from dissected donors.

    Args:
        donors: Dissected donors by name, in eval mode, all on one device.
        views: Images as the named donor sees them; the same images, order and batches for every
            donor.
        labels: Their classes; None fits stitches without.
        kind: What stitches are made of.
        stem: What networks begin with.
        seed: Of the random weights of ``paper`` stitches and stems.
        keep_bytes: Memory for calibration tensors at joints.
    """

    def __init__(
        self,
        donors: Donors,
        views: Callable[[str], Iterable[Tensor]],
        *,
        labels: Sequence[int] | None = None,
        kind: StitchKind = StitchKind.LINEAR,
        stem: StemKind = StemKind.DONOR,
        seed: int = 0,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self._donors = donors
        self._views = views
        self._labels = labels
        self._kind = kind
        self._stem = stem
        self._seed = seed
        self._budget = MemoryBudget(keep_bytes)
        self._prefixes: dict[tuple[BlockRef, ...], _Prefix] = {}
        self._targets: dict[tuple[str, int], Batches] = {}
        self._stems: dict[str, Stem] = {}

    def node(self, donor: str, index: int) -> Node:
        """A donor's node by index."""
        return self._donors[donor].anatomy.nodes[index]

    def build(self, refs: Sequence[BlockRef]) -> BuiltNetwork:
        """The network of these blocks in a row, stitches fitted joint by joint, no head.

        Unstitched prefixes keep their batch-norm statistics; every block after the first stitch,
        or a fresh stem, has its statistics re-estimated on what it now receives.
        """
        prefix = self._prefix(tuple(refs))
        pool = ending_pool(self.node(refs[-1].donor, refs[-1].stop))
        stem = self._stems.get(refs[0].donor)
        network = AssembledNetwork(prefix.blocks, prefix.stitches, pool=pool, stem=stem).eval()
        return BuiltNetwork(network, prefix.fits)

    def _prefix(self, refs: tuple[BlockRef, ...]) -> _Prefix:
        if refs in self._prefixes:
            return self._prefixes[refs]
        last = refs[-1]
        donor = self._donors[last.donor]
        if len(refs) == 1:
            prefix = self._begin(last)
        else:
            block = donor.block(last.start, last.stop).eval()
            prefix = self._extend(self._prefix(refs[:-1]), refs[-2], last, block)
        self._prefixes[refs] = prefix
        return prefix

    def _begin(self, first: BlockRef) -> _Prefix:
        """The first block, behind a fresh stem where that is asked for."""
        donor = self._donors[first.donor]
        inputs: Batches = lambda: self._views(first.donor)  # noqa: E731
        block: nn.Module
        if self._stem is StemKind.DONOR:
            block = donor.block(first.start, first.stop).eval()
        else:
            inputs = replay(inputs, self._fresh_stem(first.donor), self._budget)
            block = with_own_buffers(after_stem(donor, first.stop)).eval()
            reestimate_batch_norm(block, inputs)
        return _Prefix((block,), (None,), (None,), replay(inputs, block, self._budget))

    def _fresh_stem(self, donor: str) -> Stem:
        """Of this donor's networks, its batch norms those of the images."""
        if donor not in self._stems:
            device = next(iter(self._donors[donor].block(0, 1).parameters())).device
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                stem = Stem(self.node(donor, 0), self.node(donor, 1)).to(device).eval()
            reestimate_batch_norm(stem, lambda: self._views(donor))
            self._stems[donor] = stem
        return self._stems[donor]

    def _extend(
        self, before: _Prefix, previous: BlockRef, last: BlockRef, block: nn.Module
    ) -> _Prefix:
        stitch: Stitch | None = None
        fit: StitchFit | None = None
        inputs = before.outputs
        if needs_stitch(previous, last):
            device = next(iter(block.parameters())).device
            source = self.node(previous.donor, previous.stop)
            target = self.node(last.donor, last.start)
            with seeded(self._seed + len(before.blocks)):
                stitch = Stitch(source, target, self._kind).to(device).eval()
            fit = self._fit(stitch, before.outputs, last, block)
            inputs = replay(before.outputs, stitch, self._budget)
        changed = [stitch, *before.stitches, *self._stems.values()]
        if any(module is not None for module in changed):
            block = with_own_buffers(block)
            reestimate_batch_norm(block, inputs)
        return _Prefix(
            (*before.blocks, block),
            (*before.stitches, stitch),
            (*before.fits, fit),
            replay(inputs, block, self._budget),
        )

    def _fit(self, stitch: Stitch, outputs: Batches, last: BlockRef, block: nn.Module) -> StitchFit:
        if self._kind is StitchKind.PAPER:
            reestimate_batch_norm(stitch, outputs)
            return StitchFit(self._kind, None, None)
        wanted = self._target(last.donor, last.start)
        regression = StitchRegression(
            stitch, lambda: zip(outputs(), wanted(), strict=True), labels=self._labels
        )
        weight = 0.0
        if self._labels is not None:
            after = self.node(last.donor, last.stop)
            trial = with_own_buffers(block)
            weight = choose_class_weight(regression, trial, after, outputs, self._labels)
        return regression.fit(weight)

    def _target(self, donor: str, node: int) -> Batches:
        """What ``donor`` has at ``node`` on the calibration images."""
        key = (donor, node)
        if key not in self._targets:
            stretch = self._donors[donor].block(0, node).eval()
            self._targets[key] = replay(lambda: self._views(donor), stretch, self._budget)
        return self._targets[key]
