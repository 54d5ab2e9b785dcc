"""Which images are taken for what: one split, shares of every class, never in class order."""

from __future__ import annotations

import collections

import pytest

from dery_cli.data.samples import Split, choose_samples, choose_target


class Labelled:
    """A split that has nothing but labels."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)


def in_class_order(classes, each):
    return [label for label in range(classes) for _ in range(each)]


def test_every_class_has_its_share_where_a_plain_draw_would_miss_some():
    labels = in_class_order(1000, 50)
    chosen = choose_samples(range(len(labels)), labels, 2048, 0)
    assert len(set(chosen)) == 2048
    counts = collections.Counter(labels[index] for index in chosen)
    assert len(counts) == 1000  # 1 - (1 - 1/1000)^2048 of them otherwise
    assert set(counts.values()) <= {2, 3}


def test_shares_are_those_of_the_pool_and_rare_classes_are_there():
    labels = [0] * 900 + [1] * 90 + [2]
    counts = collections.Counter(
        labels[index] for index in choose_samples(range(991), labels, 100, 3)
    )
    assert counts[2] == 1
    assert 88 <= counts[0] <= 91
    assert 8 <= counts[1] <= 11


def test_batches_are_not_of_single_classes():
    labels = in_class_order(10, 100)
    for samples in (1000, 500):
        chosen = choose_samples(range(1000), labels, samples, 0)
        first = [labels[index] for index in chosen[:64]]
        assert len(set(first)) == 10
        assert max(collections.Counter(first).values()) < 20


def test_fewer_samples_than_classes_take_one_of_each():
    labels = in_class_order(50, 20)
    chosen = choose_samples(range(1000), labels, 30, 0)
    assert len({labels[index] for index in chosen}) == 30


@pytest.mark.parametrize("labels", [None, [0, 1] * 50])
def test_the_choice_follows_from_the_seed(labels):
    def drawn(seed):
        return choose_samples(range(100), labels, 40, seed)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert sorted(drawn(1)) != list(drawn(1))
    assert choose_samples([7, 5, 9], None, 10, 0) in {
        (a, b, c) for a in (5, 7, 9) for b in (5, 7, 9) for c in (5, 7, 9) if len({a, b, c}) == 3
    }


def test_from_a_thousand_labelled_images_on_a_part_is_kept_apart():
    assert Split.of(Labelled(in_class_order(10, 99)), 0).fraction == 0
    assert Split.of(Labelled(in_class_order(10, 100)), 0).fraction == 0.2

    class Unlabelled(Labelled):
        labels = None

        def __init__(self):
            pass

        def __len__(self):
            return 5000

    assert Split.of(Unlabelled(), 0).fraction == 0


def test_nothing_is_fitted_on_what_is_chosen_on():
    images = Labelled(in_class_order(10, 200))
    split = Split.of(images, 4)
    kept, held_out = split.parts(images)
    chosen = choose_target(images, split, samples=600, fit=100)
    assert set(chosen.indices) <= set(kept)
    assert set(chosen.fit_indices) <= set(chosen.indices)
    assert set(chosen.valid_indices) <= set(held_out)
    assert (len(chosen.indices), len(chosen.fit_indices), len(chosen.valid_indices)) == (
        600,
        100,
        300,
    )
    assert not set(kept) & set(held_out)


def test_a_split_knows_its_images():
    images = Labelled(in_class_order(10, 100))
    split = Split.of(images, 0)
    assert split.is_of(Labelled(in_class_order(10, 100)))
    assert not split.is_of(Labelled(in_class_order(10, 101)))
    assert Split(**split.to_json()) == split
