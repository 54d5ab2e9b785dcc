"""Scores by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dery_cli.errors import UsageError
from dery_cli.training.evaluate import evaluate
from tests.unit.training.standins import CLASSES, Assembly, images


class Lookup(nn.Module):
    """The images are the logits."""

    def forward(self, x):
        return x.flatten(1)


def data(rows, labels):
    logits = torch.tensor(rows, dtype=torch.float32)
    return TensorDataset(logits.view(len(rows), 1, 1, -1), torch.tensor(labels))


def test_scores_of_four_images_by_hand():
    rows = [[2, 0, 0], [0, 2, 0], [0, 2, 0], [2, 0, 0]]
    result = evaluate(Lookup(), data(rows, [0, 1, 0, 0]), classes=CLASSES, batch_size=3)
    assert result.images == 4
    assert result.top1 == 0.75
    assert result.top5 is None
    assert result.per_class == (pytest.approx(2 / 3), 1.0, None)
    assert result.confusion == ((2, 1, 0), (0, 1, 0), (0, 0, 0))
    right, wrong = torch.tensor([2.0, 0, 0]).log_softmax(0)[:2].neg().tolist()
    assert result.loss == pytest.approx((3 * right + wrong) / 4)
    assert result.images_per_second > 0
    assert json.loads(json.dumps(result.to_json()))["per_class"][2] is None


def test_top5_counts_the_first_five_of_more_than_five_classes():
    rows = [[6, 5, 4, 3, 2, 1, 0]] * 3
    result = evaluate(Lookup(), data(rows, [0, 4, 5]), classes=list("abcdefg"))
    assert result.top1 == pytest.approx(1 / 3)
    assert result.top5 == pytest.approx(2 / 3)


def test_the_batch_size_does_not_change_scores_and_modes_are_kept():
    model = Assembly().train()
    model.blocks.eval()
    seen = []
    whole = evaluate(model, images(31), classes=CLASSES, batch_size=31)
    parts = evaluate(
        model, images(31), classes=CLASSES, batch_size=7, progress=lambda *p: seen.append(p)
    )
    assert (whole.top1, whole.confusion) == (parts.top1, parts.confusion)
    assert whole.loss == pytest.approx(parts.loss)
    assert seen == [(7, 31), (14, 31), (21, 31), (28, 31), (31, 31)]
    assert model.training
    assert not model.blocks[0].training
    assert torch.equal(model.blocks[0][1].running_mean, torch.zeros(8))


def test_data_that_do_not_fit_the_network_are_refused():
    with pytest.raises(UsageError, match="the evaluation data have a label 2, the network has 2"):
        evaluate(Assembly(2), images(9), classes=("a", "b"))
    with pytest.raises(UsageError, match=r"the network gives \(4,\) numbers an image"):
        evaluate(Assembly(4), images(9), classes=CLASSES)
    with pytest.raises(UsageError, match="the evaluation data have no images"):
        evaluate(Assembly(), images(0), classes=CLASSES)
