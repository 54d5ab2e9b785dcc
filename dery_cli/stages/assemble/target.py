"""What an assembly is made for: the target's images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from dery_cli.data.samples import choose_samples
from dery_cli.data.sets import DataSet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The target images as every donor sees them.

    Args:
        data: The data set.
        indices: Training images that probes and the head are fitted on.
        fit_indices: Those of them that stitches are fitted on.
        crop: Field of view.
        batch_size: Images a batch.
        device: Where the batches go.
        workers: Processes that decode.
    """

    data: DataSet
    indices: tuple[int, ...]
    fit_indices: tuple[int, ...]
    crop: float
    batch_size: int
    device: torch.device
    workers: int

    @property
    def labels(self) -> list[int] | None:
        """Of ``indices``."""
        return self._labels(self.indices)

    @property
    def fit_labels(self) -> list[int] | None:
        """Of ``fit_indices``."""
        return self._labels(self.fit_indices)

    def _labels(self, indices: tuple[int, ...]) -> list[int] | None:
        labels = self.data.train.labels
        return None if labels is None else [int(labels[i]) for i in indices]

    def part(self, indices: Sequence[int]) -> Target:
        """The same target, as if it had these of its images only."""
        chosen = set(indices)
        return dataclasses.replace(
            self,
            indices=tuple(indices),
            fit_indices=tuple(index for index in self.fit_indices if index in chosen),
        )

    @property
    def num_classes(self) -> int | None:
        return None if self.data.classes is None else len(self.data.classes)


def choose_fit(indices: tuple[int, ...], samples: int, seed: int) -> tuple[int, ...]:
    """Those of the target's images that stitches are fitted on, in order."""
    return tuple(sorted(indices[i] for i in choose_samples(len(indices), samples, seed)))
