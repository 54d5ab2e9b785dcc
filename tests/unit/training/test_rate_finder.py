"""Which rate trials speak for, what they cost, and that they leave everything as it was."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dery_cli.training import rate_finder
from dery_cli.training.rate_finder import (
    EFFORT,
    EFFORT_ON_FOLDS,
    FEWEST_UPDATES,
    TRIAL_FOLDER,
    FoundRate,
    Part,
    RateTrial,
    allowance,
    choose,
    find_rate,
    rates_to_try,
    told_right,
    trial,
    with_rate,
)
from dery_cli.training.recipe import make_config
from tests.unit.training.standins import CLASSES, Assembly, images, same

CPU = torch.device("cpu")
RUINOUS = 1e4


def ended(gain, error=0.02, *, lr=1e-3, diverged=False):
    return RateTrial(
        lr=lr,
        block_lr_scale=1.0,
        updates=48,
        images=100,
        top1=0.5,
        gain=gain,
        error=error,
        diverged=diverged,
    )


def config(**changes):
    options = {"steps": 12, "batch_size": 30, "lr": 0.03, "effort": None, "crop_padding": 0.0}
    return make_config("default", **{**options, **changes})


def part(seed=0):
    return Part(
        start=lambda: Assembly(seed=seed).eval(), fit=images(90), held_out=images(60, seed=5)
    )


def find(parts, options, folder, steps=12, **settings):
    return find_rate(parts, options, steps, folder, classes=CLASSES, device=CPU, **settings)


@pytest.mark.parametrize(
    ("gains", "taken"),
    [
        ([0.05, 0.03, 0.01], 0),
        ([0.03, 0.05, 0.01], 1),
        ([0.05, 0.05], 0),  # the boldest of equals
        ([-0.01, 0.01], 1),  # level is no harm: what is above the start will do
        ([-0.01, -0.005], None),
        ([0.0, 0.0], 0),  # level: a run has more images than its trial
        ([-0.05, 0.03], 1),
        # after harm, level with the start is not enough: a run goes further than its trial
        ([-0.05, 0.01], None),
        ([-0.05, -0.01, 0.0], None),
    ],
)
def test_the_rate_that_trials_speak_for(gains, taken):
    trials = [ended(gain, lr=3.0**-place) for place, gain in enumerate(gains)]
    assert choose(trials) is (None if taken is None else trials[taken])


def test_a_loss_that_rose_is_harm_whatever_the_figures():
    assert ended(0.0, 0.0, diverged=True).harmed
    cautious = ended(0.01)
    assert choose([ended(0.0, 0.0, diverged=True), cautious]) is None
    assert choose([cautious, ended(0.0, 0.0, diverged=True)]) is cautious


def test_rates_go_down_from_the_recipes():
    assert rates_to_try(config(lr=0.3, block_lr_scale=0.5)) == [
        (0.3, 0.5),
        (pytest.approx(0.1), 0.5),
        (0.3, pytest.approx(0.05)),
    ]
    # without blocks to train their share is nothing to choose
    assert len(rates_to_try(config(mode="frozen"))) == 2


@pytest.mark.parametrize(
    ("effort", "steps", "parts", "updates", "total"),
    [
        (None, 10_000, 1, 1000, 3000),
        (None, 141, 3, FEWEST_UPDATES, 352),
        (None, 20, 3, 20, 50),
        (None, 100, 1, FEWEST_UPDATES, 30),
        (0.0, 141, 3, FEWEST_UPDATES, 0),
        (9.0, 141, 3, 141, 1269),
        (1.0, 144, 3, FEWEST_UPDATES, 144),
    ],
)
def test_trials_keep_to_their_allowance(effort, steps, parts, updates, total):
    options = dataclasses.replace(config(), effort=effort)
    allowed = allowance(options, steps, parts)
    assert (allowed.updates, allowed.total) == (updates, total)
    share = (EFFORT if parts == 1 else EFFORT_ON_FOLDS) if effort is None else effort
    assert allowed.total <= share * steps


def test_a_trial_leaves_network_and_random_numbers_as_they_were(tmp_path):
    network = Assembly()
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    first, again = (
        trial(
            network, images(), images(60, seed=5), config(), tmp_path, classes=CLASSES, device=CPU
        )
        for _ in range(2)
    )
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
    assert first.shape == (60,)
    assert first.mean() > 0.6 > told_right(network, images(60, seed=5), CPU).mean()
    assert same(network.state_dict(), weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_whose_loss_rises_has_no_end(tmp_path):
    options = config(lr=RUINOUS, clip_grad=0, ema_decay=0)
    assert (
        trial(Assembly(), images(), images(60), options, tmp_path, classes=CLASSES, device=CPU)
        is None
    )


def test_the_first_clear_gain_is_taken_on_folds_and_all_are_compared_on_one_part(tmp_path):
    seen: list[int] = []
    found = find([part(), part(1), part(2)], config(), tmp_path, progress=seen.append)
    assert found is not None
    assert found.admitted
    assert (found.lr, found.block_lr_scale, len(found.trials)) == (0.03, 1.0, 1)
    assert (found.updates, seen) == (12, [12])
    assert (found.images, found.trials[0].images) == (60, 60)  # the other starts were not made
    assert not (tmp_path / TRIAL_FOLDER).exists()
    assert FoundRate.from_json(found.to_json()) == found
    single = find([part()], config(effort=3.0), tmp_path)
    assert single is not None
    assert len(single.trials) == 3
    assert single == find([part()], config(effort=3.0), tmp_path)


def test_a_rate_is_given_up_after_a_trial_as_long_as_the_run(tmp_path, monkeypatch):
    right_N = told_right(part().start(), part().held_out, CPU)
    assert 0 < right_N.mean() < 1
    seen: list[int] = []

    def slow(network, fit, held_out, config, folder, **how):
        """Loses all in a short trial, gains all in a long one at the second rate."""
        seen.append(config.steps)
        gains = config.steps == 200 and config.lr < 0.02
        return torch.ones(60, dtype=torch.float64) if gains else torch.zeros(60).double()

    monkeypatch.setattr(rate_finder, "trial", slow)
    found = find([part(), part(1), part(2)], config(), tmp_path, steps=200)
    assert found is not None
    assert seen == [55, 200, 55, 55]  # after the first long one there is no room for another
    assert found.updates == 365
    assert not found.admitted
    seen.clear()
    found = find([part(), part(1), part(2)], config(effort=3.0), tmp_path, steps=200)
    assert found is not None
    assert seen == [66, 200, 66, 200]
    assert (found.admitted, found.lr) == (True, pytest.approx(0.01))
    assert [(one.updates, one.images) for one in found.trials] == [(200, 60), (200, 60)]


def test_nothing_is_admitted_where_every_rate_does_harm(tmp_path):
    options = config(lr=RUINOUS, clip_grad=0, ema_decay=0, effort=9.0)
    found = find([part(), part(1)], options, tmp_path)
    assert found is not None
    assert not found.admitted
    assert [one.diverged for one in found.trials] == [True] * 3
    # the most cautious is named: with validation images it may be taken all the same
    assert with_rate(options, found).block_lr_scale == pytest.approx(0.1)


def test_gain_and_error_are_paired_image_by_image(tmp_path):
    found = find([part()], config(effort=1.0), tmp_path)
    assert found is not None
    one = part()
    before_N = told_right(one.start(), one.held_out, CPU)
    short = config(report_every=12)
    after_N = trial(
        one.start(), one.fit, one.held_out, short, tmp_path, classes=CLASSES, device=CPU
    )
    assert after_N is not None
    gained, lost = (float(((after_N - before_N) == by).double().mean()) for by in (1, -1))
    assert found.start_top1 == float(before_N.mean())
    assert gained > 0
    assert found.trials[0].gain == pytest.approx(gained - lost)
    variance = gained + lost - (gained - lost) ** 2
    assert found.trials[0].error == pytest.approx(math.sqrt(variance / 60))


def test_no_allowance_no_rate(tmp_path):
    assert find([part()], config(effort=0.0), tmp_path) is None
    assert find([part()], config(), tmp_path) is None  # 0.3 of 12 updates is no trial
