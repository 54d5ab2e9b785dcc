"""What a similarity metric is, and what it takes and gives.

A metric compares every node of a zoo with every other, all at once. The built-ins (``cka``,
``rbf_cka``, ``lr``, ``ridge``) and other people's enter by the same door, the entry-point group
``dery.metrics``; ``pairwise_metric`` makes one from a function of two feature matrices.

Legend: N samples, C channels, P nodes. This module imports torch only where it computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from dery_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]
"""Told (work done, work in all) after every step; the unit is a multiply-add."""


class Rows(Protocol):
    """feat_NC of one node: a tensor, or something that reads its rows when sliced."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """Options of all metrics; each reads those it knows.

    Args:
        minibatch: Samples a Gram matrix is built from (``cka``, ``rbf_cka``). Minibatches are runs
            of consecutive samples, so the order of the samples has to be random.
        biased: The plain, biased HSIC instead of the unbiased one (``cka``, ``rbf_cka``).
        bandwidth: Bandwidth of the RBF kernel as a fraction of the median distance (``rbf_cka``).
        projection: Random directions that wider predictors are reduced to (``lr``); None: as is.
        penalty: Ridge penalty as a fraction of the mean feature variance (``ridge``).
        folds: Parts of the cross-validation (``ridge``).
        seed: Seed of the random projection.
        memory: Bytes that may be in use at once, the result included.
        device: Where to compute; the CPU does it for a device that has no float64.
    """

    minibatch: int = 256
    biased: bool = False
    bandwidth: float = 1.0
    projection: int | None = None
    penalty: float = 1e-2
    folds: int = 5
    seed: int = 0
    memory: int = 4_000_000_000
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = 2 if self.biased else 4
        if self.minibatch < least:
            raise UsageError(
                f"minibatch {self.minibatch} is too small",
                f"the {'biased' if self.biased else 'unbiased'} estimator needs {least} samples",
            )
        if not self.bandwidth > 0:
            raise UsageError(f"bandwidth {self.bandwidth} is not positive", "try --bandwidth 1")
        if not self.penalty > 0:
            raise UsageError(f"penalty {self.penalty} is not positive", "try --penalty 0.01")
        if self.folds < 2:
            raise UsageError(f"{self.folds} folds are too few", "try --folds 5")
        if self.projection is not None and self.projection < 1:
            raise UsageError(f"projection {self.projection} is not positive", "try --projection 64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similarity:
    """A metric between all nodes of a zoo.

    Args:
        metric: Name of the metric.
        sim_PP: The matrix, float64 (or float32), on the CPU. Of a directional metric
            ``sim_PP[i, j]`` is how well node i predicts node j. Values may leave [0, 1]; see
            ``clamp``.
        numer_PP: Numerators, from which more nodes can be added without computing these again.
        unit_P: The scale of each node's numerators.
        constant_nodes: Indices of nodes with constant features, whose similarity is 0 to all.
        warnings: What a reader of the matrix should know.
    """

    metric: str
    sim_PP: Tensor
    numer_PP: Tensor
    unit_P: Tensor
    constant_nodes: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def clamp(self) -> Tensor:
        """``sim_PP`` within [0, 1], as the partition's programs take it."""
        return self.sim_PP.clamp(0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """An earlier result to build on.

    Args:
        similarity: The earlier result, of the same metric, options and samples.
        positions: For each node now, its index in the earlier result, or None if it is new.
    """

    similarity: Similarity
    positions: Sequence[int | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A similarity of representations.

    Args:
        name: Name on the command line.
        directional: Whether sim(i, j) may differ from sim(j, i).
        fn: Computes it between all nodes: features of P nodes, the options, an earlier result or
            None, a progress callback or None.
    """

    name: str
    directional: bool
    fn: Callable[
        [Sequence[Rows], MetricOptions, Known | None, Progress | None],
        Similarity,
    ]


def pairwise_metric(
    name: str, fn: Callable[[Tensor, Tensor], float], *, directional: bool
) -> Metric:
    """A metric that calls ``fn(x_NC, y_NC)`` for every pair of nodes.

    Simple and slow: every pair reads both nodes' features again. ``fn`` gets float64 tensors.

    Example:
        >>> import torch
        >>> cosine = pairwise_metric("cosine", lambda x, y: float(
        ...     torch.cosine_similarity(x.flatten(), y.flatten(), 0)), directional=False)
    """

    def compute(
        features: Sequence[Rows],
        options: MetricOptions,
        known: Known | None,
        progress: Progress | None,
    ) -> Similarity:
        import torch

        num_nodes = len(features)
        sim_PP = torch.empty(num_nodes, num_nodes, dtype=torch.float64)
        old_P = [None] * num_nodes if known is None else list(known.positions)
        todo = []
        for i in range(num_nodes):
            for j in range(num_nodes if directional else i + 1):
                row, column = old_P[i], old_P[j]
                if known is not None and row is not None and column is not None:
                    sim_PP[i, j] = known.similarity.numer_PP[row, column]
                else:
                    todo.append((i, j))
        for done, (i, j) in enumerate(todo):
            x_NC, y_NC = (features[p][0 : features[p].shape[0]] for p in (i, j))
            sim_PP[i, j] = fn(
                x_NC.to(options.device, torch.float64), y_NC.to(options.device, torch.float64)
            )
            if progress is not None:
                progress(done + 1, len(todo))
        if not directional:
            sim_PP = sim_PP.tril() + sim_PP.tril(-1).T
        undefined = torch.isnan(sim_PP)
        warnings: tuple[str, ...] = ()
        if bool(undefined.any()):
            warnings = (f"{name} gave NaN for {int(undefined.sum())} pairs; they count as 0",)
        sim_PP = sim_PP.nan_to_num(0.0)
        return Similarity(
            metric=name,
            sim_PP=sim_PP,
            numer_PP=sim_PP,
            unit_P=torch.ones(num_nodes, dtype=torch.float64),
            warnings=warnings,
        )

    return Metric(name=name, directional=directional, fn=compute)
