"""Ridge from streamed normal equations against explicit solutions."""

from __future__ import annotations

import pytest
import torch

from dery_cli.core.stitching import joint_r2 as joints
from dery_cli.core.stitching.joint_r2 import joint_r2
from dery_cli.core.stitching.probe import fit_classifier, probe_accuracy, stratified_folds
from dery_cli.core.stitching.ridge import RIDGE_PENALTIES, RidgeStatistics
from dery_cli.types import Layout, Node


def _data(n=60, g=3, c=5, d=4, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, g, c, generator=generator, dtype=torch.float64)
    w = torch.randn(c, d, generator=generator, dtype=torch.float64)
    bias = torch.randn(g, d, generator=generator, dtype=torch.float64)
    y = x @ w + bias + noise * torch.randn(n, g, d, generator=generator, dtype=torch.float64)
    return x, y, w, bias


def _explicit(x, y, penalty, position_bias):
    """Ridge by augmented least squares over explicit rows."""
    axes = (0,) if position_bias else (0, 1)
    mean_x, mean_y = x.mean(axes, keepdim=True), y.mean(axes, keepdim=True)
    xc, yc = (x - mean_x).flatten(0, 1), (y - mean_y).flatten(0, 1)
    scale = torch.linalg.eigvalsh(xc.T @ xc).mean()
    root = torch.sqrt(penalty * scale) * torch.eye(x.shape[-1], dtype=torch.float64)
    target = torch.zeros(x.shape[-1], y.shape[-1], dtype=torch.float64)
    weight = torch.linalg.lstsq(torch.cat([xc, root]), torch.cat([yc, target])).solution
    return weight, (mean_y - mean_x @ weight)[0], mean_x, mean_y


@pytest.mark.parametrize("position_bias", [False, True])
def test_streamed_ridge_equals_explicit_least_squares(position_bias):
    x, y, _, _ = _data()
    fold = torch.arange(len(x)) % 4
    statistics = RidgeStatistics(3, 5, 4)
    for start in range(0, 60, 7):  # uneven batches
        statistics.update(x[start : start + 7], y[start : start + 7], fold[start : start + 7])
    fit = statistics.solve(position_bias=position_bias, penalties=(0.05,))
    weight, bias, _, _ = _explicit(x, y, torch.tensor(0.05), position_bias)
    assert torch.allclose(fit.weight_CD, weight, atol=1e-9)
    assert torch.allclose(fit.bias_GD, bias, atol=1e-9)


@pytest.mark.parametrize("cells", [(0, 0, 0), (0, 1, 0), (0, 1, 2)])
@pytest.mark.parametrize("position_bias", [False, True])
def test_class_offsets_are_added_to_the_outputs(position_bias, cells):
    x, y, _, _ = _data(noise=1.0)
    label, fold = torch.arange(len(x)) % 3, torch.arange(len(x)) // 15
    label[:5] = 4  # class 3 has no image, class 4 is in one fold only
    statistics = RidgeStatistics(3, 5, 4, classes=5, cells=cells)
    for start in range(0, 60, 7):
        part = slice(start, start + 7)
        statistics.update(x[part], y[part], fold[part], label[part])
    best, chosen = float("inf"), 0.0
    for penalty in RIDGE_PENALTIES:
        error = 0.0
        for held_out in range(4):
            test = fold == held_out
            offset = _offsets(y[~test], label[~test], 5, cells)
            weight, _, mean_x, mean_y = _explicit(
                x[~test], y[~test] + offset[label[~test]], penalty, position_bias
            )
            wanted = y[test] + offset[label[test]]
            error += float((wanted - mean_y - (x[test] - mean_x) @ weight).square().sum())
        if error < best:
            best, chosen = error, penalty
    fit = statistics.solve(position_bias=position_bias, class_weight=2.0)
    moved = y + _offsets(y, label, 5, cells)[label]
    weight, bias, _, _ = _explicit(x, moved, torch.tensor(chosen), position_bias)
    assert fit.penalty == chosen
    assert torch.allclose(fit.weight_CD, weight, atol=1e-9)
    assert torch.allclose(fit.bias_GD, bias, atol=1e-9)
    assert fit.r2 == statistics.solve(position_bias=position_bias).r2


def _offsets(y, label, classes, cells):
    """Twice the class means less the mean, (K, G, D), by loops; 0 for a class without images."""
    rows = torch.zeros(classes, *y.shape[1:], dtype=y.dtype)
    for k in label.unique().tolist():
        for g, cell in enumerate(cells):
            inside = [i for i, other in enumerate(cells) if other == cell]
            rows[k, g] = 2 * (y[label == k][:, inside].mean((0, 1)) - y[:, inside].mean((0, 1)))
    return rows


@pytest.mark.parametrize("position_bias", [False, True])
def test_cross_validated_r2_equals_a_loop_over_folds(position_bias):
    x, y, _, _ = _data(noise=1.0)
    fold = torch.arange(len(x)) % 4
    statistics = RidgeStatistics(3, 5, 4)
    statistics.update(x, y, fold)
    best = -float("inf")
    for penalty in RIDGE_PENALTIES:
        error = spread = 0.0
        for held_out in range(4):
            test = fold == held_out
            weight, _, mean_x, mean_y = _explicit(
                x[~test], y[~test], torch.tensor(penalty), position_bias
            )
            residual = (y[test] - mean_y) - (x[test] - mean_x) @ weight
            error += float(residual.square().sum())
            spread += float((y[test] - mean_y).square().sum())
        best = max(best, 1 - error / spread)
    fit = statistics.solve(position_bias=position_bias)
    assert fit.r2 == pytest.approx(best, abs=1e-9)


def test_position_bias_pays_where_positions_differ():
    x, y, _, _ = _data(noise=0.01)
    statistics = RidgeStatistics(3, 5, 4)
    statistics.update(x, y, torch.arange(len(x)) % 4)
    with_bias = statistics.solve(position_bias=True).r2
    without = statistics.solve(position_bias=False).r2
    assert with_bias > 0.999 > without


def test_constant_features_give_zero_weights_and_no_nan():
    statistics = RidgeStatistics(1, 3, 2)
    y = torch.randn(20, 1, 2, generator=torch.Generator().manual_seed(0))
    statistics.update(torch.ones(20, 1, 3), y, torch.arange(20) % 4)
    fit = statistics.solve(position_bias=False)
    assert torch.equal(fit.weight_CD, torch.zeros(3, 2, dtype=torch.float64))
    assert torch.allclose(fit.bias_GD[0], y[:, 0].double().mean(0))
    assert fit.r2 <= 0.0


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


def _node(layout, shape, grid, index=1):
    return Node(index=index, name="n", layout=layout, shape=shape, grid=grid)


@pytest.mark.parametrize("layout", [Layout.NCHW, Layout.NLC])
def test_joint_r2_equals_the_single_fit(layout):
    x, y, _, _ = _data(n=64, g=4, c=5, d=3, noise=0.5)
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


def test_statistics_that_grow_after_a_fit_are_fitted_anew():
    x, y, _, _ = _data(noise=1.0)
    fold = torch.arange(len(x)) % 4
    grown, whole = RidgeStatistics(3, 5, 4), RidgeStatistics(3, 5, 4)
    grown.update(x[:32], y[:32], fold[:32])
    grown.solve(position_bias=False)
    grown.update(x[32:], y[32:], fold[32:])
    whole.update(x[:32], y[:32], fold[:32])
    whole.update(x[32:], y[32:], fold[32:])
    fits = [s.solve(position_bias=False) for s in (grown, whole)]
    assert torch.equal(fits[0].weight_CD, fits[1].weight_CD)


@pytest.mark.parametrize("room", [1, 8 * 5 * 6 * 4])
def test_joint_r2_does_not_depend_on_how_many_targets_fit_in_memory(monkeypatch, room):
    x, y, _, _ = _data(n=64, g=4, c=5, d=3, noise=0.5)
    source = _node(Layout.NCHW, (5, 2, 2), (2, 2))
    targets = {
        k: (_node(Layout.NCHW, (3, 2, 2), (2, 2)), y + k * torch.randn(64, 4, 3)) for k in range(5)
    }
    whole = joint_r2(source, x, targets)
    monkeypatch.setattr(joints, "MOMENT_BYTES", room)
    assert joint_r2(source, x, targets) == pytest.approx(whole, abs=1e-12)
