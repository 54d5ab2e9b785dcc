"""Accuracies by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dery_cli.core.scoring import network_outputs, score_batch, top1

LOGITS = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [2, 0, 0]])
LABELS = torch.tensor([0, 1, 0, 0])


def test_top1_by_hand_and_along_leading_dimensions():
    assert float(top1(LOGITS, LABELS)) == 0.75
    assert top1(torch.stack([LOGITS, LOGITS.roll(1, -1)]), LABELS).tolist() == [0.75, 0.0]


def test_a_batch_scored_by_hand():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]]).repeat(3, 1)
    labels_B, guess_B, loss_B, top5_B = score_batch(logits, torch.tensor([0, 4, 5]))
    assert labels_B.tolist() == [0, 4, 5]
    assert guess_B.tolist() == [0, 0, 0]
    assert top5_B.tolist() == [True, True, False]
    first = -float(torch.tensor([6.0, 5, 4, 3, 2, 1, 0]).log_softmax(0)[0])
    assert loss_B.tolist() == pytest.approx([first, first + 4, first + 5])


def test_outputs_of_all_batches_in_order_without_gradients():
    network = nn.Linear(2, 3)
    x_NC = torch.arange(10.0).view(5, 2)
    given = network_outputs(network, torch.split(x_NC, 2))
    assert not given.requires_grad
    torch.testing.assert_close(given, network(x_NC).detach())
