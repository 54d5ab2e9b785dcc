"""Ridge from streamed normal equations against explicit solutions."""

from __future__ import annotations

import pytest
import torch

from dery_cli.core.stitching import ridge
from dery_cli.core.stitching.ridge import RIDGE_PENALTIES, RidgeStatistics


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


@pytest.mark.parametrize("limit", [5, 4], ids=["small", "large"])
def test_small_problems_take_one_thread_and_leave_the_others_to_the_caller(monkeypatch, limit):
    monkeypatch.setattr(ridge, "ONE_THREAD", limit)
    before = torch.get_num_threads()
    seen = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda x: (seen.append(torch.get_num_threads()), eigh(x))[1]
    )
    x, y, _, _ = _data(c=5)
    statistics = RidgeStatistics(3, 5, 4)
    statistics.update(x, y, torch.arange(len(x)) % 4)
    torch.set_num_threads(2)
    try:
        statistics.solve(position_bias=False)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1 if limit == 5 else 2}
    assert after == 2
