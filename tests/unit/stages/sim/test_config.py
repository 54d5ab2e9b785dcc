"""Which options a metric takes, and which of them its record names."""

from __future__ import annotations

import pytest

from dery_cli.errors import UsageError
from dery_cli.stages.sim.config import DIRECTIONAL, USES, SimConfig
from dery_cli.zoo.plugin import find_metric


@pytest.mark.parametrize(
    ("options", "owner"),
    [
        ({"metric": "lr", "minibatch": 64}, "cka and rbf_cka"),
        ({"metric": "cka", "bandwidth": 2.0}, "rbf_cka"),
        ({"metric": "cka", "folds": 3}, "ridge"),
    ],
)
def test_an_option_of_another_metric_is_refused(options, owner):
    with pytest.raises(UsageError, match="is no option of the metric") as caught:
        SimConfig(**options)
    assert caught.value.hint == f"it belongs to {owner}"


@pytest.mark.parametrize("name", USES)
def test_the_metrics_are_directional_as_the_stage_believes(name):
    assert find_metric(name).directional == (name in DIRECTIONAL)


def test_an_unknown_metric_lists_those_there_are():
    with pytest.raises(UsageError, match="--metric is 'nosuch'") as caught:
        SimConfig(metric="nosuch")
    assert "rbf_cka" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "samples", "minibatch"),
    [
        ({}, 2048, 256),
        ({}, 100, 100),
        ({}, 3, 4),
        ({"biased": True}, 1, 2),
        ({"minibatch": 8}, 9, 8),
    ],
)
def test_the_minibatch_is_256_or_all_samples_if_fewer(options, samples, minibatch):
    assert SimConfig(**options).metric_options(samples).minibatch == minibatch


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"minibatch", "biased"}),
        ({"metric": "lr"}, {"projection"}),
        ({"metric": "lr", "projection": 8}, {"projection", "seed"}),
        ({"metric": "ridge"}, {"penalty", "folds"}),
    ],
)
def test_the_record_names_what_the_result_depends_on(options, names):
    config = SimConfig(seed=5, memory=10**6, **options)
    recorded = config.recorded(config.metric_options(64))
    assert set(recorded) == names
    assert recorded.get("seed", 5) == 5
