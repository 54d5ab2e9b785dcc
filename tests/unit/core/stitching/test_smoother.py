"""Ridge as a smoother, against ridge regressions fitted one by one in float64."""

from __future__ import annotations

import pytest
import torch

from dery_cli.core.stitching.ridge import RIDGE_PENALTIES
from dery_cli.core.stitching.smoother import Smoother, in_folds


def _data(n, c, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=generator) * torch.logspace(-2, 2, c) + 5
    w = torch.randn(c, d, generator=generator) / x.std(0)[:, None]
    y = (x - x.mean(0)) @ w / c**0.5 + torch.randn(n, d, generator=generator) + 3
    return x, y.double()


def naive_fit(x_NC, y_ND, penalty, kept_N):
    """Predictions for all rows of the map fitted to some, channels standardised over all."""
    x_NC = x_NC.double()
    x_NC = (x_NC - x_NC.mean(0)) / x_NC.std(0, correction=0)
    ridge = penalty * float(x_NC.square().sum()) / min(x_NC.shape)
    x_TC, mean_D = x_NC[kept_N], y_ND[kept_N].mean(0)
    mean_C = x_TC.mean(0)
    gram_CC = (x_TC - mean_C).T @ (x_TC - mean_C) + ridge * torch.eye(x_NC.shape[1]).double()
    weight_CD = torch.linalg.solve(gram_CC, (x_TC - mean_C).T @ (y_ND[kept_N] - mean_D))
    return (x_NC - mean_C) @ weight_CD + mean_D


@pytest.mark.parametrize(("n", "c"), [(60, 4), (60, 40), (60, 200)])
@pytest.mark.parametrize("penalty", [1e-4, 1e-1, 10.0])
def test_fits_and_held_out_fits_are_those_of_separate_regressions(n, c, penalty):
    x, y = _data(n, c)
    order, spans = in_folds(torch.arange(n) % 4)
    x, y = x[order], y[order]
    smoother = Smoother.of(x)
    everything = torch.ones(n, dtype=torch.bool)
    assert torch.allclose(smoother.fit(y, penalty), naive_fit(x, y, penalty, everything), atol=1e-6)
    held_out = smoother.held_out(penalty, spans)(y.float())
    for start, stop in spans:
        kept = everything.clone()
        kept[start:stop] = False
        wanted = naive_fit(x, y, penalty, kept)[start:stop]
        assert torch.allclose(held_out[start:stop].double(), wanted, atol=1e-4)


@pytest.mark.parametrize(("n", "c"), [(60, 4), (60, 40), (60, 200)])
def test_each_group_gets_the_penalty_of_its_least_generalised_error(n, c):
    x, y = _data(n, c)
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(1)).double()
    groups = torch.stack([y, noise, 0.01 * y], 1)
    everything = torch.ones(n, dtype=torch.bool)
    hat = {p: naive_fit(x, torch.eye(n).double(), p, everything) for p in RIDGE_PENALTIES}

    def error(penalty, group):
        residual = groups[:, group] - hat[penalty] @ groups[:, group]
        return float(residual.square().sum()) / (1 - float(hat[penalty].trace()) / n) ** 2

    wanted = [min(RIDGE_PENALTIES, key=lambda p: error(p, g)) for g in range(3)]
    found = Smoother.of(x).best_penalties(groups)
    assert found == wanted
    assert found[0] == found[2] < found[1]


def test_where_any_output_is_fitted_exactly_rounding_errors_choose_no_penalty():
    """As many directions as samples: nothing lies outside them, in float32 neither."""
    x, _ = _data(60, 300)
    smoother = Smoother.of(x)
    assert smoother.basis_NR.shape == (60, 60)
    weights = torch.randn(300, 40, generator=torch.Generator().manual_seed(2)).double()
    groups = ((x.double() - 5) / x.std(0) @ weights)[:, :, None]
    assert set(smoother.best_penalties(groups.float())) == set(smoother.best_penalties(groups))


def test_a_constant_input_predicts_the_mean_of_the_other_folds():
    order, spans = in_folds(torch.arange(10) % 2)
    y = torch.arange(10.0)[order][:, None]
    smoother = Smoother.of(torch.ones(10, 3))
    assert torch.allclose(smoother.fit(y, 1e-3), torch.full((10, 1), 4.5).double())
    found = smoother.held_out(1e-3, spans)(y)
    assert torch.allclose(found, torch.tensor([5.0] * 5 + [4.0] * 5)[:, None])


def test_folds_lie_in_a_row_and_empty_ones_are_none():
    order, spans = in_folds(torch.tensor([2, 0, 2, 0, 4]))
    assert order.tolist() == [1, 3, 0, 2, 4]
    assert spans == [(0, 2), (2, 4), (4, 5)]
