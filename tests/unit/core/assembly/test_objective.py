"""The learnt objective: Bayesian regression of what the formula leaves over."""

from __future__ import annotations

import numpy as np
import pytest

from dery_cli.core.assembly.objective import NOISES, SPREADS, learn

PRIOR_F = np.array([1.0, -0.5, 0.0, 0.0])
SCALE_F = np.array([0.1, 2.0, 1.0, 0.0])
"""Of the last term nothing varies."""


def networks(count, truth_F, noise, seed=0):
    generator = np.random.default_rng(seed)
    terms_BF = generator.normal(size=(count, 4)) * SCALE_F
    return terms_BF, 0.3 + terms_BF @ truth_F + noise * generator.normal(size=count)


def test_before_anything_is_built_the_objective_is_the_formula():
    found = learn(np.zeros((0, 4)), np.zeros(0), PRIOR_F, SCALE_F)
    assert found.mean_F.tolist() == PRIOR_F.tolist()
    assert found.builds == 0
    drawn = found.draw(np.random.default_rng(0))
    assert drawn[3] == 0
    assert not np.allclose(drawn, PRIOR_F)


def test_many_builds_without_noise_give_the_truth():
    truth_F = np.array([0.2, 0.1, -0.3, 0.0])
    found = learn(*networks(200, truth_F, 1e-3), PRIOR_F, SCALE_F)
    assert found.mean_F * SCALE_F == pytest.approx(truth_F * SCALE_F, abs=3e-2)
    assert found.predict(np.zeros((1, 4)))[0] == pytest.approx(0.3, abs=1e-2)


def test_outcomes_that_the_formula_explains_leave_it_as_it_is():
    found = learn(*networks(30, PRIOR_F, 0.02), PRIOR_F, SCALE_F)
    assert found.mean_F * SCALE_F == pytest.approx(PRIOR_F * SCALE_F, abs=0.02)


def test_the_posterior_is_that_of_the_normal_equations():
    terms_BF, outcome_B = networks(25, np.array([0.0, 0.4, 0.2, 0.0]), 0.1)
    found = learn(terms_BF, outcome_B, PRIOR_F, SCALE_F)
    z_BF = terms_BF[:, :3] / SCALE_F[:3]
    rest_B = outcome_B - terms_BF @ PRIOR_F
    z_BF, rest_B = z_BF - z_BF.mean(0), rest_B - rest_B.mean()
    unit = outcome_B.std()
    best = None
    for spread in SPREADS:
        for noise in NOISES:
            covariance_BB = unit**2 * (spread**2 * z_BF @ z_BF.T + noise**2 * np.eye(25))
            _, logdet = np.linalg.slogdet(covariance_BB)
            evidence = -0.5 * (logdet + rest_B @ np.linalg.solve(covariance_BB, rest_B))
            if best is None or evidence > best[0] + 1e-9:
                best = (evidence, spread, noise)
    _, spread, noise = best
    ridge_FF = z_BF.T @ z_BF + (noise / spread) ** 2 * np.eye(3)
    wanted_F = np.linalg.solve(ridge_FF, z_BF.T @ rest_B)
    assert (found.mean_F - PRIOR_F)[:3] * SCALE_F[:3] == pytest.approx(wanted_F, abs=1e-10)
    covariance_FF = (unit * noise) ** 2 * np.linalg.inv(ridge_FF)
    root_FF = found.root_FF[:3] * SCALE_F[:3, None]
    assert root_FF @ root_FF.T == pytest.approx(covariance_FF, abs=1e-10)


def test_draws_spread_where_nothing_was_learnt():
    terms_BF, outcome_B = networks(60, np.array([0.5, 0.0, 0.0, 0.0]), 0.01)
    terms_BF[:, 2] = 0.0  # never seen
    found = learn(terms_BF, outcome_B, PRIOR_F, SCALE_F)
    generator = np.random.default_rng(0)
    spread_F = np.std([found.draw(generator) for _ in range(300)], axis=0) * SCALE_F
    assert spread_F[2] > 2 * spread_F[0]


def test_a_term_that_hardly_varies_gets_no_large_weight():
    scale_F = np.array([0.1, 1e-7, 0.01, 0.0])
    generator = np.random.default_rng(0)
    terms_BF = generator.normal(size=(12, 4)) * scale_F
    outcome_B = 0.5 + 0.1 * generator.normal(size=12)
    found = learn(terms_BF, outcome_B, PRIOR_F, scale_F)
    assert found.mean_F[1] == PRIOR_F[1]
    assert abs(found.mean_F[2]) < 1
