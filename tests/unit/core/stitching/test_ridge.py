"""Ridge from streamed normal equations against explicit solutions."""

from __future__ import annotations

import math

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
    unjudged = statistics.solve(position_bias=position_bias, class_weight=2.0, judged=False)
    assert torch.equal(unjudged.weight_CD, fit.weight_CD)
    assert unjudged.penalty == fit.penalty
    assert math.isnan(unjudged.r2)


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


def _both_forms(x, y, fold, label, cells, batch):
    """Statistics of the same samples in kernel and in primal form.

    What brings the second over its C rows lies in a fold that there is not, and counts for nothing.
    """
    n, g, c = x.shape
    kernel = RidgeStatistics(g, c, y.shape[2], classes=5, cells=cells)
    primal = RidgeStatistics(g, c, y.shape[2], classes=5, cells=cells)
    primal.update(
        torch.zeros(c + 1, g, c), torch.zeros(c + 1, g, y.shape[2]), torch.full((c + 1,), 9)
    )
    for start in range(0, n, batch):
        part = slice(start, start + batch)
        for statistics in (kernel, primal):
            statistics.update(x[part], y[part], fold[part], label[part])
    return kernel, primal


@pytest.mark.parametrize("options", [{}, {"class_weight": 2.0}, {"only": (0, 2, 3)}])
@pytest.mark.parametrize("position_bias", [False, True])
def test_the_kernel_form_is_the_primal(position_bias, options):
    x, y, _, _ = _data(n=22, g=3, c=90, d=4, noise=1.0)
    fold, label = torch.arange(22) % 4, torch.arange(22) % 5
    kernel, primal = _both_forms(x, y, fold, label, (0, 1, 0), 7)
    assert [len(s.folds[0].gram_CC) for s in (kernel, primal)] == [66, 90]
    one, other = (s.solve(position_bias=position_bias, **options) for s in (kernel, primal))
    assert one.penalty == other.penalty
    assert one.r2 == pytest.approx(other.r2, abs=1e-9)
    assert one.error == pytest.approx(other.error, rel=1e-9)
    assert torch.allclose(one.weight_CD, other.weight_CD, atol=1e-9)
    assert torch.allclose(one.bias_GD, other.bias_GD, atol=1e-9)
    weight, bias, _, _ = _explicit(x, y, torch.tensor(0.05), position_bias)
    fit = kernel.solve(position_bias=position_bias, penalties=(0.05,))
    assert torch.allclose(fit.weight_CD, weight, atol=1e-9)
    assert torch.allclose(fit.bias_GD, bias, atol=1e-9)
    widths = [1, 3]
    found = [s.r2(widths, position_bias=position_bias) for s in (kernel, primal)]
    assert found[0] == pytest.approx(found[1], abs=1e-9)
    for mine, theirs in zip(kernel.moments(), primal.moments(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)


def test_rows_that_depend_on_one_another_change_nothing():
    x, y, _, _ = _data(n=20, g=1, c=50, d=3)
    x[10:] = x[:10]
    fold = torch.arange(20) % 4
    kernel, primal = _both_forms(x, y, fold, fold, (0,), 6)
    one, other = (s.solve(position_bias=False, penalties=(1e-3,)) for s in (kernel, primal))
    assert torch.allclose(one.weight_CD, other.weight_CD, atol=1e-9)


def test_samples_that_outgrow_the_channels_go_over_to_the_primal_form():
    x, y, _, _ = _data(n=60, g=3, c=50)
    fold = torch.arange(60) % 4
    grown, at_once = RidgeStatistics(3, 50, 4), RidgeStatistics(3, 50, 4)
    for start in range(0, 60, 10):
        grown.update(x[start : start + 10], y[start : start + 10], fold[start : start + 10])
        grown.solve(position_bias=True)
    at_once.update(x, y, fold)
    assert len(grown.folds[0].gram_CC) == 50
    one, other = (s.solve(position_bias=True) for s in (grown, at_once))
    assert torch.allclose(one.weight_CD, other.weight_CD, atol=1e-9)


def test_few_images_take_little_memory_however_wide_the_tokens_are():
    """As the prefix tokens of a large ViT: 512 images took 2.2 GB of normal equations."""
    statistics = RidgeStatistics(1, 6144, 8)
    generator = torch.Generator().manual_seed(0)
    statistics.update(
        torch.randn(32, 1, 6144, generator=generator), torch.randn(32, 1, 8), torch.arange(32) % 4
    )
    assert statistics.solve(position_bias=False).weight_CD.shape == (6144, 8)
    assert max(sums.gram_CC.numel() for sums in statistics.folds) == 32 * 32
