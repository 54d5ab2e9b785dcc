"""Draws leave every random state of the caller as it was."""

from __future__ import annotations

import torch

from dery_cli.core.numerics import seeded
from dery_cli.zoo.registry import prepare_donor


def test_the_same_seed_draws_the_same_and_the_caller_notices_nothing():
    before = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with seeded(seed):
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn[0])


def test_random_weights_seed_no_other_device(monkeypatch):
    """``torch.manual_seed`` would seed every CUDA device, and no fork of the CPU's state helps."""
    seeded_devices = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_devices.append)
    prepare_donor("demo/resnext", pretrained=False, seed=3)
    assert seeded_devices == []
