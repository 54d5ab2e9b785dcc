"""What stitches could reach, against the fit of each."""

from __future__ import annotations

import pytest
import torch

from dery_cli.core.stitching import joint_r2 as joints
from dery_cli.core.stitching.joint_r2 import joint_r2
from dery_cli.core.stitching.ridge import RidgeStatistics
from dery_cli.types import Layout, Node


def _data(n=64, g=4, c=5, d=3, noise=0.5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, g, c, generator=generator, dtype=torch.float64)
    w = torch.randn(c, d, generator=generator, dtype=torch.float64)
    bias = torch.randn(g, d, generator=generator, dtype=torch.float64)
    return x, x @ w + bias + noise * torch.randn(n, g, d, generator=generator, dtype=torch.float64)


def _node(layout, shape, grid, index=1):
    return Node(index=index, name="n", layout=layout, shape=shape, grid=grid)


@pytest.mark.parametrize("layout", [Layout.NCHW, Layout.NLC])
def test_joint_r2_equals_the_single_fit(layout):
    x, y = _data()
    source = _node(Layout.NCHW, (5, 2, 2), (2, 2))
    shape = (3, 2, 2) if layout is Layout.NCHW else (4, 3)
    target = _node(layout, shape, (2, 2))
    other = (_node(Layout.NCHW, (2, 2, 2), (2, 2)), torch.randn(64, 4, 2))
    statistics = RidgeStatistics(4, 5, 3)
    statistics.update(x, y, torch.arange(64) % 4)
    expected = statistics.solve(position_bias=layout is Layout.NLC).r2
    found = joint_r2(source, x, {7: (target, y), 9: other})
    assert found[7] == pytest.approx(expected, abs=1e-9)
    assert found[9] < 0.1


@pytest.mark.parametrize("room", [1, 8 * 5 * 6 * 4])
def test_joint_r2_does_not_depend_on_how_many_targets_fit_in_memory(monkeypatch, room):
    x, y = _data()
    source = _node(Layout.NCHW, (5, 2, 2), (2, 2))
    targets = {
        k: (_node(Layout.NCHW, (3, 2, 2), (2, 2)), y + k * torch.randn(64, 4, 3)) for k in range(5)
    }
    whole = joint_r2(source, x, targets)
    monkeypatch.setattr(joints, "MOMENT_BYTES", room)
    assert joint_r2(source, x, targets) == pytest.approx(whole, abs=1e-12)
