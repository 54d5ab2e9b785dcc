"""The configuration, the plan of a run, and the learning rate in closed form."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from dery_cli.errors import UsageError
from dery_cli.training.plan import Phase, learning_rate, make_plan, warmup_updates
from dery_cli.training.recipe import RECIPES, FinetuneConfig, make_config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_config_and_plain_data(name):
    data = make_config(name).to_json()
    assert json.loads(json.dumps(data)) == data


def test_the_paper_recipe_is_the_papers():
    paper = make_config("paper")
    assert (paper.epochs, paper.lr, paper.weight_decay) == (100, 1e-3, 0.05)
    assert (paper.label_smoothing, paper.optimizer) == (0.1, "adamw")
    assert all((paper.mixup, paper.cutmix, paper.randaugment, paper.ema_decay))


def test_steps_replace_the_recipes_epochs_and_none_changes_nothing():
    config = make_config("paper", steps=7, lr=None)
    assert (config.steps, config.epochs, config.lr) == (7, None, 1e-3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mode": "half"}, "mode is 'half'"),
        ({"epochs": 3, "steps": 3}, "give either epochs or steps, not both"),
        ({}, "give either epochs or steps, not neither"),
        ({"steps": 0}, "steps is 0; it must be at least 1 and at most 10000000"),
        ({"steps": 3, "epochs": 0}, "give either epochs or steps, not both"),
        (
            {"steps": 1, "seed": 2**63},
            "seed is 9223372036854775808; it must be",
        ),
        ({"steps": 1, "lr": -1.0}, "lr is -1.0; it must be above 0"),
        ({"steps": 1, "lr": math.nan}, "lr is nan; it must be a number, above 0"),
        ({"steps": 1, "warmup": 1.0}, "warmup is 1.0; it must be at least 0 and below 1"),
        ({"steps": 1, "hflip": 2.0}, "hflip is 2.0; it must be at least 0 and at most 1"),
        (
            {"steps": 1, "randaugment": 11},
            "randaugment is 11; it must be at least 0",
        ),
        ({"steps": 1, "min_lr": 0.1}, "min_lr 0.1 is above lr 0.001"),
        (
            {"steps": 1, "crop_scale": (0.9, 0.1)},
            "crop_scale is 0.9 0.1; it must be two",
        ),
        (
            {"steps": 1, "crop_scale": (0.5, 1.0), "crop_padding": 0.1},
            "crop_scale and crop_padding exclude each other",
        ),
        ({"steps": 1, "mixed_precision": "int8"}, "mixed_precision is 'int8'"),
        ({"steps": 1, "weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(change, text):
    with pytest.raises(UsageError) as error:
        FinetuneConfig(**change)
    assert text in error.value.message


def test_unknown_recipes_and_settings_suggest_the_close_ones():
    with pytest.raises(UsageError, match="no recipe is called 'papre'") as error:
        make_config("papre")
    assert error.value.hint == "did you mean paper?"
    with pytest.raises(UsageError, match="no setting 'learning_rat'"):
        make_config("default", learning_rat=1)
    with pytest.raises(UsageError) as error:
        make_config("default", weight_decy=1)
    assert error.value.hint == "did you mean weight_decay?"


def test_recipes_and_plans_are_free_of_torch():
    code = (
        "import sys, dery_cli.training.plan as p, dery_cli.training.recipe as r;"
        "p.make_plan(r.make_config(), 300);"
        "print([m for m in ('torch', 'numpy', 'timm', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_epochs_become_updates_of_full_batches():
    plan = make_plan(FinetuneConfig(epochs=3, batch_size=32), 100)
    assert plan.steps == math.ceil(3 * 100 / 32) == 10
    assert plan.epoch(10) == 3.2
    assert plan.reports == (10,)


def test_reports_come_at_epoch_ends_but_not_every_few_updates():
    plan = make_plan(FinetuneConfig(epochs=3, batch_size=10), 1000)
    assert plan.reports == (100, 200, 300)
    plan = make_plan(FinetuneConfig(steps=60, batch_size=64), 90)
    # Epochs end after 2, 3, 5, 6, ... updates; 26 is the first past 25, then 51, then the end.
    assert plan.reports == (26, 51, 60)
    plan = make_plan(FinetuneConfig(steps=60, batch_size=64, report_every=30), 90)
    assert plan.reports == (30, 60)


def test_the_batch_shrinks_to_the_data_and_says_so():
    plan = make_plan(
        FinetuneConfig(steps=5, batch_size=64, grad_accum=2, mixup=0.5), 30, processes=2
    )
    assert (plan.batch_size, plan.micro_batch) == (24, 12)
    assert plan.notes == ("30 training images are fewer than a batch of 64: it was reduced to 24",)
    with pytest.raises(UsageError, match="3 training images are fewer than the smallest batch"):
        make_plan(FinetuneConfig(steps=5, batch_size=64, grad_accum=2), 3, processes=2)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(UsageError, match="a batch of 50 does not divide into 2 processes") as error:
        make_plan(FinetuneConfig(steps=5, batch_size=50, grad_accum=2), 300, processes=2)
    assert error.value.hint == "give a multiple of 4: --batch-size 52"


def test_stitch_then_full_has_two_phases():
    config = FinetuneConfig(steps=100, mode="stitch-then-full", stitch_fraction=0.25)
    plan = make_plan(config, 300)
    assert plan.phases == (
        Phase(start=0, steps=25, frozen=True),
        Phase(start=25, steps=75, frozen=False),
    )
    assert plan.phase(24).frozen
    assert not plan.phase(25).frozen


def test_learning_rate_by_hand():
    config = FinetuneConfig(steps=12, lr=1.0, min_lr=0.0, warmup=0.25)
    phase = Phase(start=0, steps=12, frozen=False)
    assert warmup_updates(config, phase) == 3
    rates = [learning_rate(config, phase, step) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    # 9 updates of cosine: a third of the way after 3 more, half at 4.5.
    assert rates[6] == pytest.approx(0.75)
    assert rates[9] == pytest.approx(0.25)
