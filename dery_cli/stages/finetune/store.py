"""The run artifact: what fine-tuning came to, beside its weights."""

from __future__ import annotations

import dataclasses

from dery_cli.io.schema import any_text, fields, integer, optional, sha256
from dery_cli.zoo import schemas
from dery_cli.zoo.schemas import COUNT, SCORE, network_data

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
        {"teacher": fields({"name": any_text, "sha256": sha256, "probe_accuracy": SCORE})},
    ),
)
