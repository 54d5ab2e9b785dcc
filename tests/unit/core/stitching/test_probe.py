"""The closed-form classifier: folds, accuracy, scale and temperature."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from dery_cli.core.stitching.fit import fit_stitch
from dery_cli.core.stitching.probe import (
    HeldOut,
    Judgement,
    fit_classifier,
    judge,
    probe_accuracy,
    stratified_folds,
)
from dery_cli.core.stitching.stitch import Stitch
from dery_cli.types import Layout, Node


def test_folds_are_balanced_within_every_class():
    labels = torch.tensor([0] * 10 + [1] * 15 + [2] * 5)
    folds = stratified_folds(labels, 5)
    for label, size in ((0, 2), (1, 3), (2, 1)):
        assert [int((folds[labels == label] == f).sum()) for f in range(5)] == [size] * 5


def test_classifier_separates_what_is_linear_and_not_what_is_noise():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(300) % 3
    centres = 4 * torch.eye(3, 6)
    x = centres[labels] + torch.randn(300, 6, generator=generator)
    fitted = fit_classifier(x, labels, 3)
    assert fitted.accuracy > 0.95
    logits = x.double() @ fitted.weight_CD + fitted.bias_D
    assert float((logits.argmax(1) == labels).double().mean()) > 0.95
    noise = torch.randn(300, 6, generator=generator)
    assert probe_accuracy(noise, labels, 3) < 0.5


def test_classifier_does_not_depend_on_the_scale_of_a_channel():
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(120) % 4
    x = torch.eye(4, 8)[labels] + 0.3 * torch.randn(120, 8, generator=generator)
    scales = torch.logspace(-4, 4, 8)
    one, other = fit_classifier(x, labels, 4), fit_classifier(x * scales, labels, 4)
    assert one.accuracy == other.accuracy
    logits = x.double() @ one.weight_CD + one.bias_D
    scaled = (x * scales).double() @ other.weight_CD + other.bias_D
    assert torch.allclose(logits, scaled, atol=1e-4)


def test_more_channels_than_samples():
    labels = torch.arange(30) % 2
    x = torch.randn(30, 200, generator=torch.Generator().manual_seed(3))
    x[:, 0] += 6 * labels
    assert probe_accuracy(x, labels, 2) > 0.6


def test_the_temperature_gives_the_lowest_held_out_cross_entropy():
    """One binary feature that is wrong for an eighth of every fold.

    Whatever the penalty has left of the scores, the best factor makes the odds 7 to 1.
    """
    wrong = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1] * 200)
    label = torch.arange(1600) // 800
    feature = torch.where(wrong == 1, 1 - label, label)
    fitted = fit_classifier(feature[:, None].float(), label, 2)
    logit = torch.tensor([[0.0], [1.0]], dtype=torch.float64) @ fitted.weight_CD + fitted.bias_D
    expected = torch.logit(torch.tensor(7 / 8, dtype=torch.float64))
    assert abs(float(logit[1, 1] - logit[1, 0] - expected)) < 5e-3
    scores = feature[:, None].double() @ fitted.weight_CD + fitted.bias_D
    losses = [float(cross_entropy(scores * factor, label)) for factor in (0.97, 1.0, 1.03)]
    assert losses[1] < min(losses[0], losses[2])


NODE = Node(index=1, name="node", layout=Layout.NCHW, shape=(60, 1, 1), grid=(1, 1))
WITHOUT_MEANING = torch.arange(120) % 4


def _noise_features(known_N: torch.Tensor) -> torch.Tensor:
    """Noise through a stitch that was fitted with the (meaningless) labels of some images."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(120, 60, 1, 1, generator=generator) for _ in range(2))
    stitch = Stitch(NODE, NODE)
    pairs = [(x[known_N], y[known_N])]
    labels = WITHOUT_MEANING[known_N].tolist()
    fit_stitch(stitch, lambda: pairs, labels=labels, class_weight=8.0)
    with torch.no_grad():
        return stitch(x).flatten(1)


def test_what_is_said_of_labels_without_meaning_is_chance_where_they_were_held_out():
    label_N = WITHOUT_MEANING
    every_N = torch.ones(120, dtype=torch.bool)
    x_NC = _noise_features(every_N)
    flattered = fit_classifier(x_NC, label_N, 4)
    assert flattered.accuracy > 0.6  # the stitch has seen every label
    fold_N = stratified_folds(label_N, 3)
    crossed = [HeldOut(_noise_features(fold_N != fold), fold_N == fold) for fold in range(3)]
    assert judge(crossed, label_N, 4).accuracy < 0.25 + 3 * (0.25 * 0.75 / 120) ** 0.5
    outside_N = fold_N == 2
    outside = judge([HeldOut(_noise_features(~outside_N), outside_N)], label_N, 4)
    assert outside.accuracy < 0.25 + 3 * (0.25 * 0.75 / 40) ** 0.5


def test_a_classifier_is_fitted_as_it_was_judged():
    label_N = torch.arange(90) % 3
    x_NC = torch.randn(90, 8, generator=torch.Generator().manual_seed(4))
    x_NC[:, 0] += label_N
    plain = fit_classifier(x_NC, label_N, 3)
    chosen = Judgement(accuracy=0.5, penalty=0.1, temperature=7.0, cross_entropy=1.0)
    given = fit_classifier(x_NC, label_N, 3, chosen=chosen)
    assert given.accuracy == 0.5
    hotter = fit_classifier(x_NC, label_N, 3, chosen=dataclasses.replace(chosen, temperature=14.0))
    assert torch.allclose(2 * given.weight_CD, hotter.weight_CD)
    assert not torch.allclose(plain.weight_CD, given.weight_CD)


def test_the_penalty_is_chosen_by_other_samples_than_it_is_judged_by():
    """The best of many penalties on noise is lucky; nested it is not."""
    generator = torch.Generator().manual_seed(0)
    lucky, nested = [], []
    for _ in range(40):
        label_N = torch.arange(60) % 2
        x_NC = torch.randn(60, 30, generator=generator)
        fold_N = stratified_folds(label_N, 3)
        parts = [HeldOut(x_NC, fold_N == fold) for fold in range(3)]
        nested.append(judge(parts, label_N, 2).accuracy)
        lucky.append(fit_classifier(x_NC, label_N, 2, folds=3).accuracy)
    assert sum(nested) / 40 < 0.51
    assert sum(lucky) > sum(nested) + 0.4  # a point each


def test_nothing_held_out_is_an_error():
    x_NC, label_N = torch.randn(12, 3), torch.arange(12) % 2
    none = torch.zeros(12, dtype=torch.bool)
    with pytest.raises(ValueError, match="no sample was held out"):
        judge([HeldOut(x_NC, none)], label_N, 2)
