"""What records may say of donors, and of the networks that are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dery_cli.io.records import Kind
from dery_cli.io.schema import (
    Check,
    SchemaError,
    any_text,
    boolean,
    both,
    fields,
    file_name,
    integer,
    list_of,
    mapping,
    number,
    one_of,
    optional,
    plain,
    plain_name,
    row,
    sha256,
)
from dery_cli.types import WEIGHTS_FOLDER, Layout, StitchKind

MAX_SIDE = 1 << 15
"""Pixels; a batch of one such image would have gigabytes."""
_DIMENSIONS = {Layout.NCHW: 3, Layout.NHWC: 3, Layout.NLC: 2, Layout.NC: 1}

IMAGE_SIZE = row(integer(1, MAX_SIDE), integer(1, MAX_SIDE))
CROP = number(1e-6, 1)
CLASSES = list_of(any_text, least=1)
COUNT = integer(0)
SCORE = optional(number())


def _per_channel(value: Any) -> None:
    for key in ("mean", "std"):
        if len(value[key]) != value["in_chans"]:
            raise SchemaError(f"has {value['in_chans']} channels, and {len(value[key])} of {key}")


INPUT = both(
    fields(
        {
            "image_size": IMAGE_SIZE,
            "mean": list_of(number()),
            "std": list_of(number(1e-12)),
            "interpolation": one_of("nearest", "bilinear", "bicubic"),
            "in_chans": integer(1, 1 << 16),
        }
    ),
    _per_channel,
)


def _shape(value: Any) -> None:
    if len(value["shape"]) != _DIMENSIONS[Layout(value["layout"])]:
        raise SchemaError(f"is {value['layout']} of {len(value['shape'])} dimensions")
    if math.prod(value["shape"]) >= 1 << 40:
        raise SchemaError("is larger than any feature")


NODE = both(
    fields(
        {
            "index": COUNT,
            "name": any_text,
            "layout": one_of(*Layout),
            "shape": list_of(integer(1), least=1),
            "grid": row(integer(1), integer(1)),
            "num_prefix_tokens": COUNT,
            "params": COUNT,
            "flops": COUNT,
        }
    ),
    _shape,
)


def _in_order(value: Any) -> None:
    indices = [node["index"] for node in value["nodes"]]
    if indices != list(range(len(indices))):
        raise SchemaError("has nodes out of order")


ANATOMY = both(
    fields(
        {
            "method": any_text,
            "nodes": list_of(NODE, least=2),
            "shared": list_of(fields({"count": COUNT, "units": list_of(integer(1), least=1)})),
        }
    ),
    _in_order,
)


def _kept_weights(value: Any) -> None:
    """A copy of a checkpoint: a file in one folder of the workspace."""
    any_text(value)
    folder, _, file = value.partition("/")
    if folder != WEIGHTS_FOLDER:
        raise SchemaError(f"is no checkpoint in {WEIGHTS_FOLDER}/")
    file_name(file)


DONOR = fields(
    {
        "name": plain_name,
        "spec": any_text,
        "weights_sha256": sha256,
        "weights": optional(_kept_weights),
        "pretrained": boolean,
        "license": any_text,
        "task": any_text,
        "source": any_text,
        "metrics": mapping(number()),
        "input": INPUT,
        "anatomy": ANATOMY,
    }
)


def _named_once(donors: Any) -> None:
    names = [donor["name"] for donor in donors]
    if len(set(names)) < len(names):
        raise SchemaError("has two donors of one name")


ZOO = Kind(name="zoo", version=1, data=fields({"donors": both(list_of(DONOR), _named_once)}))


def _forward(value: Any) -> None:
    if value["start"] >= value["stop"]:
        raise SchemaError(f"leads from node {value['start']} to node {value['stop']}")


BLOCK = both(
    fields(
        {
            "donor": plain_name,
            "start": COUNT,
            "stop": COUNT,
            "stage": COUNT,
            "set": optional(COUNT),
            "spec": any_text,
            "weights_sha256": sha256,
            "image_size": IMAGE_SIZE,
            "license": any_text,
            "task": any_text,
            "source": any_text,
        }
    ),
    _forward,
)
JOINT = fields(
    {
        "source": NODE,
        "target": NODE,
        "stitch": one_of(*StitchKind),
        "r2": SCORE,
        "class_weight": number(),
        "prefix_r2": SCORE,
        "position": optional(boolean),
    }
)


def _one_joint_a_block(value: Any) -> None:
    if len(value["blocks"]) != len(value["joints"]):
        raise SchemaError(f"has {len(value['blocks'])} blocks and {len(value['joints'])} joints")
    if value["joints"][0] is not None:
        raise SchemaError("has a stitch in front of the first block")


FITTED_ON = ("fit", "all")
"""Whether a part of the training images was kept apart to choose on, or all were fitted on."""

SPLIT = fields({"fraction": number(0, 1), "seed": integer(0), "digest": sha256})
"""How a target's training images are divided, as ``data/samples.py`` does."""

NETWORK = both(
    fields(
        {
            "blocks": list_of(BLOCK, least=1),
            "joints": list_of(optional(JOINT)),
            "input": INPUT,
            "crop": CROP,
            "classes": optional(CLASSES),
            "end": NODE,
        },
        {"stem": fields({"source": NODE, "target": NODE})},
    ),
    _one_joint_a_block,
)
"""A network of blocks, as ``networks.describe_network`` writes it."""


def network_data(
    required: Mapping[str, Check],
    optional: Mapping[str, Check] = MappingProxyType({}),
    *,
    more: Check | None = None,
) -> Check:
    """The data of a record beside a network's weights: these fields, and what all such have."""
    common = {
        "network": NETWORK,
        "params": COUNT,
        "flops": COUNT,
        "target": any_text,
        "target_skip_bad": boolean,
        "split": SPLIT,
        "fitted_on": one_of(*FITTED_ON),
    }
    return fields({**common, **required}, optional, more=more)


# what whoever loads a network has to know; the stages that write these records know the rest
ASSEMBLY = Kind(
    name="assembly",
    version=4,
    parents=("target",),
    options=fields({"target_samples": integer(1), "fit_samples": integer(1)}, more=plain),
    data=network_data({"name": any_text}, more=plain),
)
RUN = Kind(
    name="run",
    version=4,
    parents=("network", "data"),
    options=fields({"valid_fraction": number(0, 1)}, more=plain),
    data=network_data({"start": any_text}, more=plain),
)
