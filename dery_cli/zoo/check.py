"""Prove that a zoo plugin keeps its contract; for plugin authors' tests and ``dery zoo check``.

In a plugin's own test suite this is all that is needed::

    from dery_cli.testing import check_plugin
    from my_plugin import zoo

    def test_contract():
        check_plugin(zoo)

Nothing is fetched: the checks are about architectures, and run on random weights.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from dery_cli.types import Anatomy, InputSpec, Layout, Node
from dery_cli.zoo.contract import Check, Contract
from dery_cli.zoo.plugin import ZooPlugin, list_models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was found out about one model.

    Args:
        model: Its name, without the plugin's prefix.
        checks: In the order they ran; those that need a failed one are left out.
        input: What the model was checked with; None where the card is no card.
        anatomy: Its nodes; None where it could not be dissected.
        whole_only: Why it cannot be cut and serves as a whole donor; None where it can.
        seconds: Time the checks took.
    """

    model: str
    checks: tuple[Check, ...]
    input: InputSpec | None
    anatomy: Anatomy | None
    whole_only: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if not check.ok]

    def layouts(self) -> list[str]:
        """Layouts of the inner nodes."""
        return sorted({str(node.layout) for node in self._inner()})

    def strides(self) -> list[float]:
        """Input side over grid side (heights) of the inner nodes that have a grid."""
        assert self.input is not None
        height = self.input.image_size[0]
        grids = {n.grid[0] for n in self._inner() if n.layout is not Layout.NC}
        return sorted(round(height / grid, 2) for grid in grids)

    def tokens(self) -> list[int]:
        """Tokens an image, prefix tokens included, of the inner NLC nodes."""
        return sorted({n.shape[0] for n in self._inner() if n.layout is Layout.NLC})

    def to_json(self) -> dict[str, Any]:
        known = self.anatomy is not None
        return {
            "model": self.model,
            "ok": self.ok,
            "whole_only": self.whole_only,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "input": None if self.input is None else self.input.to_json(),
            "units": None if self.anatomy is None else self.anatomy.num_units,
            "layouts": self.layouts() if known else None,
            "strides": self.strides() if known else None,
            "tokens": self.tokens() if known else None,
            "anatomy": None if self.anatomy is None else self.anatomy.to_json(),
        }

    def _inner(self) -> Sequence[Node]:
        return self.anatomy.nodes[1:-1] if self.anatomy is not None else ()


def check_plugin(
    plugin: ZooPlugin,
    models: Sequence[str] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
) -> list[Report]:
    """Check models of a plugin, all of them by default.

    Args:
        plugin: The object the entry point names.
        models: Names, without the plugin's prefix.
        image_size: Input side in pixels, or (height, width); the models' own where None.

    Raises:
        AssertionError: A model breaks the contract; the message has a line for each.
    """
    names = list_models("under test", plugin) if models is None else models
    reports = [check_model(plugin, name, image_size) for name in names]
    lines = [f"{r.model}: {c.name}: {c.detail}" for r in reports for c in r.failures]
    if lines:
        raise AssertionError("the contract of dery's zoo plugins is broken:\n" + "\n".join(lines))
    return reports


def check_model(
    plugin: ZooPlugin, name: str, image_size: int | tuple[int, int] | None = None
) -> Report:
    """Check one model of a plugin; nothing is raised, whatever the plugin does.

    The checks: its card; it builds without weights and without the network; its blocks in a row
    equal it; params and FLOPs add up; it trains as a whole and in blocks alike; its weights
    survive a file.

    Args:
        plugin: The object the entry point names.
        name: A model of ``list_models``.
        image_size: Input side in pixels, or (height, width); the model's own where None.
    """
    started = time.monotonic()
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    checker = Contract(plugin, name, size)
    with torch.random.fork_rng(devices=[]):
        checks = list(checker.run())
    return Report(
        model=name,
        checks=tuple(checks),
        input=None if checker.card is None else checker.card.input,
        anatomy=checker.anatomy,
        whole_only=checker.whole_only,
        seconds=time.monotonic() - started,
    )
