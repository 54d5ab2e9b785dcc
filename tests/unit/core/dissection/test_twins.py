"""What differs between runs, told by number of images and mode."""

from __future__ import annotations

import pytest
import torch

from dery_cli.core.dissection.trace import Ref
from dery_cli.core.dissection.twins import (
    DEVICE,
    FIRST_RUN,
    MORE_RUNS,
    TWIN_RUNS,
    Batch,
    Mode,
    UnclearError,
    merge,
    varies,
)

FEW = (FIRST_RUN, *TWIN_RUNS)
MANY = (*FEW, *MORE_RUNS)


def merged(value, runs=FEW):
    return merge([value(run.batch, run.training) for run in runs], runs)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda n, training: 7, 7),
        (lambda n, training: 2 * n + 1, Batch(2, 1)),
        (lambda n, training: training, Mode(False, True)),
        (lambda n, training: 0.5 if training else 0.0, Mode(0.0, 0.5)),
        (lambda n, training: [slice(0, n), {"p": 1}], [slice(0, Batch(1, 0)), {"p": 1}]),
        (lambda n, training: (Ref(n), torch.device("meta")), (Ref(1), DEVICE)),
        (lambda n, training: float("nan"), pytest.approx(float("nan"), nan_ok=True)),
        (lambda n, training: None if training else 3, Mode(3, None)),
    ],
)
def test_one_confirming_run_is_enough_for_these(value, expected):
    assert merged(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda n, training: 5 if training else 3, Mode(3, 5)),
        (lambda n, training: n if training else 3, Mode(3, Batch(1, 0))),
        (lambda n, training: 3 if training else n, Mode(Batch(1, 0), 3)),
    ],
)
def test_integers_of_the_mode_take_three_runs_of_each(value, expected):
    with pytest.raises(UnclearError):
        merged(value)
    assert merged(value, MANY) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda n, training: 1.0 / n, "1.0 for 1 image, 0.5 for 2 images"),
        (lambda n, training: n * n, "1 for 1 image, 4 for 2 images"),
        (lambda n, training: n == 1, "True for 1 image, False for 2 images"),
        (lambda n, training: [0] * n, "1 for 1 image, 2 for 2 images, 5 for 5 .* values"),
        (lambda n, training: {"b": 1} if n > 1 else {"a": 1}, "keys"),
        (lambda n, training: "a" if n > 1 else "b", "b for 1 image, a for 2 images"),
    ],
)
@pytest.mark.parametrize("runs", [FEW, MANY], ids=["few", "many"])
def test_what_nothing_explains_is_unclear(value, reason, runs):
    with pytest.raises(UnclearError, match=reason):
        merged(value, runs)


def test_what_is_left_open_is_found_at_any_depth():
    assert varies((1, [slice(None, Batch(1, 0))]))
    assert varies({"p": Mode(0, 1)})
    assert not varies(({"p": [1, None]}, slice(0, 3)))
