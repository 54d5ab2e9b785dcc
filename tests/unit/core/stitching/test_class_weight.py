"""How much classes count in a fit is chosen where it can be seen to matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dery_cli.core.stitching.class_weight import CLASS_WEIGHTS, MIN_IMAGES, choose_class_weight
from dery_cli.core.stitching.fit import StitchRegression
from dery_cli.core.stitching.stitch import Stitch
from dery_cli.types import Layout, Node


def _node(channels: int) -> Node:
    return Node(index=1, name="node", layout=Layout.NCHW, shape=(channels, 2, 2), grid=(2, 2))


SOURCE, TARGET = _node(6), _node(4)


class _Saturating(nn.Module):
    """Passes on what is well above its noise."""

    def forward(self, x):
        return torch.tanh(
            x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        )


def _case(images: int, *, lost: bool):
    """The class shifts source channel 0; with ``lost`` the target all but ignores that channel."""
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(images) % 3
    x = torch.randn(images, 6, 2, 2, generator=generator)
    x[:, 0] += 2.0 * (label - 1)[:, None, None]
    y = torch.randn(images, 4, 2, 2, generator=generator)
    y[:, :3] += x[:, 1:4]
    y[:, 3] = 0.15 * x[:, 0] if lost else 3.0 * x[:, 0]
    return x, y, label.tolist()


def _choose(images: int, *, lost: bool) -> float:
    x, y, labels = _case(images, lost=lost)
    regression = StitchRegression(Stitch(SOURCE, TARGET), lambda: [(x, y)], labels=labels)
    return choose_class_weight(regression, _Saturating(), TARGET, lambda: [x], labels)


def test_classes_count_more_where_the_target_all_but_ignores_them():
    assert _choose(300, lost=True) > 0


def test_plain_regression_is_kept_where_the_classes_come_through():
    assert _choose(300, lost=False) == 0


def test_a_few_images_choose_nothing():
    assert _choose(MIN_IMAGES - 1, lost=True) == 0


def test_the_first_weight_is_the_plain_regression():
    assert CLASS_WEIGHTS[0] == 0


@pytest.mark.parametrize("batch", [7, 300])
def test_each_fit_is_asked_only_about_images_it_has_not_seen(monkeypatch, batch):
    x, y, labels = _case(60, lost=True)
    pairs = list(zip(x.split(batch), y.split(batch), strict=True))
    regression = StitchRegression(Stitch(SOURCE, TARGET), lambda: pairs, labels=labels)
    fitted, asked = [], []
    solve, fit = torch.isin, regression.fit
    monkeypatch.setattr(
        regression,
        "fit",
        lambda weight, only, judged: (fitted.append(set(only)), fit(weight, only=only)),
    )

    def isin(of_what, among):
        asked.append(set(among.tolist()))
        return solve(of_what, among)

    monkeypatch.setattr(torch, "isin", isin)
    choose_class_weight(regression, _Saturating(), TARGET, lambda: [p[0] for p in pairs], labels)
    assert len(fitted) == len(asked) == 2 * len(CLASS_WEIGHTS)
    assert all(f | a == {0, 1, 2, 3} and not f & a for f, a in zip(fitted, asked, strict=True))
