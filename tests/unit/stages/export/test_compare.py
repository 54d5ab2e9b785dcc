"""How alike two networks answer, by hand."""

from __future__ import annotations

import pytest
import torch

from dery_cli.errors import DeryError
from dery_cli.stages.export.compare import Agreement, check_agreement, compare, top1

Y = torch.tensor([[1.0, 2.0], [4.0, -1.0], [0.0, 8.0]])


def answers(values):
    return lambda x_N: values[x_N]


def batches():
    return [torch.tensor([0]), torch.tensor([1, 2])]


def test_the_difference_is_relative_to_each_image_and_the_worst_counts():
    other = Y + torch.tensor([[0.0, 0.5], [0.4, 0.0], [0.0, 0.0]])
    found = compare(answers(Y), answers(other), batches(), classes=True)
    assert found.images == 3
    assert found.top1 == 1
    assert found.difference == pytest.approx(0.25)


def test_agreement_counts_the_images_of_one_class_and_is_none_without_a_head():
    found = compare(answers(Y), answers(Y.flip(1)), batches(), classes=True)
    assert found.top1 == 0
    assert compare(answers(Y), answers(Y), batches(), classes=False).top1 is None


def test_what_is_no_number_is_refused():
    other = Y.clone()
    other[1, 0] = torch.nan
    found = compare(answers(Y), answers(other), batches(), classes=True)
    with pytest.raises(DeryError, match="differs from the original by up to inf"):
        check_agreement(found, 1e9)


def test_the_tolerance_and_the_agreement_are_limits():
    check_agreement(Agreement(images=9, top1=0.99, difference=1e-3), 1e-3)
    with pytest.raises(DeryError, match=r"up to 0\.0011"):
        check_agreement(Agreement(images=9, top1=1.0, difference=1.1e-3), 1e-3)
    with pytest.raises(DeryError, match=r"98\.00% of 9 images"):
        check_agreement(Agreement(images=9, top1=0.98, difference=0), 1e-3)


def test_other_outputs_are_refused():
    with pytest.raises(DeryError, match="gives"):
        compare(answers(Y), answers(Y[:, :1]), batches(), classes=True)


def test_top1_by_hand():
    labels = [(torch.tensor([0]), torch.tensor([1])), (torch.tensor([1, 2]), torch.tensor([1, 1]))]
    assert top1(answers(Y), labels) == pytest.approx(2 / 3)
