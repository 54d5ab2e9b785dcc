"""Clusters that stand for classes."""

from __future__ import annotations

import itertools

import pytest
import torch

from dery_cli.core.stitching import pseudo_labels as module
from dery_cli.core.stitching.pseudo_labels import pseudo_labels


def _groups(sizes, spread=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    centre_KC = 5 * torch.randn(len(sizes), 8, generator=generator)
    order_N = torch.randperm(len(label_N), generator=generator)
    x_NC = centre_KC[label_N] + spread * torch.randn(len(label_N), 8, generator=generator)
    return x_NC[order_N], label_N[order_N]


def test_groups_that_lie_apart_are_found_whatever_they_are_called():
    x_NC, label_N = _groups([30, 5, 12, 20])
    found_N = pseudo_labels(x_NC, 4, seed=0)
    assert len(set(zip(found_N.tolist(), label_N.tolist(), strict=True))) == 4
    first = [found_N.tolist().index(k) for k in range(4)]
    assert first == sorted(first)


def test_the_same_seed_gives_the_same_clusters_and_shifts_change_nothing():
    x_NC = torch.randn(80, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pseudo_labels(x_NC, 7, seed=3), pseudo_labels(x_NC, 7, seed=3))
    assert torch.equal(pseudo_labels(x_NC, 7, seed=3), pseudo_labels(x_NC + 100, 7, seed=3))


def test_few_points_get_the_tightest_clusters_of_all():
    x_NC = torch.randn(7, 2, generator=torch.Generator().manual_seed(2)).double()

    def inside(labels):
        parts = [x_NC[torch.tensor(labels) == k] for k in set(labels)]
        return sum(float((part - part.mean(0)).square().sum()) for part in parts)

    best = min(inside(labels) for labels in itertools.product(range(3), repeat=7))
    assert inside(pseudo_labels(x_NC, 3, seed=0).tolist()) == pytest.approx(best)


def test_no_cluster_is_empty_and_too_many_are_refused():
    x_NC = torch.tensor([[0.0], [0.0], [0.0], [1.0], [2.0]])
    assert sorted(set(pseudo_labels(x_NC, 3, seed=0).tolist())) == [0, 1, 2]
    with pytest.raises(ValueError, match="3 distinct images do not make 4 clusters"):
        pseudo_labels(x_NC, 4, seed=0)


def test_a_cluster_that_loses_all_its_images_gets_the_one_farthest_from_its_own(monkeypatch):
    """Lloyd's steps lose one now and then; here the third centre begins where no image is."""
    x_NC = torch.tensor([[0.0], [0.2], [0.4], [9.0], [9.1], [12.0]])
    begin_KC = torch.tensor([[0.0], [9.0], [99.0]]).double() - x_NC.double().mean(0)
    monkeypatch.setattr(module, "plus_plus", lambda *_: begin_KC)
    assert pseudo_labels(x_NC, 3, seed=0).tolist() == [0, 0, 0, 1, 1, 2]
