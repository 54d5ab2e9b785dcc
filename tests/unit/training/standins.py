"""A small network with the parameter names of an assembly, and images that can be learned."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dery_cli.training import checkpoint as ckpt

CLASSES = ("a", "b", "c")


class Assembly(nn.Module):
    """Two convolutional blocks with batch norm and dropout, one stitch, a head."""

    def __init__(self, classes: int = 3, *, seed: int = 0, norm: bool = True, width: int = 8):
        super().__init__()
        torch.manual_seed(seed)

        def block(inner: int) -> list[nn.Module]:
            layers: list[nn.Module] = [nn.Conv2d(inner, width, 3, 2, 1)]
            return [*layers, nn.BatchNorm2d(width), nn.ReLU()] if norm else [*layers, nn.ReLU()]

        last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *([nn.Dropout(0.2)] if norm else [])]
        self.blocks = nn.ModuleList([nn.Sequential(*block(3)), nn.Sequential(*block(width), *last)])
        self.stitches = nn.ModuleDict({"1": nn.Conv2d(width, width, 1)})
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[1](self.stitches["1"](self.blocks[0](x)))
        return self.head(x)


def images(count: int = 90, *, classes: int = 3, seed: int = 1, size: int = 8) -> TensorDataset:
    """Noise whose brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    pixels = torch.randn(count, 3, size, size, generator=generator)
    return TensorDataset(pixels + labels[:, None, None, None], labels)


class Noisy(Dataset[Any]):
    """Another data set with augmentation that draws from all three global generators."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset
        self.labels = [int(label) for label in dataset.tensors[1]]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        import random

        import numpy as np

        image, label = self.dataset[index]
        noise = torch.randn(image.shape) * 0.1
        return image * random.uniform(0.9, 1.1) + noise + np.random.rand() * 0.1, int(label)  # noqa: NPY002


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit, names included."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_a_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process, a session of its own; returns its id.

    It exits with 0, or with 77 on KeyboardInterrupt, else with 1.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            torch.set_num_threads(1)  # a pool of threads does not survive the fork
            work()
            code = 0
        except KeyboardInterrupt:
            code = 77
        finally:
            os._exit(code)
    return child


def weights_of(run_dir: Path, kind: str = "best") -> dict[str, torch.Tensor]:
    """The weights of a run's checkpoint, averaged where the run averaged them."""
    tensors = ckpt.load_checkpoint(ckpt.find_checkpoint(run_dir, kind)).tensors
    return tensors.get("ema", tensors["model"])
