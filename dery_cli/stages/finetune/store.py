"""What fine-tuning leaves in its folder: the run, beside its weights, and the rate found for it."""

from __future__ import annotations

import dataclasses

from dery_cli.io.records import Kind
from dery_cli.io.schema import (
    any_text,
    boolean,
    fields,
    integer,
    list_of,
    number,
    optional,
    sha256,
)
from dery_cli.zoo import schemas
from dery_cli.zoo.schemas import COUNT, SCORE, network_data

_TRIAL = fields(
    {
        "lr": number(0),
        "block_lr_scale": number(0),
        "updates": integer(1),
        "images": integer(1),
        "top1": number(0, 1),
        "gain": number(-1, 1),
        "error": number(0),
        "diverged": boolean,
    }
)
_FOUND = fields(
    {
        "lr": number(0),
        "block_lr_scale": number(0),
        "admitted": boolean,
        "start_top1": number(0, 1),
        "images": integer(1),
        "updates": integer(1),
        "trials": list_of(_TRIAL, least=1),
    }
)

RATES = Kind(name="rates", version=1, parents=("network", "data"), data=_FOUND)
"""Of a run's parents and options; so an interrupted run finds its rate again."""

RUN = dataclasses.replace(
    schemas.RUN,
    data=network_data(
        {
            "start": any_text,
            "best": fields(
                {"step": COUNT, "steps": COUNT, "epochs": SCORE, "batch_size": integer(1)},
                more=SCORE,
            ),
            "test_top1_before": SCORE,
            "test_top1": SCORE,
            "test_loss": SCORE,
            "test_images": optional(COUNT),
        },
        {
            "teacher": fields({"name": any_text, "sha256": sha256, "probe_accuracy": SCORE}),
            "rate": _FOUND,
            "kept_start": boolean,
        },
    ),
)
