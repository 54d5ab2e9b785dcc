"""The donors of a zoo as dissected models on a device."""

from __future__ import annotations

import torch

from dery_cli.core.dissection.dissect import Dissection
from dery_cli.io.artifacts import Workspace
from dery_cli.zoo.registry import Zoo, load_donor


class DonorPool:
    """Donors built and dissected on one device, each when it is first asked for.

    Args:
        zoo: The donors.
        workspace: Where their local checkpoints are.
        device: Where they are built.
        keep: Hold all in memory; else the last one only.
    """

    def __init__(
        self, zoo: Zoo, workspace: Workspace, device: torch.device, *, keep: bool = True
    ) -> None:
        self._zoo, self._workspace, self._device = zoo, workspace, device
        self._keep = keep
        self._loaded: dict[str, Dissection] = {}

    def __getitem__(self, name: str) -> Dissection:
        if name not in self._loaded:
            if not self._keep:
                self._loaded.clear()
            self._loaded[name] = load_donor(self._zoo[name], self._workspace, device=self._device)
        return self._loaded[name]
