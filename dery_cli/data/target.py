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
        valid_indices: Training images that are chosen on, and nothing is fitted on.
        crop: Field of view.
        batch_size: Images a batch.
        device: Where the batches go.
        workers: Processes that decode.
    """

    data: DataSet
    indices: tuple[int, ...]
    fit_indices: tuple[int, ...]
    valid_indices: tuple[int, ...] = ()
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

    @property
    def all_indices(self) -> tuple[int, ...]:
        """Those that are fitted on, then those that are chosen on."""
        return (*self.indices, *self.valid_indices)

    @property
    def all_labels(self) -> list[int] | None:
        """Of ``all_indices``."""
        return self._labels(self.all_indices)

    def _labels(self, indices: tuple[int, ...]) -> list[int] | None:
        labels = self.data.train.labels
        return None if labels is None else [int(labels[i]) for i in indices]

    def part(self, indices: Sequence[int]) -> Target:
        """The same target, as if it had these of its images only, to fit on."""
        chosen = set(indices)
        return dataclasses.replace(
            self,
            indices=tuple(indices),
            fit_indices=tuple(index for index in self.fit_indices if index in chosen),
            valid_indices=(),
        )

    def altogether(self, fit_samples: int, seed: int) -> Target:
        """The same images, those to choose on too to be fitted on."""
        if not self.valid_indices:
            return self.part(self.indices)
        labels = self.data.train.labels
        return dataclasses.replace(
            self,
            indices=self.all_indices,
            fit_indices=choose_samples(self.all_indices, labels, fit_samples, seed),
            valid_indices=(),
        )

    @property
    def num_classes(self) -> int | None:
        return None if self.data.classes is None else len(self.data.classes)
