"""The order of images and the random numbers of each, from the seed alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from dery_cli.data.sets import ImageDataset
from dery_cli.data.splits import stratified_holdout
from dery_cli.errors import UsageError
from dery_cli.training.sampling import (
    SeededDataset,
    StreamSampler,
    check_labels,
    derive_seed,
    labels_of,
    random_state_kept,
    seed_all,
)
from tests.unit.training.standins import Noisy, images


def keys(images_=10, batch_size=4, start=0, stop=10, seed=0):
    sampler = StreamSampler(images_, batch_size=batch_size, start=start, stop=stop, seed=seed)
    return list(sampler)


def test_every_epoch_is_a_shuffled_pass_over_all_images():
    stream = [key for batch in keys() for key in batch]
    for epoch in range(4):
        part = stream[10 * epoch : 10 * (epoch + 1)]
        assert {e for e, _ in part} == {epoch}
        assert sorted(i for _, i in part) == list(range(10))
    orders = [tuple(i for _, i in stream[10 * e : 10 * (e + 1)]) for e in range(4)]
    assert len(set(orders)) == 4


def test_a_sampler_that_starts_late_goes_on_where_the_first_would_be():
    assert keys(start=3) == keys()[3:]
    assert keys(seed=1) != keys()


def test_halving_the_micro_batch_leaves_the_order():
    whole = [key for batch in keys(batch_size=4, stop=10) for key in batch]
    halves = [key for batch in keys(batch_size=2, stop=20) for key in batch]
    assert whole == halves


def test_an_image_is_augmented_the_same_way_whenever_and_wherever_it_is_drawn():
    dataset = SeededDataset(Noisy(images(12)), seed=3)
    one, label = dataset[(5, 7)]
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    again = dataset.__getitems__([(5, 1), (5, 7)])[1][0]
    assert torch.equal(one, again)
    assert label == 7 % 3
    assert not torch.equal(one, dataset[(6, 7)][0])
    assert not torch.equal(one, SeededDataset(Noisy(images(12)), seed=4)[(5, 7)][0])


def test_loading_processes_give_the_same_batches():
    def batches(workers):
        sampler = StreamSampler(12, batch_size=4, start=0, stop=4, seed=0)
        dataset = SeededDataset(Noisy(images(12)), seed=0)
        return [x for x, _ in DataLoader(dataset, batch_sampler=sampler, num_workers=workers)]

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone, shared)


def test_the_callers_random_state_is_kept_over_whatever_draws():
    seed_all(9)
    expected = (random.random(), np.random.rand(), torch.rand(1))  # noqa: NPY002
    seed_all(9)
    with random_state_kept():
        seed_all(1)
        SeededDataset(Noisy(images(12)), seed=0)[(0, 0)]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


def test_seeds_depend_on_every_part_and_never_change():
    assert derive_seed(0, "image", 1, 2) == derive_seed(0, "image", 1, 2)
    assert len({derive_seed(0, "image", e, i) for e in range(30) for i in range(30)}) == 900
    # Written down: another value would change every recorded run.
    assert derive_seed(0, "order", 0) == 2094333682667709378


class Split:
    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return 3

    def image(self, index):
        raise AssertionError("decoded")


def test_labels_are_read_without_decoding_an_image():
    assert labels_of(ImageDataset(Split([2, 0, 1]), None, [2, 0])) == [1, 2]
    assert labels_of(Subset(images(6), [4, 0])) == [1, 0]
    assert labels_of([1, 2]) is None
    with pytest.raises(UsageError, match="the images have no labels"):
        labels_of(ImageDataset(Split(None), None))


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0, 1, 5], "the training data have a label 5, the network has 3 classes"),
        ([-1, 1], "the training data have a label -1"),
        ([1, 1], "all 2 training images are of one class (1)"),
        ([], "the training data have no images"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, text):
    with pytest.raises(UsageError) as error:
        check_labels(labels, 3, "training")
    assert text in error.value.message


def test_one_class_is_enough_to_evaluate_and_the_holdout_is_stratified():
    check_labels([1, 1], 3, "validation")
    train, valid = stratified_holdout([0] * 10 + [1] * 5, fraction=0.2, seed=0)
    assert sorted(train + valid) == list(range(15))
    assert sum(i < 10 for i in valid) == 2
    assert sum(i >= 10 for i in valid) == 1
